"""Searches that start at images of the target class."""

import hashlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl.attacks import APGD, PGD, Pool
from keras_drsl.models import Classifier

FEATURES, CLASSES, EPS = 8, 3, 0.2


def in_corner(x):
    """Return logits that only differ near the corner (1, ..., 1) of the valid range: class 1 there, class 0 elsewhere.

    Elsewhere the gradient is zero, and a random point of a ball is hardly ever in its corner.
    """
    inside = ops.cast(ops.min(x, axis=-1) > 0.68, "float32")
    return ops.stack([1 - inside, inside, 0 * inside - 1], axis=-1)


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    x = generator.random((60, FEATURES)).astype("float32")
    return x, generator.integers(0, CLASSES, 60)


@pytest.fixture
def linear():
    weights = np.random.default_rng(1).standard_normal((FEATURES, CLASSES)).astype("float32")
    return Classifier(lambda x: ops.matmul(x - 0.5, weights))


def nearest_by_loops(classifier, pool_x, pool_y, x, target):
    """Return the nearest correct image of the target class of each row, None where there is none."""
    predictions = classifier.logits(pool_x).argmax(axis=1)
    result = []
    for row, wanted in zip(x.astype("float64"), target, strict=True):
        best, best_distance = None, np.inf
        for image, label, prediction in zip(pool_x, pool_y, predictions, strict=True):
            distance = sum((a - b) ** 2 for a, b in zip(row, image.astype("float64"), strict=True))
            if label == prediction == wanted and distance < best_distance:
                best, best_distance = image, distance
        result.append(best)
    return result


def test_nearest_image_equals_a_search_by_loops(linear, images):
    x, target = np.random.default_rng(2).random((20, FEATURES)).astype("float32"), np.arange(20) % CLASSES
    found, has_one = Pool(linear, *images).nearest(x, target)
    for row, expected in zip(found, nearest_by_loops(linear, *images, x, target), strict=True):
        np.testing.assert_array_equal(row, expected)
    assert has_one.all()


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_of_equally_near_images_the_order_does_not_decide(linear, order):
    # Each image and its mirror image have the same distance from the centre.
    half = np.random.default_rng(3).integers(0, 2, (12, FEATURES)).astype("float32")
    x = np.unique(np.concatenate([half, 1 - half]), axis=0)
    centre, target = np.full((CLASSES, FEATURES), 0.5, "float32"), np.arange(CLASSES)
    expected, _ = Pool(linear, x).nearest(centre, target)
    shuffled, _ = Pool(linear, x[order]).nearest(centre, target)
    np.testing.assert_array_equal(shuffled, expected)


def test_of_equally_near_images_the_one_of_the_smallest_digest_is_taken(linear):
    corners = np.array([np.roll([1, 0, 0, 0, 0, 0, 0, 0], shift) for shift in range(FEATURES)], "float32")
    target = int(linear.logits(corners[:1]).argmax())
    alike = corners[linear.logits(corners).argmax(1) == target]
    assert len(alike) > 1
    smallest = min(alike, key=lambda image: hashlib.sha256(image.tobytes()).digest()[:8][::-1])
    found, _ = Pool(linear, corners).nearest(np.zeros((1, FEATURES), "float32"), np.array([target]))
    np.testing.assert_array_equal(found[0], smallest)


def test_the_digest_ignores_the_order_but_not_the_labels(linear, images):
    x, y = images
    order = np.random.default_rng(4).permutation(len(x))
    assert Pool(linear, x[order], y[order]).digest == Pool(linear, x, y).digest
    assert Pool(linear, x, (y + 1) % CLASSES).digest != Pool(linear, x, y).digest
    assert Pool(linear, x[1:], y[1:]).digest != Pool(linear, x, y).digest
    # Images without labels are the same for every model.
    opposite = Classifier(lambda x: -linear(x))
    assert Pool(linear, x).digest == Pool(opposite, x).digest != Pool(linear, x, y).digest


def test_a_class_without_an_image_starts_at_random(linear, images):
    x, y = images
    predictions = linear.logits(x).argmax(axis=1)
    pool = Pool(linear, x[predictions != 2], y[predictions != 2])
    assert pool.empty_classes == [2]
    found, has_one = pool.nearest(x[:4], np.array([2, 0, 2, 1]))
    assert has_one.tolist() == [False, True, False, True]
    np.testing.assert_array_equal(found[[0, 2]], x[[0, 2]])


@pytest.mark.short
@pytest.mark.parametrize("family", [APGD, PGD])
def test_a_rivals_image_leads_where_random_starts_do_not(family):
    classifier = Classifier(in_corner)
    x, y = np.full((5, FEATURES), 0.5, "float32"), np.zeros(5, int)
    pool = Pool(classifier, np.ones((1, FEATURES)), [1])
    attack = family(EPS, loss="margin", targeted=True, steps=5)
    assert (classifier.logits(attack(classifier, x, y)).argmax(1) == 0).all()
    x_adv = attack(classifier, x, y, pool=pool)
    assert (classifier.logits(x_adv).argmax(1) == 1).all()
    np.testing.assert_allclose(x_adv, x + EPS, atol=1e-6)
    np.testing.assert_array_equal(x, 0.5)
    # Another loss, or no target, has no such start.
    for options in ({"loss": "dlr", "targeted": True}, {"loss": "margin"}):
        x_adv = family(EPS, steps=5, **options)(classifier, x, y, pool=pool)
        assert (classifier.logits(x_adv).argmax(1) == 0).all()


class TestInEvaluations:
    """The pool is the whole data set as it was passed, or `x_pool`."""

    @pytest.fixture
    def model(self):
        inputs = keras.Input((FEATURES,))
        return keras.Model(inputs, keras.layers.Lambda(in_corner)(inputs))

    @pytest.fixture
    def data(self):
        # Ten images of class 0, and at the end one of class 1, which the attacks need.
        x = np.concatenate([np.full((10, FEATURES), 0.5), np.ones((1, FEATURES))]).astype("float32")
        x[:10, 0] -= np.linspace(0, 0.01, 10)
        return x, np.array([0] * 10 + [1])

    def evaluate(self, model, *data, **options):
        options = {"eps": EPS, "attacks": ["apgd_t_margin"], "checks": [], "verbose": 0} | options
        return keras_drsl.evaluate_robustness(model, *data, **options)

    @pytest.mark.parametrize("options", [{}, {"max_samples": 10}, {"shard": (0, 3)}, {"batch_size": 2}])
    def test_it_is_the_whole_data_set(self, model, data, options):
        report = self.evaluate(model, *data, **options)
        of_class_0 = [
            by for by, label in zip(*map(report.per_example.get, ("broken_by", "label")), strict=True) if not label
        ]
        assert set(of_class_0) == {"apgd_t_margin"}
        assert report.provenance["pool"]["num_images"] == 11
        assert report.provenance["pool"]["empty_classes"] == [2]

    def test_another_pool_replaces_it(self, model, data):
        x, y = data[0][:10], data[1][:10]
        without = self.evaluate(model, x, y)
        assert without.robust_accuracy == 1
        for pool in (data, data[0], iter([data])):
            report = self.evaluate(model, x, y, x_pool=pool)
            assert report.robust_accuracy == 0
        assert report.provenance["pool"]["digest"] != without.provenance["pool"]["digest"]

    def test_a_curve_has_one_too(self, model, data):
        curve = keras_drsl.robustness_curve(
            model, *data, eps=[0.1, EPS], attacks=["apgd_t_margin"], checks=[], verbose=0
        )
        assert curve.accuracy == [1, 1 / 11]

    @pytest.mark.parametrize(
        ("pool", "message"),
        [
            (np.ones((2, 5)), r"`x_pool` must hold inputs of shape \(8,\). Received: shape \(5,\)"),
            ((np.ones((2, 8)), [1]), "`x_pool` must hold one label for each input. Received: 2 inputs, 1 labels"),
            (7, "`x_pool` must hold inputs, a pair .inputs, labels. or batches of pairs. Received: int"),
            (np.full((2, 8), 2.0), r"`x_pool` must lie in \[clip_min, clip_max\]"),
            (np.ones((0, 8)), "`x_pool` must hold at least one input"),
        ],
    )
    def test_a_pool_that_does_not_fit_is_refused(self, model, data, pool, message):
        with pytest.raises(ValueError, match=message):
            self.evaluate(model, *data, x_pool=pool)

    def test_a_state_of_another_pool_is_refused(self, model, data, tmp_path):
        state = tmp_path / "state"
        self.evaluate(model, *data, state_path=state)
        with pytest.raises(ValueError, match="Different: pool"):
            self.evaluate(model, *data, state_path=state, x_pool=data[0][:3])
