"""The restraint: how much the softmax values of the non-true classes differ from one another.

The loss trains on it and the metric logs it, so its formulas live here and nowhere else.

Symbols, for logits `z` of shape `(..., C)` and labels `y` of the same shape (a one-hot or any label
distribution):

- `p = softmax(z)`.
- `v`: the values whose diversity is measured, `log p` (space `"log_softmax"`) or `p` (space `"softmax"`).
- `w = 1 - y`: the weight of each class as a non-true one. For a one-hot `y` it is 0 on the true class and 1 on
  its rivals.
- `n = sum(w)`, which is `C - 1` when `y` sums to 1.
- `m = sum(w * v) / n`: the mean over the non-true classes.

Nothing here depends on a constant added to `v`, so in log space the logits can stand for `log p`.

Reference: Wang et al., "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363.
"""

import math
from typing import Any

from keras import ops

SPACES = ("log_softmax", "softmax")
SPREADS = ("sum_of_squares", "variance")
MEASURES = ("variance", "std", "entropy")

# Probabilities are raised to this before their logarithm is taken. It is the smallest round number whose
# reciprocal, the logarithm's gradient, still has room to be multiplied in float32.
MIN_PROBABILITY = 1e-30


def class_values(scores: Any, *, from_logits: bool, space: str) -> Any:
    """`v`: the values of all classes in `space`, from logits or from probabilities, shape `(..., C)`.

    In log space `v` may differ from `log p` by a constant a sample, which no formula here can see.
    """
    if space == "softmax":
        return ops.softmax(scores, axis=-1) if from_logits else scores
    return scores if from_logits else ops.log(ops.maximum(scores, MIN_PROBABILITY))


def spread(values: Any, y_true: Any, *, kind: str = "sum_of_squares") -> Any:
    """The spread `r` of the non-true values, one number a sample.

    Formula: `r = sum_k w_k (v_k - m)^2` for `kind="sum_of_squares"`, the same divided by `n` for `"variance"`.
    It is 0 exactly, with a gradient of exactly 0, when the non-true values are equal, and 0 for two classes and
    a one-hot label, where there is only one of them.

    Args:
        values: `v`, shape `(..., C)`.
        y_true: a label distribution, shape `(..., C)`.
        kind: one of `SPREADS`.

    Returns:
        Shape `(...)`, the dtype of `values`.
    """
    weights = 1.0 - y_true
    count = ops.sum(weights, axis=-1)
    # Measured from one of the rivals rather than from 0, equal values lose nothing to rounding.
    values = values - _largest_rival(values, weights)
    mean = ops.sum(weights * values, axis=-1, keepdims=True) / ops.expand_dims(count, -1)
    squares = ops.sum(weights * ops.square(values - mean), axis=-1)
    return squares / count if kind == "variance" else squares


def diversity(values: Any, y_true: Any, *, measure: str = "variance") -> Any:
    """The diversity of the non-true values, one number a sample.

    Formula: `"variance"` is `sum_k w_k (v_k - m)^2 / n` and `"std"` its square root. `"entropy"` is
    `-sum_k q_k log q_k / log(C - 1)` with `q` the non-true probabilities `w * p` divided by their sum: 1 when they
    are even, 0 when one rival has everything, 1 by definition when there are two classes.

    Args:
        values: `v`, shape `(..., C)`; for `"entropy"` in log space.
        y_true: a label distribution, shape `(..., C)`.
        measure: one of `MEASURES`.

    Returns:
        Shape `(...)`, the dtype of `values`.
    """
    if measure == "entropy":
        return _rival_entropy(values, 1.0 - y_true)
    variance = spread(values, y_true, kind="variance")
    return ops.sqrt(variance) if measure == "std" else variance


def _rival_entropy(log_values: Any, weights: Any) -> Any:
    num_classes = log_values.shape[-1]
    if num_classes == 2:
        return ops.ones_like(log_values[..., 0])
    # The true class is set to the largest rival before the exponential, which it could overflow, and has weight 0.
    anchor = _largest_rival(log_values, weights)
    log_values = ops.where(weights > 0, log_values - anchor, 0.0)
    unnormalised = weights * ops.exp(log_values)
    total = ops.sum(unnormalised, axis=-1, keepdims=True)
    log_q = log_values + ops.log(ops.where(weights > 0, weights, 1.0)) - ops.log(total)
    return -ops.sum(unnormalised / total * log_q, axis=-1) / math.log(num_classes - 1)


def _largest_rival(values: Any, weights: Any) -> Any:
    """A constant to measure a sample's values from, `(..., 1)`; no gradient flows through it."""
    return ops.stop_gradient(ops.max(ops.where(weights > 0, values, -math.inf), axis=-1, keepdims=True))
