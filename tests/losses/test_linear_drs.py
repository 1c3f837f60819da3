import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import _backend, drs_loss, linear_drs_loss
from keras_drsl.losses.linear_drs import largest_others, linear_values
from keras_drsl.predictions import read_class_ids
from tests import reference
from tests.backends import BACKEND, compiled, gradient, needs_xla, on_tensorflow, values
from tests.helpers import some_short


def draw(shape=(6,), size=5, classes=23):
    rng = np.random.default_rng(0)
    features, kernel, bias = (
        rng.normal(size=s).astype("float32") for s in ((*shape, size), (size, classes), (classes,))
    )
    return features, kernel, bias, rng.integers(0, classes, shape)


def expected_loss(ids, features, kernel, bias, **options):
    logits = np.asarray(features, "float64") @ np.asarray(kernel, "float64") + bias
    return reference.each(reference.drs_loss, reference.one_hot(ids, kernel.shape[1]), logits, **options)


@needs_xla
@pytest.mark.parametrize("chunk_size", some_short([1, 4, 22, 23, 1000], more=[1, 22, 23]))
@pytest.mark.parametrize(("kind", "label_smoothing"), [("sum_of_squares", 0.0), ("variance", 0.1)])
def test_value_and_gradients_equal_the_dense_ones(chunk_size, kind, label_smoothing):
    features, kernel, bias, ids = draw()
    options = {"kind": kind, "label_smoothing": label_smoothing}
    loss = lambda *head: linear_drs_loss(
        ids, *head, chunk_size=chunk_size, spread=kind, label_smoothing=label_smoothing
    )
    got = values(loss(features, kernel, bias))
    np.testing.assert_allclose(got, expected_loss(ids, features, kernel, bias, **options), rtol=1e-5)
    inputs = [features, kernel, bias]
    for i in range(3):
        arguments = lambda x: [*inputs[:i], x, *inputs[i + 1 :]]
        grad = gradient(lambda x: loss(*map(ops.convert_to_tensor, arguments(x))), inputs[i])
        loop = reference.gradient(lambda x: expected_loss(ids, *arguments(x), **options), inputs[i])
        np.testing.assert_allclose(grad, loop, rtol=1e-3, atol=1e-4)


@pytest.mark.short
@needs_xla
def test_takes_several_axes_and_no_bias():
    features, kernel, _, ids = draw((2, 3))
    expected = expected_loss(ids, features, kernel, 0)
    for labels in (ids, ids[..., None]):
        np.testing.assert_allclose(values(linear_drs_loss(labels, features, kernel, chunk_size=4)), expected, rtol=1e-5)


@on_tensorflow
@pytest.mark.parametrize("eager", [True, False])
def test_gradients_reach_the_variables_of_a_layer(eager):
    import tensorflow as tf

    features, _, _, ids = draw()
    head = keras.layers.Dense(23)
    head.build(features.shape)

    def gradients(loss):
        def compute():
            with tf.GradientTape() as tape:
                total = ops.sum(loss())
            return tape.gradient(total, [head.kernel.value, head.bias.value])

        return compute() if eager else tf.function(compute)()

    got = gradients(lambda: linear_drs_loss(ids, features, head.kernel, head.bias, chunk_size=4))
    expected = gradients(lambda: drs_loss(ids, head(features), from_logits=True))
    for ours, dense in zip(got, expected, strict=True):
        np.testing.assert_allclose(values(ours), values(dense), rtol=1e-4, atol=1e-5)


@needs_xla
@pytest.mark.parametrize("chunk_size", [4, 23])
def test_a_transposed_kernel_has_the_same_values_and_gradients(chunk_size):
    features, kernel, bias, ids = draw()
    labels = read_class_ids(ops.convert_to_tensor(ids), features, 23, ignore_class=None)
    loss = lambda x: linear_values(labels, features, x, bias, 0.3, chunk_size=chunk_size, transposed=True)
    upright = np.ascontiguousarray(kernel.T)
    got = values(loss(ops.convert_to_tensor(upright)))
    np.testing.assert_allclose(got, expected_loss(ids, features, kernel, bias, lam=0.3), rtol=1e-5)
    loop = reference.gradient(lambda x: expected_loss(ids, features, x, bias, lam=0.3), kernel)
    np.testing.assert_allclose(gradient(loss, upright), loop.T, rtol=1e-3, atol=1e-4)


@needs_xla
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_size", [4, 23])
@pytest.mark.parametrize("transposed", [True, False])
def test_largest_others_are_those_of_a_sort(transposed, chunk_size, with_bias):
    features, kernel, bias, ids = draw((2, 3))
    logits = features.reshape(6, 5) @ kernel + (bias if with_bias else 0)
    logits[np.arange(6), ids.ravel()] = -np.inf
    labels = read_class_ids(ops.convert_to_tensor(ids), features, 23, ignore_class=None)
    head = np.ascontiguousarray(kernel.T) if transposed else kernel
    got = largest_others(
        labels, features, head, bias if with_bias else None, 7, chunk_size=chunk_size, transposed=transposed
    )
    assert np.array_equal(values(got), np.argsort(-logits, axis=1)[:, :7])


@needs_xla
def test_large_equal_logits_do_not_cancel():
    features, kernel, bias, ids = draw()
    features *= 1e-2
    bias = 1e-2 * bias + 1e3
    expected = reference.each(reference.spread, reference.one_hot(ids, 23), features.astype("float64") @ kernel + bias)
    with_spread, without = (values(linear_drs_loss(ids, features, kernel, bias, lam, chunk_size=4)) for lam in (100, 0))
    # The logits themselves are rounded to 6e-5, one part in 200 of their deviations.
    np.testing.assert_allclose((with_spread - without) / 100, expected, rtol=3e-2)


@needs_xla
@pytest.mark.parametrize("dtype", some_short(["float16", "bfloat16"], more=["float16"]))
def test_half_precision_is_accumulated_in_float32(dtype):
    features, kernel, bias, ids = draw(size=400)
    half = [ops.cast(x, dtype) for x in (features, kernel, bias)]
    rounded = [values(ops.cast(x, "float32")) for x in half]
    expected = expected_loss(ids, *rounded)
    np.testing.assert_allclose(values(linear_drs_loss(ids, *half, chunk_size=4)), expected, rtol=1e-5)
    grad = gradient(lambda x: linear_drs_loss(ids, x, *half[1:], chunk_size=4), half[0], dtype)
    loop = gradient(lambda x: linear_drs_loss(ids, x, *rounded[1:], chunk_size=4), rounded[0])
    np.testing.assert_allclose(grad.astype("float32"), loop, rtol=2e-2, atol=1e-1)


@needs_xla
def test_ignored_positions_are_zero():
    features, kernel, bias, ids = draw()
    ids[[1, 4]] = -1
    features[1] = np.nan
    kept = ids >= 0
    loss = lambda x: linear_drs_loss(ids, x, kernel, bias, chunk_size=4, ignore_class=-1)
    got, grad = values(loss(features)), gradient(loss, features)
    np.testing.assert_allclose(got[kept], expected_loss(ids[kept], features[kept], kernel, bias), rtol=1e-5)
    assert np.all(got[~kept] == 0)
    assert np.all(grad[~kept] == 0)
    slope_of_kernel = gradient(lambda x: linear_drs_loss(ids, features, x, bias, chunk_size=4, ignore_class=-1), kernel)
    assert np.all(np.isfinite(slope_of_kernel))


@needs_xla
def test_wrong_labels_are_an_error_or_nan():
    features, kernel, bias, ids = draw()
    ids[2] = 23
    with pytest.raises(ValueError, match=r"`y_true` must hold class ids in \[0, 23\).*Received: 23"):
        linear_drs_loss(ids, features, kernel, bias)
    program = compiled(lambda ids: linear_drs_loss(ids, features, kernel, bias))
    assert np.array_equal(np.isnan(values(program(ops.convert_to_tensor(ids)))), np.arange(6) == 2)


@needs_xla
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": -1}, "`lam` must be a non-negative number. Received: lam=-1"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of 1 or more. Received: chunk_size=0"),
        ({"spread": "std"}, "`spread` must be one of"),
        ({"label_smoothing": 1}, "`label_smoothing` must be a number in [0, 1)"),
        (
            {"features": np.zeros((6, 4))},
            "`features` and `kernel` must have the shapes (..., D) and (D, C).",
        ),
        ({"kernel": np.zeros((5, 1)), "bias": None}, "`kernel` must have at least two classes."),
        ({"bias": np.zeros(22)}, "`bias` must have the shape (C,)."),
        ({"y_true": np.zeros(5, int)}, "`y_true` must hold one class id per position. Received: y_true.shape=(5,)"),
    ],
)
def test_errors_name_bad_input(change, message):
    features, kernel, bias, ids = draw()
    arguments = {"y_true": ids, "features": features, "kernel": kernel, "bias": bias} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_drs_loss(**arguments)


def test_error_without_xla_names_the_backends(monkeypatch):
    monkeypatch.setattr(_backend, "HAS_XLA", False)
    features, kernel, bias, ids = draw()
    with pytest.raises(RuntimeError, match=f"needs TensorFlow or JAX. Received: KERAS_BACKEND={BACKEND}"):
        linear_drs_loss(ids, features, kernel, bias)
