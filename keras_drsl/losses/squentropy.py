"""Squentropy."""

from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl.losses.base import ClassificationLoss, cross_entropy


@keras.saving.register_keras_serializable(package="keras_drsl")
class Squentropy(ClassificationLoss):
    """Cross-entropy plus the mean square of the non-true logits.

    The nearest relative of `keras_drsl.DRSLoss`: it pulls the non-true logits towards 0, not towards their own mean.

    Formula: `loss = CE(y, p) + lam * sum_k w_k z_k^2 / n`, for each sample, with

    - `z`: the logits; `p`: their softmax; `y`: the label as a distribution over the `C` classes.
    - `w = 1 - y`: 0 on the true class, 1 on its rivals; `n = sum(w) = C - 1`.

    Edges: `lam=0` is Keras's cross-entropy. A constant added to all logits changes the loss, so probabilities whose
    logits cannot be found are an error.

    Args:
        lam: the strength, a number >= 0; 1, the default, is the paper's.
        **options: those of `keras_drsl.losses.ClassificationLoss`: `from_logits`, `ignore_class`, `axis`, `reduction`,
            `name`, `dtype`. Labels, calls and errors are as explained there.

    Raises:
        ValueError: as `keras_drsl.losses.ClassificationLoss`.

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
        self.lam = _arguments.check_non_negative("lam", lam)

    def values(self, inputs: _inputs.Inputs) -> Any:
        """One value a position."""
        w = 1.0 - inputs.distribution
        squares = ops.sum(w * ops.square(inputs.safe_scores), axis=-1) / ops.sum(w, axis=-1)
        return cross_entropy(inputs) + self.lam * squares
