import contextlib
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import keras_drsl
from keras_drsl import RobustnessReport, cli, compare
from keras_drsl._intervals import exact_mcnemar, paired_difference, paired_mean, welch
from keras_drsl.evaluation import Check
from tests.linear import WEIGHTS, inputs, linear_model

stats = pytest.importorskip("scipy.stats")


NUMBERS = itertools.count()


def report(robust, wrong=(), *, status="pass", data="x", pool="p", model=None, names=("pgd",), steps=3, **settings):
    """Return the report of as many examples as `robust` has letters: r robust, b broken, c wrong without an attack."""
    settings = {
        "eps": 0.1,
        "norm": "inf",
        "clip_min": 0.0,
        "clip_max": 1.0,
        "suite": "standard",
        "shard": None,
    } | settings
    attacks = [{"name": name, "settings": {"steps": steps}, "seconds": 1.0} for name in names]
    broken_by = [{"r": None, "b": names[0], "c": "clean"}[letter] for letter in robust]
    per_example = {"index": [3 * index for index in range(len(robust))], "broken_by": broken_by}
    per_example |= {"wrong": [list(row[1:]) for row in wrong], "positions": [row[0] for row in wrong]} if wrong else {}
    per_example |= {} if wrong else {"label": [0] * len(robust)}
    provenance = {"model": model or f"model {next(NUMBERS)}", "data": data, "pool": {"digest": pool}}
    return RobustnessReport(settings, attacks, [Check("first", status, 0.5, "")], per_example, provenance)


FIRST, SECOND = "rrrrrrbbcc", "rrrbbcrbcc"


@pytest.mark.parametrize(
    ("method", "expected"),
    # 21 children, 1 and 7 discordant: Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), table VII.
    [("Tango", (-0.517, -0.026)), ("Bonett and Price", (-0.508, -0.013))],
)
def test_intervals_are_those_of_the_literature(method, expected):
    if method == "Tango":
        found = paired_difference(1, 7, 21)
    else:
        found = paired_mean(np.array([1] + [-1] * 7 + [0] * 13), np.ones(21))
    assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("first", "second", "count"), [(3, 9, 40), (0, 6, 50), (12, 0, 30), (1, 1, 500), (40, 30, 90)])
def test_the_limits_solve_the_score_equation(first, second, count):
    """Find the most likely shares under each difference on a grid, in place of Tango's formula."""
    for limit, sign in zip(paired_difference(first, second, count), (1, -1), strict=True):
        other = np.linspace(max(0, -limit), (1 - limit) / 2, 2_000_001)[1:-1]
        one = other + limit
        rest = 1 - one - other
        log_likelihood = first * np.log(one) + second * np.log(other) + (count - first - second) * np.log(rest)
        best = log_likelihood.argmax()
        variance = (one[best] + other[best] - limit**2) / count
        score = ((first - second) / count - limit) / math.sqrt(variance)
        assert score == pytest.approx(sign * stats.norm.ppf(0.975), abs=1e-3)
    mirrored = paired_difference(second, first, count)
    assert paired_difference(first, second, count) == pytest.approx((-mirrored[1], -mirrored[0]), abs=1e-9)


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_no_interval_has_width_0(count):
    square = stats.norm.ppf(0.975) ** 2
    limit = square / (count + square)  # the score equation without discordant examples
    assert paired_difference(0, 0, count) == pytest.approx((-limit, limit))
    assert paired_difference(count, 0, count)[0] < 1
    assert paired_difference(count, 0, count)[1] == pytest.approx(1)
    low, high = paired_mean(np.zeros(count), np.ones(count))
    assert low < 0 < high


@pytest.mark.parametrize(("first", "second"), [(0.02, 0.02), (0.10, 0.05), (0.20, 0.10)])
@pytest.mark.parametrize(("count", "least", "most"), [(1000, 0.94, 0.96), (100, 0.935, 0.98)])
def test_19_of_20_intervals_hold_the_difference(count, least, most, first, second):
    rng = np.random.default_rng(0)
    pairs, times = np.unique(
        rng.multinomial(count, [first, second, 1 - first - second], 20_000)[:, :2], axis=0, return_counts=True
    )
    limits = np.array([paired_difference(*map(int, pair), count) for pair in pairs])
    held = (limits[:, 0] <= first - second) & (first - second <= limits[:, 1])
    assert least < times[held].sum() / 20_000 < most
    assert (limits[:, 1] - limits[:, 0]).min() > 0.5 / count


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 7), (7, 1), (5, 5), (0, 12), (900, 1100)])
def test_the_p_value_is_that_of_the_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert exact_mcnemar(first, second) == pytest.approx(expected)


def test_the_interval_over_seeds_is_that_of_welch():
    a, b = np.array([0.50, 0.54, 0.58]), np.array([0.40, 0.46])
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert welch(a, b, step=0.01) == pytest.approx((expected.low, expected.high))
    assert welch(np.array([0.0, 1.0]), np.array([0.0, 1.0]), step=0.01) == (-1, 1)
    # Three values of one multiple of 0.01: those of a uniform distribution of that width, of standard deviation s, with
    # four degrees of freedom.
    s = 0.01 / math.sqrt(12)
    half_width = stats.t.ppf(0.975, 4) * s * math.sqrt(2 / 3)
    found = welch(np.array([0.75] * 3), np.array([0.5] * 3), step=0.01)
    assert found == pytest.approx((0.25 - half_width, 0.25 + half_width))


def test_two_models_are_compared_example_by_example():
    found = compare(report(FIRST), report(SECOND), names=("A", "B"))
    assert (found.robust.first, found.robust.second, found.robust.value) == (0.6, 0.4, pytest.approx(0.2))
    assert (found.clean.first, found.clean.second) == (pytest.approx(0.8), pytest.approx(0.7))
    assert (found.robust.only_first, found.robust.only_second) == (3, 1)
    assert (found.only_first_robust, found.only_second_robust) == ([9, 12, 15], [18])
    assert (found.clean.only_first, found.clean.only_second) == (1, 0)
    assert found.robust.over_images == paired_difference(3, 1, 10)
    assert found.robust.p_value == pytest.approx(stats.binomtest(3, 4).pvalue)
    assert found.robust.over_seeds is None
    text = str(found)
    assert "robust        60.0%    40.0%        +20.0" in text
    assert "robust on one side only: 3 and 1 examples; McNemar's exact test p = 0.62" in text
    assert "first    A\nsecond   B\n" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "over seeds" not in text


def test_several_models_have_an_interval_over_images_and_one_over_seeds():
    found = compare([report(FIRST), report("rrrrrrrrrb"), report(FIRST)], [report(SECOND), report("bbbbbbbbbb")])
    assert found.robust.first == pytest.approx(0.7)
    assert found.robust.second == pytest.approx(0.2)
    assert found.robust.over_seeds == pytest.approx(welch(np.array([0.6, 0.9, 0.6]), np.array([0.4, 0.0]), step=0.1))
    first = np.array([[letter == "r" for letter in word] for word in (FIRST, "rrrrrrrrrb", FIRST)]).mean(0)
    second = np.array([[letter == "r" for letter in word] for word in (SECOND, "bbbbbbbbbb")]).mean(0)
    assert found.robust.over_images == pytest.approx(paired_mean(first - second, np.ones(10)))
    assert (found.robust.only_first, found.robust.p_value) == (None, None)
    assert found.only_first_robust == [0, 3, 6, 9, 12, 15, 21, 24]
    assert "over seeds: for these images, if the 3 and 2 models had been trained again" in str(found)
    assert compare([report(FIRST), report(FIRST)], report(SECOND)).robust.over_seeds is None


def test_positions_are_compared_by_their_shares():
    rows = [(4, 0, 1), (6, 2, 2), (10, 1, 7)], [(4, 1, 4), (6, 0, 3), (10, 2, 6)]
    found = compare(*(report("bbb", wrong, task="positions") for wrong in rows))
    assert (found.robust.first, found.robust.second) == (pytest.approx(10 / 20), pytest.approx(7 / 20))
    assert found.clean.first == pytest.approx(17 / 20)
    assert found.robust.over_images == pytest.approx(paired_mean(np.array([3, 1, -1]), np.array([4, 6, 10])))
    assert found.robust.p_value is None


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        ({"eps": 0.2}, "must have equal settings to be compared. Received: eps 0.1 and 0.2"),
        ({"norm": 2}, "Received: norm 'inf' and 2"),
        ({"clip_max": 255.0}, "Received: clip_max 1.0 and 255.0"),
        ({"suite": "quick"}, "Received: suite 'standard' and 'quick'"),
        ({"task": "multilabel"}, "Received: task None and 'multilabel'"),
        ({"names": ("apgd",)}, "must be of the same attacks to be compared. Received: pgd and apgd"),
        ({"steps": 5}, "must be of the same attacks to be compared. Received: pgd and pgd with other settings"),
        ({"checks": ["noise"]}, "Received: checks None and"),
        ({"data": "y"}, "must be of the same examples to be compared. Received: two of different data"),
        ({"data": None}, "must say what data they are of to be compared. Received: one that does not"),
        ({"pool": "q"}, "attacks that start at the same images .* Received: two of different pools"),
    ],
)
def test_what_cannot_be_compared_names_the_difference(other, rule):
    with pytest.raises(ValueError, match=rule):
        compare(report(FIRST), report(SECOND, **other))
    with pytest.raises(ValueError, match=rule):
        compare([report(FIRST), report(SECOND, **other)], report(SECOND))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="Received: 10 and 9 examples, of which 9 are in both"):
        compare(report(FIRST), report(SECOND[:-1]))
    for wrong in ([], None, "report.json", [report(FIRST), 3]):
        with pytest.raises(
            ValueError, match="`second` must be a RobustnessReport or a list of them. Received: second="
        ):
            compare(report(FIRST), wrong)
    one = report(FIRST)
    with pytest.raises(ValueError, match="`second` must hold reports of different models. Received: two of one model"):
        compare(one, [report(SECOND), one, report(SECOND), one])
    assert compare(one, one).robust.value == 0
    for names in (("A",), ("A", ""), "AB", ("A", 3)):
        with pytest.raises(ValueError, match="`names` must be two texts. Received: names="):
            compare(report(FIRST), report(SECOND), names=names)


def test_doubts_come_first():
    text = str(compare(report(FIRST, suite="quick"), report(SECOND, suite="quick", status="fail")))
    assert text.startswith(
        "NOT TRUSTWORTHY: a check of one of the reports failed.\nThe robust accuracies are upper bounds"
    )
    assert not str(compare(report(FIRST), report(SECOND, status="warn"))).startswith("NOT")


def test_a_comparison_is_written_and_drawn(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    several = compare([report(FIRST), report(FIRST)], [report(SECOND), report(FIRST)])
    several.to_json(tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["robust"]["first"] == 0.6
    assert content["robust"]["over_seeds"] == list(several.robust.over_seeds)
    assert content["only_first_robust"] == several.only_first_robust
    several.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    axes = figures.Figure().subplots()
    assert several.plot(ax=axes) is axes
    drawn = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    expected = [100 * np.array(some) for found in (several.robust, several.clean) for some in found[2:4]]
    for line, limits in zip(drawn, expected, strict=False):
        np.testing.assert_allclose(line, limits)
    for write in (several.to_json, several.plot):
        with pytest.raises(ValueError, match="which exists"):
            write(tmp_path / "found.png", overwrite=False)


def test_the_command_compares_reports(tmp_path, capsys):
    for name, word in {"a": FIRST, "b": SECOND, "c": "bbbbbbbbcc"}.items():
        report(word).to_json(tmp_path / f"{name}.json")
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    files = [str(tmp_path / "found.json"), str(tmp_path / "found.png")]
    assert cli.main(["compare", a, b, "--out", files[0], "--plot", files[1]]) == 0
    expected = str(compare(report(FIRST), report(SECOND), names=("a", "b")))
    assert capsys.readouterr().out.strip() == expected
    assert json.loads((tmp_path / "found.json").read_text())["names"] == ["a", "b"]
    assert cli.main(["compare", a, b, c]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(expected + "\n\nfirst    a\nsecond   c\n")
    assert cli.main(["compare", f"{a},{b}", f"{c},{a}"]) == 0
    assert "first    a, b\nsecond   c, a\n" in capsys.readouterr().out
    report(SECOND, status="fail").to_json(b)
    assert cli.main(["compare", a, b, "--strict"]) == 3
    capsys.readouterr()
    for arguments, reason in (
        ([a], "`sides` must be two, with a space between them. Received: 1"),
        ([a, b, c, "--out", str(tmp_path / "new.json")], "`sides` must be two for --out and --plot, .* Received: 3"),
        ([a, b, "--out", files[0]], "which exists"),
        ([a, b, "--out", b, "--overwrite"], "`sides` and `out` must be different files"),
        ([a, f"{b},nowhere.json"], "`sides` must be a file that exists. Received: 'nowhere.json'"),
        ([a, files[0]], "`path` must be a file written by `RobustnessReport.to_json`"),
    ):
        with contextlib.suppress(SystemExit):
            assert cli.main(["compare", *arguments]) == 2
        assert re.search(reason, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "new.json").exists()


def test_scipy_is_needed_for_several_models_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert compare(report(FIRST), report(SECOND)).robust.p_value < 1
    with pytest.raises(ImportError, match="An interval over several models needs `pip install scipy`"):
        compare([report(FIRST), report(SECOND)], [report(SECOND), report(FIRST), report(FIRST)])


def test_reports_of_evaluations_are_compared():
    x, y = inputs(30)
    reports = [
        keras_drsl.evaluate_robustness(linear_model(weights), x, y, eps=0.05, suite="quick", checks=[], verbose=0)
        for weights in (WEIGHTS, WEIGHTS + np.array([0.0, 0.3, 0.0]))
    ]
    found = compare(*reports)
    robust = [[name is None for name in some.per_example["broken_by"]] for some in reports]
    assert found.robust.only_first == sum(one and not two for one, two in zip(*robust, strict=True)) > 0
    assert found.clean.value > 0.2
    assert found.robust.value == pytest.approx(reports[0].robust_accuracy - reports[1].robust_accuracy)


def test_the_example_of_the_docs_is_what_the_command_prints(capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    page = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"```sh\nkeras-drsl (compare .*?)\n```\n\n```text\n(.*?)\n```", page, re.DOTALL
    ).groups()
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out.strip() == printed
