"""Provide the helpers of tests that depend on the running backend."""

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.config.backend()

# The options of `compile` for each way in which the backend can run a model.
FIT_MODES = [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}][: 2 if BACKEND == "torch" else 3]

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="is about TensorFlow")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="is about torch")
needs_xla = pytest.mark.skipif(BACKEND == "torch", reason="needs XLA")


def values(x):
    return ops.convert_to_numpy(x)


def gradient(function, x, dtype="float32"):
    """Compute the gradient of `sum(function(x))` with respect to `x`, as a NumPy array."""
    x = ops.convert_to_tensor(np.asarray(x), dtype=dtype)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            total = ops.sum(function(x))
        return values(tape.gradient(total, x))
    if BACKEND == "jax":
        import jax

        return values(jax.grad(lambda x: ops.sum(function(x)))(x))
    x.requires_grad_(True)
    ops.sum(function(x)).backward()
    return values(x.grad)


def compiled(function):
    """Compile a function with XLA, or skip the test on PyTorch."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    pytest.skip("PyTorch runs eagerly")
