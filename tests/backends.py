"""What a test needs of the backend that runs it."""

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.config.backend()

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="is about TensorFlow")


def values(x):
    return ops.convert_to_numpy(x)


def gradient(function, x, dtype="float32"):
    """The gradient of `sum(function(x))` with respect to `x`, as a NumPy array."""
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
    """The function as a compiled program, where the backend has such a thing."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    pytest.skip("torch runs eagerly")
