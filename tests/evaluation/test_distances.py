"""The smallest perturbation of each example, on models whose distances are known."""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import MinimalDistances, minimal_distances
from keras_drsl._intervals import median_ranks
from keras_drsl.attacks import APGD, PGD
from keras_drsl.attacks.base import Batch
from keras_drsl.evaluation.distances import PRECISION
from keras_drsl.models import Classifier
from tests.helpers import some_short
from tests.layers import Random
from tests.linear import UNIT, WEIGHTS, distance, inputs, linear_model, unit_inputs

QUIET = {"steps": 30, "verbose": 0}


def found_distances(*values):
    return MinimalDistances(values, np.zeros((len(values), 2)), range(len(values)), {"norm": "inf", "seed": 0})


@pytest.mark.parametrize("norm", some_short(["inf", 2, 1], more=[2, 1]))
def test_distances_are_exact_on_a_linear_model(norm):
    x, y = inputs(60)
    found = minimal_distances(linear_model(), x, y, norm=norm, **QUIET)
    exact = distance(x, y, norm)
    # Beyond 0.25 an input may come to the end of the range, and then needs more.
    inside = exact < 0.25
    assert inside.sum() > 30
    ratio = found.distances / exact
    assert ratio.min() > 1 - 1e-4
    assert ratio[inside].max() < 1 + 1.5 * PRECISION
    z = found.x_adv.astype("float64") @ WEIGHTS
    assert (np.where(np.eye(3)[y], -np.inf, z).max(1) - z[np.arange(60), y] > -1e-6).all()
    delta = np.abs(found.x_adv.astype("float64") - x)
    sizes = {"inf": delta.max(1), 2: np.sqrt((delta**2).sum(1)), 1: delta.sum(1)}
    np.testing.assert_allclose(found.distances, sizes[norm], rtol=1e-6)
    assert found.x_adv.min() >= 0
    assert found.x_adv.max() <= 1
    assert found.index == list(range(60))


def test_distances_have_the_units_of_the_inputs():
    x, y = inputs(30)
    unit = minimal_distances(linear_model(), x, y, **QUIET)
    in_pixels = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), linear_model()])
    scaled = minimal_distances(in_pixels, 255 * x, y, clip_max=255, **QUIET)
    np.testing.assert_allclose(scaled.distances, 255 * unit.distances, rtol=2 * PRECISION)
    masked = minimal_distances(linear_model(), x, y, mask=[True, False, False, False], **QUIET)
    np.testing.assert_array_equal(masked.x_adv[:, 0], x[:, 0])
    assert (masked.distances > unit.distances).all()


@pytest.mark.short
def test_wrong_examples_have_distance_0_and_lost_searches_infinity():
    x, y = inputs(40)
    y = np.where(np.arange(40) < 4, (y + 1) % 3, y)
    found = minimal_distances(linear_model(), x, y, **QUIET)
    np.testing.assert_array_equal(np.flatnonzero(found.distances == 0), range(4))
    np.testing.assert_array_equal(found.x_adv[:4], x[:4])
    assert found.curve([0]).accuracy == [0.9]
    # A model that answers the first class everywhere.
    constant = linear_model(WEIGHTS * 0, keras.layers.Dense(3, kernel_initializer="zeros", bias_initializer="zeros"))
    constant.layers[-1].set_weights([np.zeros((3, 3)), np.array([1.0, 0.0, 0.0])])
    found = minimal_distances(constant, x, np.zeros(40, int), **QUIET)
    assert np.isinf(found.distances).all()
    np.testing.assert_array_equal(found.x_adv, x)
    assert found.median == math.inf
    assert found.curve([0, 1]).accuracy == [1, 1]
    assert "none found        40 examples" in str(found)


def test_a_model_without_gradients_falls_on_the_way_to_other_images():
    class Steps(keras.layers.Layer):
        def call(self, x):
            return ops.round(x * 64) / 64

    x, y = inputs(40)
    model = keras.Sequential([keras.Input((4,)), Steps(), linear_model()])
    y = ops.convert_to_numpy(model(x)).argmax(1)
    found = minimal_distances(model, x, y, **QUIET)
    assert np.isfinite(found.distances).all()
    # The way to the nearest image of another class, in L2, is longer than that to the boundary.
    lengths = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) + 10.0 * (y[:, None] == y[None])
    ways = np.abs(x - x[lengths.argmin(1)]).max(1)
    assert (found.distances < ways).all()
    assert np.median(found.distances / ways) < 0.75
    assert (ops.convert_to_numpy(model(found.x_adv)).argmax(1) != y).all()


def test_the_curve_counts_larger_distances():
    found = found_distances(0.0, 0.1, 0.1, 0.3, math.inf)
    curve = found.curve([0, 0.05, 0.1, 0.2, 0.3, 1])
    assert curve.accuracy == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert str(curve).startswith("Each accuracy is an upper bound, of suite minimal distances.")
    whole = found.curve()
    assert (whole.eps[0], whole.eps[-1], len(whole.eps)) == (0, 0.3, 50)
    assert whole.accuracy == sorted(whole.accuracy, reverse=True)
    assert found_distances(math.inf).curve().accuracy == [1.0] * 50
    for wrong in ([], [0.2, 0.1], [0.1, 0.1], [-1], ["a"]):
        with pytest.raises(ValueError, match="`eps` must"):
            found.curve(wrong)


def test_the_median_has_the_interval_of_its_ranks():
    assert found_distances(0.1, 0.4, 0.2).median == 0.2
    assert found_distances(0.1, 0.4, 0.2, math.inf).median == pytest.approx(0.3)
    assert found_distances(0.1, math.inf).median == math.inf
    assert found_distances(0.1, 0.2).median_interval == (0.0, math.inf)
    stats = pytest.importorskip("scipy.stats")
    for count in (6, 7, 30, 101):
        distances = np.random.default_rng(count).exponential(size=count)
        expected = stats.quantile_test(distances).confidence_interval(0.95)
        found = found_distances(*distances).median_interval
        # That of the library is open at one side where the test is; both have 95 % at least.
        low, high = median_ranks(count)
        assert stats.binom.cdf(high - 1, count, 0.5) - stats.binom.cdf(low - 1, count, 0.5) >= 0.95
        assert found == pytest.approx((expected.low, expected.high))


def test_labels_have_the_distance_of_the_nearest():
    x, _ = inputs(30)
    kernel = np.array([[1.0, 0.2], [0.3, -1.0], [-0.5, 0.4], [0.1, 0.6]])
    dense = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((4,)), dense])
    dense.set_weights([kernel, -0.5 * kernel.sum(0)])
    z = (x - 0.5) @ kernel
    found = minimal_distances(model, x, (z > 0).astype(int), task="multilabel", **QUIET)
    exact = np.abs(z) / np.abs(kernel).sum(0)
    np.testing.assert_allclose(found.distances, exact.min(1), rtol=1.5 * PRECISION)
    assert found.x_adv.shape == (30, 4)
    first = minimal_distances(model, x, (z > 0).astype(int), task="multilabel", which=0, **QUIET)
    np.testing.assert_allclose(first.distances, exact[:, 0], rtol=1.5 * PRECISION)
    assert first.index == list(range(30))


def test_one_unit_and_one_of_several_inputs_are_measured():
    x, y, exact = unit_inputs(30)
    image, other = keras.Input((4,), name="image"), keras.Input((2,), name="other")
    dense = keras.layers.Dense(1)
    model = keras.Model({"image": image, "other": other}, dense(keras.layers.Concatenate()([image, other])))
    dense.set_weights([np.concatenate([UNIT, [0, 0]])[:, None], np.array([-0.5 * UNIT.sum()])])
    both = {"image": x, "other": np.full((30, 2), 9.0, "float32")}
    found = minimal_distances(model, both, y, attack_input="image", from_logits=True, max_samples=20, **QUIET)
    assert len(found.distances) == 20
    np.testing.assert_allclose(found.distances, exact[found.index], rtol=1.5 * PRECISION)
    assert found.x_adv.shape == (20, 4)


def test_results_are_written(tmp_path):
    found = found_distances(0.0, 0.5, math.inf)
    found.to_json(tmp_path / "distances.json")
    content = json.loads((tmp_path / "distances.json").read_text())
    assert content["distances"] == [0.0, 0.5, None]
    assert content["index"] == [0, 1, 2]
    with pytest.raises(ValueError, match="which exists"):
        found.to_json(tmp_path / "distances.json", overwrite=False)


def test_random_models_are_refused():
    model = keras.Sequential([keras.Input((4,)), Random(0.5), linear_model()])
    with pytest.raises(ValueError, match="`model` must give the same answer twice"):
        minimal_distances(model, *inputs(20), **QUIET)


def test_images_of_every_class_are_tried():
    # Twelve classes, of which only that of the smallest logit has images; every gradient is 0.
    class Steps(keras.layers.Layer):
        def call(self, x):
            return ops.floor(x * 2) / 2

    dense = keras.layers.Dense(12)
    model = keras.Sequential([keras.Input((1,)), Steps(), dense])
    kernel, bias = np.zeros((1, 12)), np.zeros(12)
    kernel[0, 11], bias[:11], bias[11] = 40.0, np.arange(11, 0, -1), -5.0
    dense.set_weights([kernel, bias])
    x = np.array([[0.1], [0.2], [0.8]], "float32")
    found = minimal_distances(model, x, np.array([0, 0, 11]), **QUIET)
    np.testing.assert_allclose(found.distances[:2], [0.4, 0.3], atol=2e-3)


def test_other_attacks_refuse_radii_of_rows():
    x, y = inputs(4)
    classifier = Classifier(linear_model())
    batch = Batch(x, y, np.arange(4), classifier.logits(x), np.zeros(4, int), np.arange(4), radius=np.ones(4))
    with pytest.raises(ValueError, match="`all_rows` must have no radii for pgd_ce, which has one"):
        PGD(0.1).run_all(classifier, batch, 4)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"norm": 3}, "`norm` must be one of 'inf', 2, 1. Received: norm=3"),
        ({"steps": 0}, "`steps` must be an integer of 1 or more. Received: steps=0"),
        ({"task": "positions"}, "`task` must be one of 'multiclass', 'multilabel'. Received: task='positions'"),
        ({"clip_min": 1.0}, "`clip_min` must be below `clip_max`"),
        ({"clip_max": 0.5}, "`x_or_dataset` must lie in"),
        ({"batch_size": 0}, "`batch_size` must be an integer of 1 or more"),
        ({"seed": -1}, "`seed` must be an integer of 0 or more"),
    ],
)
def test_wrong_arguments_are_named(options, rule):
    with pytest.raises(ValueError, match=rule):
        minimal_distances(linear_model(), *inputs(4), **{"verbose": 0} | options)


@pytest.mark.parametrize("norm", some_short(["inf", 2, 1], "inf", more=[2, 1]))
def test_rows_may_have_radii_of_their_own(norm):
    x, y = inputs(40)
    classifier = Classifier(linear_model())
    radii = np.where(np.arange(40) % 2, 0.1, 0.02)
    for attack in (APGD(0.2, norm=norm, steps=10), APGD(0.2, norm=norm, steps=10, loss="margin", targeted=True)):
        batch = Batch(
            x, y.astype("int32"), np.arange(40), classifier.logits(x), np.zeros(40, int), np.arange(40), radius=radii
        )
        sizes = attack.threat.size(attack.run_all(classifier, batch, 40).astype("float64") - x)
        assert (sizes <= radii * (1 + 1e-5) + 1e-6).all()
        broken = classifier.logits(attack.run_all(classifier, batch, 40)).argmax(1) != y
        clear = np.abs(distance(x, y, norm) - radii) > 2e-3
        assert (broken <= (distance(x, y, norm) < radii + 1e-4)).all()
        if attack.targeted:
            np.testing.assert_array_equal(broken[clear], (distance(x, y, norm) < radii)[clear])
        # Searches that begin at a point far away begin at the nearest one of their ball.
        started = attack.run_all(classifier, batch._replace(start=np.ones_like(x)), 40)
        assert (attack.threat.size(started.astype("float64") - x) <= radii * (1 + 1e-5) + 1e-6).all()
