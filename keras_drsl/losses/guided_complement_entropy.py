"""Provide guided complement entropy."""

from typing import Any

import keras
from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl.losses.base import ClassificationLoss, check_strength, logits_of, strength_of
from keras_drsl.predictions import LossInputs
from keras_drsl.spread import diversity, finite


@keras.saving.register_keras_serializable(package="keras_drsl")
class GuidedComplementEntropy(ClassificationLoss):
    """Compute the negative entropy of the non-true probabilities times a power of the true probability.

    Use it to compare with `keras_drsl.DRSLoss`. It contains no cross-entropy, and it is not Keras's generalized
    cross-entropy.

    Shapes: as `keras_drsl.losses.ClassificationLoss`.

    Formula: `loss = -p_y^alpha * H / log(C - 1)`, per sample, with

    - `p`: the softmax of the logits, `C` classes; `y`: the label as a distribution over them.
    - `p_y = exp(sum_k y_k log p_k)`: for a class id, the probability of the true class.
    - `q_k = w_k p_k / sum(w p)`, `w = 1 - y`: the non-true probabilities, scaled to sum to 1.
    - `H = -sum_k q_k log q_k`: their entropy.

    Note:

    - The loss lies between -1 (the true probability is 1, the others are equal) and 0.
    - Two classes have one non-true class, and the loss is `-p_y^alpha`.
    - Where `p_y` is almost 0, so is the gradient. Training may never start if the first predictions are confident
      and wrong.

    Args:
        alpha: The power, a number >= 0. The default of 1/3 is that of the authors' code.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`.

    Example:

    >>> loss = keras_drsl.GuidedComplementEntropy(alpha=0.5)
    >>> round(float(loss([0], [[0.64, 0.18, 0.18]])), 4)  # the others are equal: -0.64^0.5
    -0.8

    Reference: Chen et al., "Improving Adversarial Robustness via Guided Complement Entropy", ICCV 2019,
    arXiv:1903.09799. Their code divides by `log(C)`.
    """

    hyperparameters = ("alpha",)

    def __init__(self, alpha: float = 1 / 3, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = check_strength("alpha", alpha)

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        y, log_p = inputs.distribution, ops.log_softmax(finite(logits_of(inputs)), axis=-1)
        guide = ops.exp(strength_of(self.alpha, inputs.scores.dtype) * ops.sum(y * log_p, axis=-1))
        return -guide * diversity(log_p, y, measure="entropy")
