"""Provide complement objective training as one loss."""

import math
from typing import Any

import keras

from keras_drsl._typing import Tensor
from keras_drsl.losses.base import ClassificationLoss, check_strength, cross_entropy, logits_of, strength_of
from keras_drsl.predictions import LossInputs
from keras_drsl.spread import diversity


@keras.saving.register_keras_serializable(package="keras_drsl")
class ComplementObjective(ClassificationLoss):
    """Compute cross-entropy minus the entropy of the non-true probabilities.

    Use it to compare with `keras_drsl.DRSLoss`. Both make the non-true classes alike. Here the gradient of a non-true
    class is proportional to its share of the non-true probability, so classes far below the largest one hardly move.

    Shapes: as `keras_drsl.losses.ClassificationLoss`.

    Formula: `loss = CE(y, p) - lam * H / (C - 1)`, per sample, with

    - `p`: the softmax of the logits, `C` classes; `y`: the label as a distribution over them.
    - `CE(y, p) = -sum_k y_k log p_k`: the cross-entropy.
    - `q_k = w_k p_k / sum(w p)`, `w = 1 - y`: the non-true probabilities, scaled to sum to 1.
    - `H = -sum_k q_k log q_k`: their entropy.

    Note:

    - `lam=0` is Keras's cross-entropy.
    - Two classes have one non-true class, and `H = 0`.
    - The loss can be negative.

    Args:
        lam: The weight of the entropy, a number >= 0. The paper alternates between the two terms, each at full
            strength; the default of 1 is their sum.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`.

    Example:

    >>> loss = keras_drsl.ComplementObjective()
    >>> round(float(loss([0], [[0.8, 0.1, 0.1]])), 4)  # -log 0.8 - log(2) / 2
    -0.1234

    Reference: Chen et al., "Complement Objective Training", ICLR 2019, arXiv:1903.01182. Their code divides by `C`.
    """

    hyperparameters = ("lam",)

    def __init__(self, lam: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.lam = check_strength("lam", lam)

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        num_others = inputs.scores.shape[-1] - 1
        evenness = diversity(logits_of(inputs), inputs.distribution, measure="entropy")
        lam = strength_of(self.lam, inputs.scores.dtype)
        return cross_entropy(inputs) - lam * math.log(num_others) / num_others * evenness
