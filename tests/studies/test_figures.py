"""The pictures of the README and the docs show the data in `results/`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread
from matplotlib.text import Text

from keras_drsl.plotting import LOSS_COLORS, loss_color
from studies import drawing, figures

RESULTS = Path(__file__).parents[2] / "results"


def bars(axes):
    """Return the label and the length of each bar, from top to bottom."""
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return [*zip(labels, [bar.get_width() for bar in axes.patches], strict=True)]


@pytest.mark.slow
def test_main_draws_opaque_pictures(tmp_path):
    figures.main(["--results", str(RESULTS), "--out", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == {*figures.FIGURES, "report_waterfall"}
    for path in tmp_path.iterdir():
        pixels = imread(path)
        assert pixels.shape[1] == 960
        assert pixels[..., 3].min() == 1
        np.testing.assert_array_equal(pixels[0, 0], 1)


@pytest.mark.parametrize("draw", [pytest.param(draw, id=name) for name, draw in figures.FIGURES.items()])
def test_texts_hold_no_code_names(draw):
    figure = draw(RESULTS)
    ticks = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    for text in [*figure.findobj(Text), *ticks]:
        math_free = re.sub(r"\$.*\$", "", text.get_text())
        assert not re.search(r"_|L-?inf|\bce\b|\bdrs\b", math_free), text.get_text()


def test_bars_are_the_means_of_the_table():
    with_noise, without = figures.FIGURES["compare_losses_digits"](RESULTS).axes
    table = re.findall(r"\| ([\d.]+)\*? \| 5 \|.*?\*\*([\d.]+)", (RESULTS / "compare_losses_digits.md").read_text())
    for axes, noisy in ((with_noise, True), (without, False)):
        means = [mean for noise, mean in table if (float(noise) > 0) == noisy]
        assert [f"{width:.1f}" for _, width in bars(axes)] == sorted(means, key=float, reverse=True)


def test_bars_are_the_means_of_the_records():
    lines = [json.loads(line) for line in (RESULTS / "robust_accuracy_mnist.jsonl").read_text().splitlines()]
    of_bar = [run["robust"] for run in lines if (run["method"], run["loss"]) == ("fgsm", "ce")]
    (axes,) = figures.FIGURES["robust_accuracy_mnist"](RESULTS).axes
    (place,) = (place for place, (label, _) in enumerate(bars(axes)) if label == "FGSM")
    assert bars(axes)[place][1] == pytest.approx(100 * np.mean(of_bar))
    (dots,) = (line for line in axes.lines if line.get_ydata()[0] == place)
    np.testing.assert_allclose(dots.get_xdata(), np.multiply(100, of_bar))


def test_curve_holds_the_points_of_the_record():
    record = json.loads((RESULTS / "fit_digits.json").read_text())
    (axes,) = figures.FIGURES["fit_digits_curves"](RESULTS).axes
    for row, line in zip(record["rows"], axes.lines, strict=True):
        eps, accuracy = zip(*row["runs"][0]["curve"], strict=True)
        np.testing.assert_allclose(line.get_xdata(), eps)
        np.testing.assert_allclose(line.get_ydata(), np.multiply(100, accuracy))


def test_times_are_those_of_the_benchmark():
    record = json.loads((RESULTS / "loss_speed_jax_cpu.json").read_text())
    target = next(target for target in record["targets"] if target["name"].endswith("XLA, 256 x 1000"))
    (axes,) = figures.FIGURES["loss_speed_jax"](RESULTS).axes
    place = [label.get_text() for label in axes.get_yticklabels()].index("256 x 1,000")
    line = next(line for line in axes.lines if line.get_label() == "DRSLoss")
    assert line.get_xdata()[place] == pytest.approx(target["value"])


def test_each_loss_has_its_own_colour():
    assert len({*LOSS_COLORS.values()}) == len(LOSS_COLORS)
    assert all(loss_color(f"{name}, lam 0.3") == color for name, color in LOSS_COLORS.items())


def test_every_loss_of_the_studies_has_a_colour():
    for names in (drawing.FIT_LOSSES, drawing.TRAINED_LOSSES, drawing.COMPARED_LOSSES, drawing.DIVERSITY_LOSSES):
        assert all(loss_color(name) in LOSS_COLORS.values() for name in names.values())


def test_two_figures_draw_a_loss_in_one_colour():
    with_noise, _ = figures.FIGURES["compare_losses_digits"](RESULTS).axes
    (curves,) = figures.FIGURES["fit_digits_curves"](RESULTS).axes
    bar = with_noise.patches[[label for label, _ in bars(with_noise)].index("DRSLoss")]
    line = next(line for line in curves.lines if line.get_label() == "DRSLoss")
    np.testing.assert_allclose(bar.get_facecolor()[:3], np.array(tuple(bytes.fromhex(line.get_color()[1:]))) / 255)


@pytest.mark.parametrize(
    ("eps", "label"), [(0.15, "0.15"), (0.2, "0.2"), (8 / 255, "8/255"), (2 / 255, "2/255"), (1.0, "1")]
)
def test_eps_is_written_as_readers_write_it(eps, label):
    assert drawing.eps_label(eps) == label
