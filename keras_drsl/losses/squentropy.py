"""Provide squentropy."""

from typing import Any

import keras
from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl.losses.base import ClassificationLoss, check_strength, cross_entropy, strength_of
from keras_drsl.predictions import LossInputs


@keras.saving.register_keras_serializable(package="keras_drsl")
class Squentropy(ClassificationLoss):
    """Compute cross-entropy plus the mean square of the non-true logits.

    Use it to compare with `keras_drsl.DRSLoss`. Of all losses here it is the most similar: it moves the non-true logits
    towards 0, and `DRSLoss` moves them towards their own mean.

    Shapes: as `keras_drsl.losses.ClassificationLoss`.

    Formula: `loss = CE(y, p) + lam * sum_k w_k z_k^2 / n`, per sample, with

    - `z`: the logits; `p`: their softmax; `y`: the label as a distribution over the `C` classes.
    - `CE(y, p) = -sum_k y_k log p_k`: the cross-entropy.
    - `w = 1 - y`: for a class id, 0 for the true class and 1 for the others; `n = sum(w) = C - 1`.

    Note:

    - `lam=0` is Keras's cross-entropy.
    - A constant added to all logits changes the loss, so probabilities whose logits cannot be found are an error.

    Args:
        lam: The strength, a number >= 0. The default of 1 is the paper's.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`.

    Example:

    >>> loss = keras_drsl.Squentropy(from_logits=True)
    >>> round(float(loss([0], [[2.0, 1.0, -1.0]])), 4)  # 0.3490 + (1 + 1) / 2
    1.349

    Reference: Hui, Belkin, Wright, "Cut your Losses with Squentropy", ICML 2023, arXiv:2302.03952.
    """

    hyperparameters = ("lam",)
    needs_logits = True

    def __init__(self, lam: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.lam = check_strength("lam", lam)

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        w = 1.0 - inputs.distribution
        squares = ops.sum(w * ops.square(inputs.safe_scores), axis=-1) / ops.sum(w, axis=-1)
        return cross_entropy(inputs, masked_classes=False) + strength_of(self.lam, inputs.scores.dtype) * squares
