"""Provide the probabilistically compact loss."""

from typing import Any

import keras
from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl._validation import check_number
from keras_drsl.losses.base import ClassificationLoss, check_strength, logits_of, strength_of
from keras_drsl.predictions import LossInputs
from keras_drsl.spread import finite, smallest_number


@keras.saving.register_keras_serializable(package="keras_drsl")
class ProbabilisticallyCompactLoss(ClassificationLoss):
    """Compute a margin loss between the true probability and each other one, with a penalty on the logit margins.

    Use it to compare with `keras_drsl.DRSLoss`. The authors first train with cross-entropy.

    Shapes: as `keras_drsl.losses.ClassificationLoss`.

    Formula: `loss = sum_k w_k max(0, p_k + margin - p_y) / n + lam * sum_k q_k max(0, z_y - z_k)`, per sample, with

    - `z`: the logits; `p`: their softmax; `y`: the label as a distribution over the `C` classes.
    - `w = 1 - y`: for a class id, 0 for the true class and 1 for the others; `n = sum(w) = C - 1`.
    - `p_y = sum(y p)`, `z_y = sum(y z)`: for a class id, the probability and logit of the true class.
    - `q_k = w_k p_k / sum(w p)`: the non-true probabilities, scaled to sum to 1.

    Note:

    - The first term and its gradient are 0 where the true probability exceeds all others by `margin`.
    - For a confident and wrong prediction the gradient of the first term vanishes too.

    Args:
        margin: By how much the true probability should exceed the others, a number in [0, 1]. The default of 0.995 is
            that of the authors' training.
        lam: The weight of the penalty on the logits, a number >= 0. The default of 0.05 is that of the authors'
            training.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`.

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
        self.margin = check_number("margin", margin, "a number in [0, 1]", lambda number: 0 <= number <= 1)
        self.lam = check_strength("lam", lam)

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        y, z = inputs.distribution, finite(logits_of(inputs))
        w = 1.0 - y
        p = ops.softmax(z, axis=-1)
        gaps = ops.maximum(p + self.margin - ops.sum(y * p, axis=-1, keepdims=True), 0.0)
        q = ops.softmax(ops.where(w > 0, z + ops.log(ops.where(w > 0, w, 1.0)), smallest_number(z)), axis=-1)
        leads = ops.maximum(ops.sum(y * z, axis=-1, keepdims=True) - z, 0.0)
        lam = strength_of(self.lam, inputs.scores.dtype)
        return ops.sum(w * gaps, axis=-1) / ops.sum(w, axis=-1) + lam * ops.sum(q * leads, axis=-1)
