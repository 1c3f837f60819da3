"""Measure how much the softmax values of the non-true classes differ. Losses reduce this spread, the metric logs it.

Symbols, for logits `z` of shape `(..., C)` and labels `y` of the same shape (one-hot or any label distribution):

- `p = softmax(z)`.
- `v`: the values of the classes, `log p` (space `"log_softmax"`) or `p` (space `"softmax"`).
- `w = 1 - y`: the weight of each class as a non-true class. For a one-hot `y` it is 0 for the true class and 1 for the
  others.
- `n = sum(w)`, which is `C - 1` when `y` sums to 1.
- `m = sum(w * v) / n`: the mean over the non-true classes.

A constant added to `v` changes no result here, so in log space the logits can be used in place of `log p`.

Reference: Wang et al., "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor

SPACES = ("log_softmax", "softmax")
SPREADS = ("sum_of_squares", "variance")
MEASURES = ("variance", "std", "entropy")

# Smaller probabilities are replaced by this one before the logarithm. Its reciprocal, the gradient of the logarithm,
# can still be multiplied in float32 without overflow.
MIN_PROBABILITY = 1e-30


def class_values(scores: Tensor, *, from_logits: bool, space: str) -> Tensor:
    """Return the values `v` of all classes.

    In log space `v` may differ from `log p` by one constant per sample, which changes no formula here.

    Args:
        scores: Logits or probabilities, shape `(..., C)`.
        from_logits: Whether `scores` are logits.
        space: One of `SPACES`.

    Returns:
        Shape `(..., C)`.
    """
    if space == "softmax":
        return ops.softmax(scores, axis=-1) if from_logits else scores
    return scores if from_logits else ops.log(ops.maximum(scores, MIN_PROBABILITY))


def spread(values: Tensor, y_true: Tensor, *, kind: str = "sum_of_squares") -> Tensor:
    """Return the spread `r` of the non-true values, one value per sample.

    Formula: `r = sum_k w_k (v_k - m)^2` for `kind="sum_of_squares"`. For `kind="variance"` it is divided by `n`.

    Note:

    - When the non-true values are equal, `r` and its gradient are exactly 0.
    - For two classes and a one-hot label there is only one non-true value, and `r = 0`.

    Args:
        values: `v`, shape `(..., C)`.
        y_true: A label distribution, shape `(..., C)`.
        kind: One of `SPREADS`.

    Returns:
        Shape `(...)`, the dtype of `values`.
    """
    weights = 1.0 - y_true
    count = ops.sum(weights, axis=-1)
    # When one of several equal values is subtracted from all, the differences are exactly 0, without rounding errors.
    values = values - _largest_non_true(values, weights)
    mean = ops.sum(weights * values, axis=-1, keepdims=True) / ops.expand_dims(count, -1)
    squares = ops.sum(weights * ops.square(values - mean), axis=-1)
    return squares / count if kind == "variance" else squares


def diversity(values: Tensor, y_true: Tensor, *, measure: str = "variance") -> Tensor:
    """Return the diversity of the non-true values, one value per sample.

    Formula:

    - `"variance"`: `sum_k w_k (v_k - m)^2 / n`.
    - `"std"`: the square root of the variance.
    - `"entropy"`: `-sum_k q_k log q_k / log(C - 1)`, with `q = w * p / sum(w * p)` the non-true probabilities. It is 1
      when they are equal and 0 when one of them is 1.

    Note:

    - For two classes the entropy is 1 by definition.

    Args:
        values: `v`, shape `(..., C)`; in log space for `"entropy"`.
        y_true: A label distribution, shape `(..., C)`.
        measure: One of `MEASURES`.

    Returns:
        Shape `(...)`, the dtype of `values`.
    """
    if measure == "entropy":
        return _non_true_entropy(values, 1.0 - y_true)
    variance = spread(values, y_true, kind="variance")
    if measure == "variance":
        return variance
    # The derivative of the square root is infinite at 0, the value of equal classes.
    equal = ops.equal(variance, 0.0)
    return ops.where(equal, 0.0, ops.sqrt(ops.where(equal, 1.0, variance)))


def _non_true_entropy(log_values: Tensor, weights: Tensor) -> Tensor:
    num_classes = log_values.shape[-1]
    if num_classes == 2:
        return ops.ones_like(log_values[..., 0])
    log_values = finite(log_values)
    # The exponential of the true class could overflow. Its weight is 0, so any other value can replace it.
    log_values = ops.where(weights > 0, log_values - _largest_non_true(log_values, weights), 0.0)
    unnormalized = weights * ops.exp(log_values)
    total = ops.sum(unnormalized, axis=-1, keepdims=True)
    log_q = log_values + ops.log(ops.where(weights > 0, weights, 1.0)) - ops.log(total)
    return -ops.sum(unnormalized / total * log_q, axis=-1) / math.log(num_classes - 1)


def finite(log_values: Tensor) -> Tensor:
    """Replace minus infinity, the logarithm of 0, by the smallest number: 0 times it is 0, and its exponential is 0."""
    return ops.maximum(log_values, smallest_number(log_values))


def smallest_number(x: Tensor) -> float:
    """Return the smallest finite number of the dtype of a tensor, float32 or float64."""
    return float(np.finfo(keras.backend.standardize_dtype(x.dtype)).min)


def _largest_non_true(values: Tensor, weights: Tensor) -> Tensor:
    """Return the largest non-true value as a constant, shape `(..., 1)`; no gradient flows through it."""
    return ops.stop_gradient(_backend.max_of_classes(ops.where(weights > 0, values, smallest_number(values))))
