import math
import sys

import keras
import numpy as np
import pytest

from keras_drsl.attacks import Batch
from keras_drsl.models import Classifier
from tests.backends import on_tensorflow
from tests.helpers import few_of, some_short
from tests.linear import WEIGHTS, exact_robust, inputs, linear_model

ITERATIVE = ["BasicIterativeMethod", "MadryEtAl", "MomentumIterativeMethod"]

pytestmark = on_tensorflow
cleverhans = pytest.importorskip("keras_drsl.attacks.cleverhans", exc_type=ImportError)


@pytest.fixture(scope="module")
def linear():
    return linear_model(WEIGHTS)


def withstands(model, x_adv, y):
    return model.predict(x_adv, verbose=0).argmax(1) == y


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=[2]))
# With more classes the gradient of the cross-entropy averages over the others, and misses some worst cases.
@pytest.mark.parametrize(
    ("loss", "classes"), [("ce", 2), pytest.param("margin", 2, marks=pytest.mark.more), ("margin", 3)]
)
def test_pgd_is_exact_on_a_linear_model(loss, classes, norm):
    weights = WEIGHTS[:, :classes]
    x, y = inputs(weights=weights)
    model = linear_model(weights)
    expected = exact_robust(x, y, 0.15, norm, weights)
    assert 0.2 < expected.mean() < 0.8
    attack = cleverhans.ProjectedGradientDescent(0.15, loss=loss, norm=norm, steps=30, restarts=3)
    np.testing.assert_array_equal(withstands(model, attack(model, x, y), y), expected)


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=[2]))
def test_fast_gradient_is_no_stronger_than_exact(linear, norm):
    x, y = inputs()
    x_adv = cleverhans.FastGradientMethod(0.15, norm=norm)(linear, x, y)
    withstood = withstands(linear, x_adv, y)
    assert np.all(withstood >= exact_robust(x, y, 0.15, norm))
    assert withstood.mean() < 1


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=[2]))
@pytest.mark.parametrize("attack", some_short(ITERATIVE, more=["MadryEtAl", "MomentumIterativeMethod"]))
def test_iterative_attacks_are_exact_on_two_classes(attack, norm):
    weights = WEIGHTS[:, :2]
    x, y = inputs(weights=weights)
    model = linear_model(weights)
    x_adv = getattr(cleverhans, attack)(0.15, norm=norm, steps=30)(model, x, y)
    np.testing.assert_array_equal(withstands(model, x_adv, y), exact_robust(x, y, 0.15, norm, weights))


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=[2]))
def test_perturbations_stay_in_ball_and_range(linear, norm):
    x, y = inputs()
    x[:10], x[10:20] = 0.0, 1.0
    for attack in (
        cleverhans.FastGradientMethod(0.3, norm=norm),
        cleverhans.ProjectedGradientDescent(0.3, norm=norm, steps=10, restarts=2),
    ):
        x_adv = attack(linear, x, y)
        delta = np.abs(x_adv - x)
        size = delta.max(1) if norm == "inf" else np.sqrt((delta**2).sum(1))
        assert size.max() <= 0.3 + 1e-6
        assert np.all((size > 0) | ~withstands(linear, x, y))
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1


def test_the_true_label_is_attacked(linear):
    x, y = inputs()
    wrong = (y + 1) % 3
    attack = cleverhans.ProjectedGradientDescent(0.01, steps=5)
    assert not withstands(linear, attack(linear, x, wrong), wrong).any()


def test_scaled_logits_do_not_fool_the_margin(linear):
    x, y = inputs()
    huge = linear_model(WEIGHTS * 1e4)
    expected = exact_robust(x, y, 0.15, "inf")
    options = {"steps": 30, "restarts": 3}
    on_ce = cleverhans.ProjectedGradientDescent(0.15, loss="ce", **options)(huge, x, y)
    on_margin = cleverhans.ProjectedGradientDescent(0.15, loss="margin", **options)(huge, x, y)
    assert withstands(huge, on_ce, y).mean() > expected.mean() + 0.1
    np.testing.assert_array_equal(withstands(huge, on_margin, y), expected)


def test_label_forms_agree(linear):
    x, y = inputs(10)
    attack = cleverhans.FastGradientMethod(0.1)
    expected = attack(linear, x, y)
    for labels in (y[:, None], np.eye(3)[y], y.astype("float32")):
        np.testing.assert_array_equal(attack(linear, x, labels), expected)


def test_starts_depend_on_seed_and_example_only():
    class Recorder(Classifier):
        """A classifier whose programs return the starting points."""

        def compile(self, function, **static):
            return lambda x, y, delta: delta

    x, y = inputs(10)

    def starts(seed, rows, ids):
        restart, index = np.zeros(len(ids), int), np.array(ids)
        batch = Batch(x[rows], y[rows], index, np.zeros((len(ids), 3)), restart, index)
        return cleverhans.ProjectedGradientDescent(0.1, seed=seed).run(Recorder(None), batch)

    whole = starts(3, slice(0, 10), range(10))
    np.testing.assert_array_equal(starts(3, slice(4, 6), [4, 5]), whole[4:6])
    assert np.abs(starts(4, slice(0, 10), range(10)) - whole).max() > 1e-3
    assert np.abs(whole).max() > 0.05
    assert np.unique(whole[:, 0]).size == 10


def test_a_step_may_be_as_large_as_eps():
    assert cleverhans.ProjectedGradientDescent(0.1, step_size=0.1).step_size == 0.1
    with pytest.raises(ValueError, match=r"`step_size` must be a number in \(0, eps\] = \(0, 0.1\]"):
        cleverhans.ProjectedGradientDescent(0.1, step_size=0.11)


def test_the_work_of_a_search_is_estimated():
    assert cleverhans.ProjectedGradientDescent(0.1, steps=7).num_evaluations == 21


def test_the_library_starts_at_the_random_points():
    x, y = inputs(60)
    model = linear_model(WEIGHTS / 1e3)  # no start breaks an example
    y = model.predict(x, verbose=0).argmax(1)

    def moved(attack, **options):
        return attack(0.05, steps=1, step_size=1e-6, **options)(model, x, y) - x

    for attack in (cleverhans.ProjectedGradientDescent, cleverhans.MadryEtAl):
        first, second = moved(attack), moved(attack, seed=1)
        assert np.abs(first).max() > 0.04
        assert np.abs(first - second).max() > 0.01
    for attack in (cleverhans.BasicIterativeMethod, cleverhans.MomentumIterativeMethod):
        assert np.abs(moved(attack)).max() < 2e-6


def test_a_model_is_compiled_once(linear):
    x, y = inputs()
    calls = []

    def logits_fn(x):
        calls.append(1)
        return linear(x)

    attack = cleverhans.ProjectedGradientDescent(0.1, steps=3)
    attack(logits_fn, x, y)
    count = len(calls)
    attack(logits_fn, x[:7], y[:7])
    assert len(calls) == count


class NoisyByDefault(keras.layers.Layer):
    def call(self, x, training=True):
        return x + keras.random.normal(keras.ops.shape(x)) if training else x


def test_a_model_is_attacked_as_at_inference():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            NoisyByDefault(),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.9),
            keras.layers.Dense(3),
        ]
    )
    before = model.get_weights()
    x, y = inputs(10)
    attack = cleverhans.FastGradientMethod(0.1)
    np.testing.assert_array_equal(attack(model, x, y), attack(model, x, y))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("loss", "policy"),
    few_of(
        ["ce", "margin"],
        ["mixed_float16", "mixed_bfloat16"],
        keep=[("ce", "mixed_bfloat16"), ("margin", "mixed_float16")],
    ),
)
def test_mixed_precision_can_be_attacked(loss, policy):
    x, y = inputs()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype=policy)])
    model.layers[0].set_weights([WEIGHTS, np.zeros(3)])
    x_adv = cleverhans.ProjectedGradientDescent(0.15, loss=loss, steps=10)(model, x, y)
    assert withstands(model, x_adv, y).mean() < withstands(model, x, y).mean() - 0.2


def test_other_shapes_and_no_inputs_are_taken():
    model = keras.Sequential([keras.layers.Conv2D(3, 3), keras.layers.GlobalAveragePooling2D()])
    attack = cleverhans.FastGradientMethod(0.1, norm=math.inf)
    for size in (4, 6):
        assert attack(model, np.full((2, size, size, 1), 0.5), [0, 1]).shape == (2, size, size, 1)
    assert attack(model, np.zeros((0, 4, 4, 1)), []).shape == (0, 4, 4, 1)


class TestBadInput:
    @pytest.mark.parametrize("label", [-1, 3, 1.5])
    def test_labels_that_are_no_classes_are_named(self, linear, label):
        x, y = inputs(5)
        with pytest.raises(ValueError, match=r"`y` must hold class ids in \[0, 3\). Received: " + str(label)):
            cleverhans.FastGradientMethod(0.1, loss="margin")(linear, x, np.where(np.arange(5) == 2, label, y))

    @pytest.mark.parametrize("eps", [0, -0.1, math.nan, "0.1"])
    def test_eps_must_be_positive(self, eps):
        with pytest.raises(ValueError, match="`eps` must be a positive number. Received: eps="):
            cleverhans.FastGradientMethod(eps)

    @pytest.mark.parametrize(
        ("option", "rule"),
        [
            ({"loss": "dlr"}, "`loss` must be one of 'ce', 'margin'. Received: loss='dlr'"),
            ({"norm": 1}, "`norm` must be 'inf' or 2 for attacks of cleverhans, .* Received: norm=1"),
            ({"steps": 0}, "`steps` must be an integer of 1 or more. Received: steps=0"),
            ({"restarts": 0}, "`restarts` must be an integer of 1 or more. Received: restarts=0"),
            ({"step_size": 0.2}, r"`step_size` must be a number in \(0, eps\] = \(0, 0.1\]. Received: step_size=0.2"),
            ({"clip_min": 1.0}, "`clip_min` must be below `clip_max`. Received: clip_min=1.0, clip_max=1.0"),
        ],
    )
    def test_arguments_are_named(self, option, rule):
        with pytest.raises(ValueError, match=rule):
            cleverhans.ProjectedGradientDescent(0.1, **option)

    def test_inputs_outside_the_range_are_refused(self, linear):
        x, y = inputs(5)
        for bad in (x * 255, np.where(x > 0.5, np.nan, x)):
            with pytest.raises(
                ValueError, match=r"`x` must lie in \[clip_min, clip_max\] = \[0, 1\]. Received: values"
            ):
                cleverhans.FastGradientMethod(0.1)(linear, bad, y)

    def test_probabilities_are_refused(self, linear):
        x, y = inputs(5)
        model = keras.Sequential([linear, keras.layers.Softmax()])
        with pytest.raises(ValueError, match="`logits_fn` must return logits, but its outputs look like probabilities"):
            cleverhans.FastGradientMethod(0.1)(model, x, y)

    def test_labels_must_match_the_inputs(self, linear):
        x, y = inputs(5)
        with pytest.raises(
            ValueError,
            match=r"`y` must hold one label for each input. Received: inputs of shape \(5, 4\), labels of shape \(4,\)",
        ):
            cleverhans.FastGradientMethod(0.1)(linear, x, y[:4])

    @pytest.mark.parametrize("attack", ["BasicIterativeMethod", "MadryEtAl"])
    def test_a_loss_the_library_cannot_take_is_named(self, attack):
        with pytest.raises(ValueError, match="`loss` must be one of 'ce'. Received: loss='margin'"):
            getattr(cleverhans, attack)(0.1, loss="margin")

    def test_a_missing_library_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cleverhans.tf2.attacks.fast_gradient_method", None)
        with pytest.raises(ImportError, match=r"pip install cleverhans"):
            cleverhans.FastGradientMethod(0.1)
