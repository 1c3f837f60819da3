"""The attacks of suite "fast": the order of the classes, what they spend, and what they find."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_drsl import ThreatModel, evaluate_robustness
from keras_drsl.attacks import FastAPGD, FastSquare, Square
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.gradients import rank_targets
from keras_drsl.models import Classifier
from keras_drsl.models.calls import count_calls
from tests.helpers import some_short
from tests.layers import Quantised
from tests.linear import distance, exact_robust, inputs, linear_model

WIDE = np.random.default_rng(3).normal(size=(4, 30)).astype("float32")


def batch_of(classifier, x, y):
    logits, rows = classifier.logits(x), np.arange(len(x))
    return Batch(x, y.astype("int32"), rows, logits, np.zeros(len(x), int), rows)


def withstands(classifier, x_adv, y):
    return classifier.logits(x_adv).argmax(1) == y


@pytest.mark.short
@pytest.mark.parametrize("norm", ["inf", 2, 1])
@pytest.mark.parametrize("mask", [None, [False, True, False, False]])
def test_targets_are_ranked_by_their_distance(norm, mask):
    x, y = inputs(20, WIDE)
    threat = ThreatModel(0.1, norm, mask=mask)
    dual = {"inf": 1, 2: 2, 1: np.inf}[norm]
    weights = WIDE * (np.ones(4) if mask is None else 1.0 - np.array(mask))[:, None]
    classifier = Classifier(linear_model(WIDE))
    found = rank_targets(classifier, batch_of(classifier, x, y), threat, 20)
    assert found.shape == (20, 20)
    for row, label, targets in zip(x, y, found, strict=True):
        margin = row @ (WIDE[:, [label]] - WIDE)
        size = np.linalg.norm(weights[:, [label]] - weights, dual, axis=0)
        size[label] = np.inf
        distances = margin / size
        distances[label] = np.inf
        # The 29 other classes are all compared, as they are fewer than twice 20.
        np.testing.assert_allclose(distances[targets], np.sort(distances)[:20], rtol=1e-4)


@pytest.mark.parametrize("norm", some_short(["inf", 2, 1], *("inf", 1), more=[2]))
def test_fast_apgd_is_exact_on_a_linear_model(norm):
    x, y = inputs(100)
    clear = np.abs(distance(x, y, norm) - 0.15) > 1e-3
    x, y = x[clear], y[clear]
    classifier = Classifier(linear_model())
    expected = exact_robust(x, y, 0.15, norm)
    assert 0.2 < expected.mean() < 0.8
    found = FastAPGD(0.15, norm=norm, patience=1.0)(classifier, x, y)
    np.testing.assert_array_equal(withstands(classifier, found, y), expected)


def test_hopeless_examples_cost_one_short_search():
    x, y = inputs(100)
    far = distance(x, y, "inf") > 0.1
    x, y = x[far], y[far]
    classifier = Classifier(linear_model())
    with count_calls() as calls:
        FastAPGD(0.01)(classifier, x, y)
    # The start, and 20 steps.
    assert calls.gradients == 21 * len(x)


def quantised():
    """Return a model whose gradient is 0 everywhere."""
    return Classifier(keras.Sequential([keras.Input((4,)), Quantised(), *linear_model().layers]))


def test_square_goes_on_only_where_gradients_fail():
    x, y = inputs(60)
    with count_calls() as smooth:
        FastSquare(0.05, queries=1000)(Classifier(linear_model()), x, y)
    assert smooth.queries < 200 * len(x)
    masked = quantised()
    y = masked.logits(x).argmax(1)
    found, expected = (
        withstands(masked, attack(masked, x, y), y)
        for attack in (FastSquare(0.15, queries=1000), Square(0.15, queries=1000))
    )
    assert expected.mean() < 0.8
    assert np.all(found <= expected)


def test_square_goes_on_where_nothing_raises_the_margin():
    x, y = inputs(20)
    flat = quantised()
    y = flat.logits(x).argmax(1)
    with count_calls() as calls:
        FastSquare(1e-4, queries=100)(flat, x, y)
    assert calls.queries >= 100 * len(x)


@pytest.mark.more
def test_the_suite_runs_the_checks_of_standard():
    x, y = inputs(40)
    options = {"eps": 0.1, "verbose": 0}
    fast = evaluate_robustness(linear_model(), x, y, suite="fast", **options)
    standard = evaluate_robustness(linear_model(), x, y, **options)
    assert [check.name for check in fast.checks] == [
        check.name for check in standard.checks if check.name != "few_classes"
    ]
    assert fast.robust_accuracy == standard.robust_accuracy
    assert fast.num_gradients < standard.num_gradients / 2
    assert fast.provenance["pool"] is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastAPGD(0.1, patience=0), r"`patience` must be a number in \(0, 1\]. Received: patience=0"),
        (lambda: FastAPGD(0.1, patience=1.5), "`patience`"),
        (lambda: FastSquare(0.1, queries=9), "`queries`"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_of_positions_have_no_fast_suite():
    model = keras.Sequential([keras.Input((5, 1)), layers.Dense(2)])
    x, y = np.random.default_rng(0).random((6, 5, 1)), np.zeros((6, 5))
    with pytest.raises(ValueError, match="`suite` must be one of quick, standard for a model of positions"):
        evaluate_robustness(model, x, y, eps=0.1, task="positions", suite="fast", verbose=0)
