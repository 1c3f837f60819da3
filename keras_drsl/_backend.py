"""The only file that knows which backend runs."""

from functools import cache
from typing import Any

import keras
import numpy as np


def known_values(x: Any) -> np.ndarray | None:
    """The values of a tensor, or None while a program is traced and there are none yet."""
    if isinstance(x, keras.KerasTensor):
        return None
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.is_symbolic_tensor(x):
            return None
    elif backend == "jax":
        import jax

        if isinstance(x, jax.core.Tracer):
            return None
    elif backend == "torch":
        import torch

        if torch.compiler.is_compiling() or x.is_meta:
            return None
    return keras.ops.convert_to_numpy(x)


def mask_of(x: Any) -> Any:
    """The Keras mask of a tensor, or None."""
    mask = getattr(x, "_keras_mask", None)
    if mask is None and keras.config.backend() == "jax" and keras.ops.is_tensor(x):
        found = _mask_layers()[0](x)
        mask = None if found is x else found
    return mask


def with_mask(x: Any, mask: Any) -> Any:
    """The tensor with a Keras mask, for Keras to average over the valid positions only."""
    try:
        x._keras_mask = mask
    except AttributeError:
        x = _mask_layers()[1]([x, mask])
    return x


@cache
def _mask_layers() -> tuple[keras.layers.Layer, keras.layers.Layer]:
    """One layer that returns the mask of its input and one that sets it.

    In a JAX program being traced, tensors take no attributes. Keras keeps their masks elsewhere and hands them out to
    layers alone.
    """

    class ReadMask(keras.layers.Layer):
        def call(self, x: Any, mask: Any = None) -> Any:
            return x if mask is None else mask

        def compute_mask(self, x: Any, mask: Any = None) -> Any:
            return None

    class SetMask(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs[0] + 0.0

        def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
            return inputs[1]

    return ReadMask(autocast=False), SetMask(autocast=False)
