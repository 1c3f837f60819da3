import math
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import PRSLoss, prs_loss
from tests import reference
from tests.backends import gradient, on_jax, on_tensorflow, values
from tests.helpers import run_python
from tests.losses.cases import draw, identity_model

OPTIONS = {"lam": 0.2, "start": 1, "end": 3}


def test_batch_mean_is_the_sum_of_the_authors():
    z, ids, one_hot = draw((4, 7, 6))
    # Mean cross-entropy, and the penalty summed over all tokens, by sorting.
    others = np.sort(np.where(one_hot > 0, -np.inf, z.astype("float64")), axis=-1)[..., ::-1]
    a = others[..., 1:3].mean(-1).ravel()
    penalty = -(a - math.log(np.exp(a).sum())).sum()
    expected = reference.each(reference.cross_entropy, one_hot, z).mean() + 0.2 * penalty
    np.testing.assert_allclose(values(PRSLoss(**OPTIONS, from_logits=True)(ids, z)), expected, rtol=1e-5)


def test_function_and_class_agree():
    z, ids, _ = draw((4, 7, 6))
    weights = np.random.default_rng(0).random((4, 7)).astype("float32")
    for options in ({}, {"ignore_class": 2}):
        got = prs_loss(ids, z, **OPTIONS, from_logits=True, sample_weight=weights, **options)
        # Not reduced, and with Keras's product with the weights taken back.
        loss = PRSLoss(**OPTIONS, from_logits=True, reduction=None, **options)(ids, z, weights)
        np.testing.assert_allclose(values(got) * weights, values(loss), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 7), (4, 7, 1)])
def test_a_token_of_weight_two_counts_twice(shape):
    z, ids, _ = draw((4, 7, 6))
    weights = np.random.default_rng(0).integers(0, 3, shape)
    repeated = np.repeat(np.arange(28), weights.ravel())
    loss = PRSLoss(**OPTIONS, from_logits=True, reduction="mean_with_sample_weight")
    expected = loss(ids.ravel()[repeated], z.reshape(28, 6)[repeated])
    np.testing.assert_allclose(values(loss(ids, z, weights.astype("float32"))), values(expected), rtol=1e-5)


def test_one_weight_per_sequence_is_shared():
    z, ids, one_hot = draw((4, 7, 6))
    weights = np.array([0.5, 0, 2, 1], "float32")
    each = np.repeat(weights, 7)
    rows = reference.prs_loss(one_hot.reshape(28, 6), z.reshape(28, 6).astype("float64"), **OPTIONS, weights=each)
    got = PRSLoss(**OPTIONS, from_logits=True)(ids, z, weights[:, None])
    np.testing.assert_allclose(values(got), np.dot(each, rows) / 28, rtol=1e-5)
    by_weight = PRSLoss(**OPTIONS, from_logits=True, reduction="mean_with_sample_weight")
    whole = by_weight(ids, z, np.broadcast_to(weights[:, None], (4, 7)))
    np.testing.assert_allclose(values(by_weight(ids, z, weights[:, None])), values(whole), rtol=1e-6)


def test_penalty_uses_class_weights_in_fit():
    z, ids, one_hot = draw((8, 6))
    model = identity_model((6,))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=PRSLoss(**OPTIONS, from_logits=True))
    by_class = {0: 1.0, 1: 0.0, 2: 3.0, 3: 0.5, 4: 2.0, 5: 1.0}
    got = model.fit(z, ids, batch_size=8, class_weight=by_class, verbose=0).history["loss"][0]
    weights = [by_class[label] for label in ids.tolist()]
    each = reference.prs_loss(one_hot, z.astype("float64"), **OPTIONS, weights=weights)
    np.testing.assert_allclose(got, np.dot(weights, each) / 8, rtol=1e-5)


def test_is_zero_when_all_weights_are_zero():
    z, ids, _ = draw()
    loss = lambda z: PRSLoss(**OPTIONS, from_logits=True)(ids, z, np.zeros(6, "float32"))
    assert values(loss(z)) == 0
    np.testing.assert_array_equal(gradient(loss, z), np.zeros_like(z))


def test_masked_tokens_have_no_influence():
    z, ids, one_hot = draw((2, 6, 5))
    z[:, 4:] = 0.0
    weights = np.ones((2, 6), "float32")
    weights[0, :2] = 0
    kept = np.zeros((2, 6), bool)
    kept[:, :4] = True
    heavy = kept & (weights > 0)
    log_rest = reference.prs_loss(one_hot[heavy], z[heavy].astype("float64"), **OPTIONS, number=kept.sum())
    got = PRSLoss(**OPTIONS, from_logits=True)(ids, keras.layers.Masking()(z), weights)
    np.testing.assert_allclose(values(got), math.fsum(log_rest) / kept.sum(), rtol=1e-5)
    large = z.copy()
    large[0, :2] = 50.0 * np.arange(5)
    again = PRSLoss(**OPTIONS, from_logits=True)(ids, keras.layers.Masking()(large), weights)
    np.testing.assert_allclose(values(again), values(got), rtol=1e-6)


def test_equals_the_sorted_formula_for_50000_classes():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (2, 3, 50_000)).astype("float32")
    ids = rng.integers(0, 50_000, (2, 3))
    z[0, 0, ids[0, 0]] = 40.0  # the largest logit of all is a true one
    got = prs_loss(ids, z, 0.1, start=2, end=20, from_logits=True)
    rows = reference.prs_loss(reference.one_hot(ids.ravel(), 50_000).tolist(), z.reshape(6, -1).tolist(), 0.1, 2, 20)
    np.testing.assert_allclose(values(got).ravel(), rows, rtol=1e-5)


def test_gradient_of_equal_logits_has_the_right_sum():
    # The non-true logits are all 1 in the first token and all 3 in the second, so their means are 1 and 3.
    z = np.array([[0, 1, 1, 1, 1], [3, 0, 3, 3, 3]], "float32")
    loss = lambda lam: gradient(lambda z: PRSLoss(lam, end=2, from_logits=True, reduction="sum")([0, 1], z), z)
    grad = loss(1.0) - loss(0.0)
    share = np.exp([1.0, 3.0]) / np.exp([1.0, 3.0]).sum()
    # d/da_i of -N sum_j log_softmax(a)_j, with N = 2.
    np.testing.assert_allclose(grad.sum(1), -2 * (1 - 2 * share), rtol=1e-5)
    assert np.all(grad[[0, 1], [0, 1]] == 0)
    assert np.all(grad[0] * np.sign(grad[0].sum()) >= 0)


@pytest.mark.more
@on_tensorflow
def test_each_replica_has_its_own_penalty():
    run_python(
        """
        import keras, numpy as np, tensorflow as tf, keras_drsl
        from tests import reference
        from tests.losses.cases import identity_model
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        rng = np.random.default_rng(0)
        z, ids = rng.normal(size=(8, 5)).astype("float32"), rng.integers(0, 5, 8)
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = identity_model((5,))
            loss = keras_drsl.PRSLoss(0.2, start=1, end=3, from_logits=True)
            model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
        got = model.fit(z, ids, batch_size=8, shuffle=False, verbose=0).history["loss"][0]
        one_hot = reference.one_hot(ids, 5)
        halves = [np.mean(reference.prs_loss(one_hot[half], z[half].astype("float64"), 0.2, 1, 3))
                  for half in (slice(4), slice(4, None))]
        whole = np.mean(reference.prs_loss(one_hot, z.astype("float64"), 0.2, 1, 3))
        np.testing.assert_allclose(got, np.mean(halves), rtol=1e-5)
        assert abs(got - whole) > 1e-3
        """
    )


@on_jax
def test_penalty_is_over_all_devices_of_jax():
    run_python(
        """
        import keras, numpy as np, keras_drsl
        from tests import reference
        from tests.losses.cases import identity_model
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
        rng = np.random.default_rng(0)
        z, ids = rng.normal(size=(8, 5)).astype("float32"), rng.integers(0, 5, 8)
        model = identity_model((5,))
        loss = keras_drsl.PRSLoss(0.2, start=1, end=3, from_logits=True)
        model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
        got = model.fit(z, ids, batch_size=8, shuffle=False, verbose=0).history["loss"][0]
        whole = np.mean(reference.prs_loss(reference.one_hot(ids, 5), z.astype("float64"), 0.2, 1, 3))
        np.testing.assert_allclose(got, whole, rtol=1e-5)
        """,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )


class TestBadInput:
    @pytest.mark.parametrize(("start", "end"), [(4, 4), (5, 4), (0, 0), (0, -1)])
    def test_start_must_be_below_end(self, start, end):
        for make in (PRSLoss, lambda **options: prs_loss([0], [[0.0, 1.0]], from_logits=True, **options)):
            with pytest.raises(ValueError, match=f"`end` must be above `start`. Received: start={start}, end={end}"):
                make(start=start, end=end)

    # For four sequences: one weight per sequence or per step, and lengths that are neither 1 nor those of the tokens.
    @pytest.mark.parametrize(("count", "shape"), [(4, (4,)), (7, (4,)), (7, (4, 3)), (7, (3, 7)), (7, (3,))])
    def test_weights_must_have_the_shape_of_the_tokens(self, count, shape):
        z, ids, _ = draw((4, count, 6))
        received = re.escape(f"Received: sample_weight.shape={shape}, positions of shape (4, {count})")
        with pytest.raises(ValueError, match=f"`sample_weight`.*must hold one weight per position.*{received}"):
            PRSLoss(from_logits=True)(ids, z, np.ones(shape, "float32"))

    def test_end_must_be_at_most_the_non_true_classes(self):
        z, ids, _ = draw()
        with pytest.raises(
            ValueError, match="`end` must be at most the number of non-true classes, 4. Received: end=5"
        ):
            PRSLoss(end=5, from_logits=True)(ids, z)
        assert np.isfinite(values(PRSLoss(end=4, from_logits=True)(ids, z)))

    def test_the_function_needs_logits_too(self):
        with pytest.raises(ValueError, match="PRSLoss needs logits"):
            prs_loss([0], ops.convert_to_tensor([[0.2, 0.3, 0.5]]), end=2)
