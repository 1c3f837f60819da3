"""An evaluation may end early, with an interval that is valid wherever it ends."""

from typing import ClassVar

import numpy as np
import pytest

from keras_drsl import RobustnessReport, compare, evaluate_robustness
from keras_drsl._intervals import confidence_sequence, wilson
from keras_drsl.attacks import Attack
from keras_drsl.evaluation import Outcome, check
from tests.linear import exact_robust, inputs, linear_model

COUNT = 400
EPS = 0.1


class Exact(Attack):
    """Step by eps straight to the nearest other class of the linear model."""

    num_batches: ClassVar[int] = 0
    interrupted_at: ClassVar[int | None] = None

    def run(self, classifier, batch):
        if Exact.num_batches == Exact.interrupted_at:
            raise KeyboardInterrupt
        Exact.num_batches += 1
        weights = np.asarray(linear_model().layers[0].kernel)
        logits = batch.logits.astype("float64")
        gradients = weights.T[None] - weights.T[batch.y][:, None]
        margins = (logits[np.arange(len(logits)), batch.y][:, None] - logits) / np.maximum(
            np.abs(gradients).sum(-1), 1e-9
        )
        margins[np.arange(len(logits)), batch.y] = np.inf
        nearest = gradients[np.arange(len(logits)), margins.argmin(1)]
        return (batch.x + self.threat.radius * np.sign(nearest)).astype("float32")


def evaluate(**options):
    x, y = inputs(COUNT)
    options = {"eps": EPS, "attacks": [Exact(EPS)], "checks": [], "verbose": 0} | options
    return evaluate_robustness(linear_model(), x, y, **options)


@pytest.mark.parametrize("count", [1, 5, 100, 10_000])
def test_sequence_of_no_successes_has_a_closed_form(count):
    # (count + 1) (1 - p)^count is the density of the posterior.
    high = 1 - (0.05 / (count + 1)) ** (1 / count)
    np.testing.assert_allclose(confidence_sequence(0, count), (0, high), atol=1e-9)
    np.testing.assert_allclose(confidence_sequence(count, count), (1 - high, 1), atol=1e-9)


@pytest.mark.parametrize(("successes", "count"), [(1, 2), (7, 30), (30, 100), (999, 1000)])
def test_limits_of_a_sequence_have_the_least_likelihood(successes, count):
    from scipy.stats import beta

    limits = confidence_sequence(successes, count)
    density = beta(successes + 1, count - successes + 1).pdf(limits)
    np.testing.assert_allclose(density, 0.05, rtol=1e-4)
    assert limits[0] < wilson(successes, count)[0]
    assert limits[1] > wilson(successes, count)[1]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_sequence_is_valid_at_all_looks_at_once(share):
    rng = np.random.default_rng(0)
    looks = np.arange(8, 257, 8)
    misses = {confidence_sequence: 0, wilson: 0}
    for _ in range(300):
        successes = np.cumsum(rng.random(256) < share)
        for interval in misses:
            limits = [interval(int(successes[count - 1]), int(count)) for count in looks]
            misses[interval] += any(not low <= share <= high for low, high in limits)
    assert misses[confidence_sequence] <= 0.05 * 300
    assert misses[wilson] > 0.1 * 300


@pytest.mark.short
def test_ends_when_the_threshold_is_decided():
    x, y = inputs(COUNT)
    share = exact_robust(x, y, EPS, "inf").mean()
    assert 0.3 < share < 0.9
    for at_least, answer in ((share - 0.25, "yes"), (min(share + 0.25, 1), "no")):
        report = evaluate(at_least=at_least)
        low, high = report.confidence_interval
        assert report.stopped_early
        assert report.num_examples < COUNT
        assert (low >= at_least) == (answer == "yes") == (high >= at_least)
        assert f"at least {at_least:.1%}".ljust(17) + answer in str(report)
        assert f"stopped early    after {report.num_examples} of {COUNT} examples" in str(report)
    undecided = evaluate(at_least=float(share))
    assert not undecided.stopped_early
    assert undecided.num_examples == COUNT
    assert "undecided" in str(undecided)
    assert "stopped early" not in str(undecided)


def test_ends_at_the_precision():
    report = evaluate(precision=0.12)
    robust = round(report.robust_accuracy * report.num_examples)
    low, high = report.confidence_interval
    assert (low, high) == confidence_sequence(robust, report.num_examples)
    assert max(report.robust_accuracy - low, high - report.robust_accuracy) <= 0.12
    assert 64 <= report.num_examples < COUNT
    both = evaluate(precision=0.12, at_least=0.01)
    assert both.per_example == report.per_example


def test_verdicts_are_those_of_a_full_evaluation():
    x, y = inputs(COUNT)
    report = evaluate(precision=0.15, suite="quick", attacks=None, checks=None)
    full = evaluate(suite="quick", attacks=None, checks=None)
    by_index = dict(zip(full.per_example["index"], full.per_example["broken_by"], strict=True))
    index = np.array(report.per_example["index"])
    assert [by_index[i] for i in index] == report.per_example["broken_by"]
    np.testing.assert_array_equal(
        [by is None for by in report.per_example["broken_by"]], exact_robust(x[index], y[index], EPS, "inf")
    )
    # A random choice, not the first ones.
    assert index.max() > 0.8 * COUNT
    assert sum(record["tried"] for record in report.accuracy.values()) >= len(index)


def test_another_seed_chooses_other_examples():
    first, second = (evaluate(precision=0.15, seed=seed).per_example["index"] for seed in (0, 1))
    assert first != second


def test_continues_after_an_interruption(tmp_path, monkeypatch):
    path = tmp_path / "eval.state"
    options = {"precision": 0.12, "checks": ["noise"]}
    whole = evaluate(**options)
    needed = whole.num_examples / 64
    assert needed >= 2
    monkeypatch.setattr(Exact, "num_batches", 0)
    monkeypatch.setattr(Exact, "interrupted_at", 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(state_path=path, **options)
    Exact.interrupted_at = None
    assert evaluate(state_path=path, **options).per_example == whole.per_example
    assert Exact.num_batches == needed
    assert evaluate(state_path=path, **options).per_example == whole.per_example
    assert Exact.num_batches == needed


def test_the_size_of_batches_changes_nothing():
    small, large = (evaluate(precision=0.12, batch_size=size) for size in (24, 256))
    assert small.per_example == large.per_example


def test_checks_see_what_was_attacked_and_do_not_move_the_end(tmp_path):
    seen = []

    @check()
    def breaks_some(context):
        seen.append((len(context.x), len(context.logits), len(context.broken_by)))
        assert "left out" not in context.broken_by
        return Outcome("pass", 0.0, "breaks some", broken=context.robust.ids[:40].tolist())

    path = tmp_path / "eval.state"
    options = {"precision": 0.15, "checks": [breaks_some], "state_path": path}
    report = evaluate(**options)
    count = report.num_examples
    assert count < COUNT
    assert seen == [(count, count, count)]
    assert report.per_example["broken_by"].count("check:breaks_some") == 40
    assert evaluate(**options).per_example == report.per_example
    assert len(seen) == 1


def test_reports_that_could_end_early_are_not_compared():
    report = evaluate(precision=0.15)
    with pytest.raises(ValueError, match="Received: one that could end early"):
        compare(report, report)


def test_keeps_and_saves_what_was_attacked(tmp_path):
    report = evaluate(precision=0.15, keep_examples=True)
    assert report.x_adv.shape == (report.num_examples, 4)
    np.testing.assert_array_equal(report.x, inputs(COUNT)[0][report.per_example["index"]])
    report.to_json(tmp_path / "report.json")
    read = RobustnessReport.from_json(tmp_path / "report.json")
    assert read.stopped_early
    assert read.confidence_interval == report.confidence_interval
    with pytest.raises(ValueError, match="Received: one that could end early"):
        RobustnessReport.merge([read, read])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": 0}, r"`precision` must be a number in \(0, 0.5\). Received: precision=0"),
        ({"precision": 0.5}, "`precision` must be a number"),
        ({"precision": "5 %"}, "`precision` must be a number"),
        ({"at_least": 1.5}, r"`at_least` must be a number in \(0, 1\]. Received: at_least=1.5"),
        ({"at_least": 0}, "`at_least` must be a number"),
        ({"precision": 0.1, "shard": (0, 2)}, "`shard` cannot be combined with `precision`"),
        ({"at_least": 0.5, "workers": "processes:2"}, "`workers` cannot be combined with `at_least`"),
        ({"at_least": 0.5, "task": "multilabel"}, "`task` cannot be combined with `at_least`"),
        ({"precision": 0.001}, r"`precision` must be at least 0.0222 for 400 examples"),
    ],
)
def test_refuses_what_cannot_end_early(options, message, tmp_path):
    path = tmp_path / "eval.state"
    with pytest.raises(ValueError, match=message):
        evaluate(state_path=path, **options)
    assert not path.exists()
