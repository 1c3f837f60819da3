"""The probabilistically compact loss."""

import math
from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl.losses.base import ClassificationLoss, logits_of


@keras.saving.register_keras_serializable(package="keras_drsl")
class ProbabilisticallyCompactLoss(ClassificationLoss):
    """A margin between the true probability and each other, with a rein on the margin of the logits.

    Formula: `loss = sum_k w_k max(0, p_k + margin - p_y) / n + lam * sum_k q_k max(0, z_y - z_k)`, a sample, with

    - `z`: the logits; `p`: their softmax; `y`: the label as a distribution over the `C` classes.
    - `w = 1 - y`: 0 on the true class, 1 on its rivals; `n = sum(w) = C - 1`.
    - `p_y = sum(y p)`, `z_y = sum(y z)`: those of the true class.
    - `q_k = w_k p_k / sum(w p)`: the share of a rival in the non-true probability.

    Edges: the first term is 0, and so is its pull, once the true probability leads all others by `margin`; for
    a confident and wrong prediction its pull vanishes as well. The authors train with cross-entropy first.

    Args:
        margin: by how much the true probability is to lead, a number in [0, 1]; by default as in the authors' training.
        lam: the weight of the logits' constraint, a number >= 0; likewise.
        **options: those of `keras_drsl.losses.ClassificationLoss`: `from_logits`, `ignore_class`, `axis`, `reduction`,
            `name`, `dtype`. Labels, calls and errors are as explained there.

    Raises:
        ValueError: as `keras_drsl.losses.ClassificationLoss`.

    Example:

    >>> loss = keras_drsl.ProbabilisticallyCompactLoss(margin=0.8, lam=0.0)
    >>> round(float(loss([0], [[0.7, 0.2, 0.1]])), 4)  # (0.3 + 0.2) / 2
    0.25

    Reference: Li et al., "Improving Adversarial Robustness via Probabilistically Compact Loss with Logit Constraints",
    AAAI 2021, arXiv:2012.07688.
    """

    hyperparameters = ("margin", "lam")

    def __init__(self, margin: float = 0.995, lam: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.margin = _arguments.check_number("margin", margin, "a number in [0, 1]", lambda number: 0 <= number <= 1)
        self.lam = _arguments.check_non_negative("lam", lam)

    def values(self, inputs: _inputs.Inputs) -> Any:
        """One value a position."""
        y, z = inputs.distribution, logits_of(inputs)
        w = 1.0 - y
        p = ops.softmax(z, axis=-1)
        gaps = ops.maximum(p + self.margin - ops.sum(y * p, axis=-1, keepdims=True), 0.0)
        q = ops.softmax(ops.where(w > 0, z + ops.log(ops.where(w > 0, w, 1.0)), -math.inf), axis=-1)
        leads = ops.maximum(ops.sum(y * z, axis=-1, keepdims=True) - z, 0.0)
        return ops.sum(w * gaps, axis=-1) / ops.sum(w, axis=-1) + self.lam * ops.sum(q * leads, axis=-1)
