"""Guided complement entropy."""

from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl.losses.base import ClassificationLoss, logits_of
from keras_drsl.spread import diversity


@keras.saving.register_keras_serializable(package="keras_drsl")
class GuidedComplementEntropy(ClassificationLoss):
    """The evenness of the non-true probabilities, times a power of the true one; no cross-entropy at all.

    Not to be taken for generalized cross-entropy, which Keras has.

    Formula: `loss = -p_y^alpha * H / log(C - 1)`, for each sample, with

    - `p`: the softmax of the logits, `C` classes; `p_y = exp(sum_k y_k log p_k)`, that of the true class for a class
      id; `y`: the label as a distribution.
    - `q_k = w_k p_k / sum(w p)`, `w = 1 - y`: the non-true probabilities, made to sum to 1; `H = -sum_k q_k log q_k`.

    Edges: it lies between -1 (certain of the true class, the rivals even) and 0. Two classes leave one rival, and the
    loss is `-p_y^alpha`. Where `p_y` is nearly 0 its gradient is nearly 0 too: training may never start if the first
    predictions are confident and wrong.

    Args:
        alpha: the power, a number >= 0; the default, 1/3, is that of the authors' code.
        **options: those of `keras_drsl.losses.ClassificationLoss`: `from_logits`, `ignore_class`, `axis`, `reduction`,
            `name`, `dtype`. Labels, calls and errors are as explained there.

    Raises:
        ValueError: as `keras_drsl.losses.ClassificationLoss`.

    Example:

    >>> loss = keras_drsl.GuidedComplementEntropy(alpha=0.5)
    >>> round(float(loss([0], [[0.64, 0.18, 0.18]])), 4)  # the rivals are even: -0.64^0.5
    -0.8

    Reference: Chen et al., "Improving Adversarial Robustness via Guided Complement Entropy", ICCV 2019,
    arXiv:1903.09799. Their code divides by `log(C)`.
    """

    hyperparameters = ("alpha",)

    def __init__(self, alpha: float = 1 / 3, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = _arguments.check_non_negative("alpha", alpha)

    def values(self, inputs: _inputs.Inputs) -> Any:
        """One value a position."""
        y, log_p = inputs.distribution, ops.log_softmax(logits_of(inputs), axis=-1)
        guide = ops.exp(self.alpha * ops.sum(y * log_p, axis=-1))
        return -guide * diversity(log_p, y, measure="entropy")
