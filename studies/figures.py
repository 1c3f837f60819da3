"""Draw every picture of the README and the docs from the files in `results/`. Nothing is trained.

python -m studies.figures --results results --out docs/images
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.measure import ratio
from keras_drsl.evaluation import RobustnessReport
from keras_drsl.plotting import loss_color, new_figure, norm_label
from studies.drawing import (
    BACKENDS,
    BARS_LABEL,
    COMPARED_LOSSES,
    DATASETS,
    DIVERSITY_LOSSES,
    FIT_LOSSES,
    SMALL,
    TIMED_LOSSES,
    TRAINED_LOSSES,
    Bar,
    add_color_legend,
    add_legend,
    count_seeds,
    diversity_marker,
    draw_bars,
    eps_label,
    method_label,
    set_title,
)

Record = dict[str, Any]
CHOICE_ATTACKS = ["apgd_ce", "apgd_t_margin"]  # of the runs that chose settings on validation images
DIVERSITY = "variance, log space"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the JSON and JSONL files")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(args.results).savefig(args.out / f"{name}.png", dpi=150)
    report = RobustnessReport.from_json(args.results / "robustness_digits_drs_noise0_eps0.15.json")
    report.plot(args.out / "report_waterfall.png", overwrite=True)
    print(f"Written: {len(FIGURES) + 1} pictures in {args.out}")


def fit_curves(results: Path, *, dataset: str) -> Any:
    """Draw worst-case accuracy against eps for both losses, with and without noise."""
    record = _read_json(results / f"fit_{dataset}.json")
    figure, axes = new_figure()
    for row in record["rows"]:
        eps, accuracy = zip(*row["runs"][0]["curve"], strict=True)
        axes.plot(eps, np.multiply(100, accuracy), **_line_style(row))
    axes.set(xlabel=f"eps ({norm_label('inf')})", ylabel="worst-case accuracy (%)", ylim=(0, 101))
    axes.set_xticks(eps, [f"{value:.3g}" for value in eps])
    set_title(axes, f"{_about_fit(record)}, worst of three attacks")
    add_legend(figure)
    return figure


def fit_rivals(results: Path, *, dataset: str) -> Any:
    """Draw the sorted log-softmax values of the wrong classes for both losses, with and without noise."""
    record = _read_json(results / f"fit_{dataset}.json")
    figure, axes = new_figure()
    for row in record["rows"]:
        values = row["runs"][0]["rivals"]
        axes.plot(range(1, len(values) + 1), values, **_line_style(row))
    axes.set(xlabel="wrong classes of an image, the likeliest first", ylabel="mean log-softmax value")
    axes.set_xticks(range(1, len(values) + 1))
    set_title(axes, f"{_about_fit(record)}, no attack")
    add_legend(figure)
    return figure


def _about_fit(record: Record) -> str:
    settings = record["settings"]
    return f"{DATASETS[settings['dataset']]}, {settings['attacked_images']:,} test images, one seed"


def _line_style(row: Record) -> Record:
    name = FIT_LOSSES[row["loss"]]
    style = {"color": loss_color(name), "marker": "o"}
    if row["noise"]:
        return style | {"label": f"{name}, training noise {row['noise']:g}", "ls": "-"}
    return style | {"label": name, "ls": "--", "mfc": "white"}


def compare_losses(results: Path, *, dataset: str) -> Any:
    """Draw the robust accuracy of all losses at the largest eps: a panel with noise, and one without.

    The panel without noise becomes a sentence if nothing is left to draw.
    """
    records = _read_lines(results / f"compare_losses_{dataset}.jsonl")
    eps = f"{records[0]['study']['eps'][-1]:g}"
    panels: dict[bool, list[Bar]] = {True: [], False: []}
    tested = chosen_runs(records, eps)
    for (loss, noisy), runs in tested.items():
        label = COMPARED_LOSSES[loss]
        panels[noisy].append((label, loss_color(label), [100 * run["robust"][eps] for run in runs]))
    best_without_noise = max(fmean(values) for _, _, values in panels[False])
    seeds = {len(runs) for runs in tested.values()}
    images = next(iter(tested.values()))[0]["images"]
    about = f"{DATASETS[dataset]}, {norm_label('inf')}, eps {eps}, {images} test images, {count_seeds(seeds)}"
    if best_without_noise < 1:
        figure, axes = new_figure(height=4.6)
        draw_bars(axes, panels[True])
        set_title(axes, f"{about}\nwith noise on the inputs (without noise: {best_without_noise:.1f} % or less)")
        drawn = [axes]
    else:
        figure, drawn = new_figure(height=7.6, rows=2)
        drawn[0].get_gridspec().set_height_ratios([len(panels[True]), len(panels[False])])
        for axes, noisy in zip(drawn, panels, strict=True):
            draw_bars(axes, panels[noisy])
        set_title(drawn[0], f"{about}\nwith noise on the inputs")
        set_title(drawn[1], "without noise")
        drawn[1].set_xlim(drawn[0].get_xlim())
    drawn[-1].set_xlabel(BARS_LABEL)
    return figure


def chosen_runs(records: Sequence[Record], eps: str) -> dict[tuple[str, bool], list[Record]]:
    """Return the test runs of each loss, without and with noise, with the setting that was best on validation images.

    Args:
        records: The records of a comparison of losses.
        eps: The key of the eps at which settings were chosen.
    """
    validation: dict[tuple[str, bool], dict[str, dict[int, float]]] = {}
    tests: dict[str, list[Record]] = {}
    for record in records:
        if record["split"] == "test":
            tests.setdefault(_option(record), []).append(record)
        elif record["attacks"] == CHOICE_ATTACKS:
            options = validation.setdefault((record["loss"], record["noise"] > 0), {})
            options.setdefault(_option(record), {}).setdefault(record["seed"], record["robust"][eps])
    chosen = {}
    for key, options in validation.items():
        # The best few of the first seed were tried with a second. Only these can be chosen.
        most_seeds = max(map(len, options.values()))
        finalists = {option: robust for option, robust in options.items() if len(robust) == most_seeds}
        best = max(round(fmean(robust.values()), 9) for robust in finalists.values())
        # Of settings that are equally good on validation images, the study tested one.
        winners = [option for option, robust in finalists.items() if round(fmean(robust.values()), 9) == best]
        chosen[key] = next(tests[option] for option in winners if option in tests)
    return chosen


def _option(record: Record) -> str:
    return json.dumps([record["loss"], record["setting"], record["noise"]])


def robust_accuracy(results: Path, *, dataset: str) -> Any:
    """Draw the robust accuracy of adversarial training, one bar per training and loss."""
    runs: dict[tuple[str, str], list[float]] = {}
    records = [r for r in _read_lines(results / f"robust_accuracy_{dataset}.jsonl") if r["split"] == "test"]
    for record in records:
        runs.setdefault((record["method"], TRAINED_LOSSES[record["loss"]]), []).append(100 * record["robust"])
    bars = [(method_label(method), loss_color(loss), values) for (method, loss), values in runs.items()]
    figure, axes = new_figure(height=1.6 + 0.27 * len(bars))
    draw_bars(axes, bars)
    axes.set_xlabel(BARS_LABEL)
    evaluation = records[0]["evaluation"]
    seeds = count_seeds({len(values) for values in runs.values()})
    set_title(
        axes,
        f"{DATASETS[dataset]}, {norm_label(evaluation['norm'])}, eps {eps_label(evaluation['eps'])}, "
        f"{records[0]['images']} test images, {seeds}",
    )
    add_color_legend(figure, [loss for loss in TRAINED_LOSSES.values() if any(loss == key[1] for key in runs)])
    return figure


def diversity(results: Path, *, dataset: str) -> Any:
    """Draw single images (eps that misleads against variance), and below them models (accuracy against variance)."""
    record = _read_json(results / f"diversity_{dataset}.json")
    models = record["models"]
    eps = float(re.findall(r"--eps (\S+)", record["command"])[0])
    losses = list(dict.fromkeys(model["loss"] for model in models))
    figure, (upper, lower) = new_figure(height=5.8 + 0.1 * len(losses), rows=2)
    for loss in ("ce", next(loss for loss in reversed(losses) if loss.startswith("drs"))):
        model = next(model for model in models if model["loss"] == loss)
        right = np.array(model["right"])
        label = DIVERSITY_LOSSES[loss]
        upper.plot(
            *(_variance(model)[right], np.array(model["radius"])[right]),
            **{"marker": ".", "ls": "", "ms": 5, "alpha": 0.6, "color": loss_color(label), "label": label},
        )
    for loss in losses:
        of_loss = [model for model in models if model["loss"] == loss]
        variances = [_variance(model)[np.array(model["right"])].mean() for model in of_loss]
        label = DIVERSITY_LOSSES[loss]
        lower.plot(variances, [100 * model["robust"] for model in of_loss], **diversity_marker(label), label=label)
    upper.set(xscale="log", xlabel="variance of the log-softmax values of the wrong classes")
    upper.set_ylabel("smallest eps that misleads")
    lower.set(
        xscale="log", xlabel="the same, mean over the images", ylabel=f"robust accuracy (%), eps {eps_label(eps)}"
    )
    lower.set_ylim(0, 112 * max(model["robust"] for model in models))
    images, seeds = len(models[0]["right"]), len(models) // len(losses)
    set_title(upper, f"{DATASETS[dataset]}, {norm_label('inf')}, seed 0: each dot is a correctly classified test image")
    set_title(lower, f"each dot is a model: {len(losses)} losses, {count_seeds({seeds})}, {images} test images")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "fontsize": SMALL, "frameon": False}
    upper.legend(**below, ncols=2, markerscale=2)
    lower.legend(**below, ncols=2 if len(losses) > 3 else 3)
    return figure


def _variance(model: Record) -> np.ndarray:
    # Scores are stored with the sign that makes larger values predict more robustness.
    return -np.array(model["scores"][DIVERSITY])


def loss_speed(results: Path, *, backend: str) -> Any:
    """Draw the time of value and gradient over that of cross-entropy, one row per size."""
    record = _read_json(results / f"loss_speed_{backend}_cpu.json")
    rows = sorted(record["rows"], key=lambda row: (row["batch"] * row["classes"], row["classes"]))
    series = [(label, name) for name, label in TIMED_LOSSES.items() if name in rows[0]["seconds"]]
    figure, axes = new_figure(height=5.4)
    for place, (label, name) in enumerate(series):
        heights = np.arange(len(rows)) + 0.18 * (place - (len(series) - 1) / 2)
        base = "cross_entropy_xla" if name.endswith("xla") else "cross_entropy"
        ratios = [ratio(row["seconds"][name], row["seconds"][base]) for row in rows]
        lows, highs = zip(*[found["spread"] for found in ratios], strict=True)
        color = loss_color(label)
        filled = {"mfc": color if name.endswith("xla") else "white", "ms": 5, "color": color, "ls": "", "marker": "o"}
        axes.hlines(heights, lows, highs, color=color, lw=1)
        label = label if len(series) > 2 else label.removesuffix(", XLA")
        axes.plot([found["ratio"] for found in ratios], heights, **filled, label=label)
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(rows)), [f"{row['batch']:,} x {row['classes']:,}" for row in rows], fontsize=SMALL)
    axes.invert_yaxis()
    axes.set(
        xscale="log", xlabel="time over that of cross-entropy (dot: medians, line: quartiles)", ylabel="batch x classes"
    )
    ticks = (0.25, 0.5, 1, 2, 4)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    set_title(axes, f"{BACKENDS[backend]}, {record['device'].replace('_', '-')}: value and gradient of a loss")
    add_legend(figure, columns=len(series))
    return figure


def _read_json(path: Path) -> Record:
    record: Record = json.loads(path.read_text())
    return record


def _read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


FIGURES: dict[str, Callable[[Path], Any]] = {
    **{f"fit_{name}_curves": partial(fit_curves, dataset=name) for name in ("digits", "mnist")},
    **{f"fit_{name}_rivals": partial(fit_rivals, dataset=name) for name in ("digits", "mnist")},
    **{f"compare_losses_{name}": partial(compare_losses, dataset=name) for name in ("digits", "mnist")},
    **{f"robust_accuracy_{name}": partial(robust_accuracy, dataset=name) for name in DATASETS},
    **{f"diversity_{name}": partial(diversity, dataset=name) for name in DATASETS},
    **{f"loss_speed_{name}": partial(loss_speed, backend=name) for name in BACKENDS},
}


if __name__ == "__main__":
    main()
