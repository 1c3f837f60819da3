"""Complement objective training."""

import math
from typing import Any

import keras

from keras_drsl import _arguments, _inputs
from keras_drsl.losses.base import ClassificationLoss, cross_entropy, logits_of
from keras_drsl.spread import diversity


@keras.saving.register_keras_serializable(package="keras_drsl")
class ComplementObjective(ClassificationLoss):
    """Cross-entropy less the entropy of the non-true probabilities.

    Like `keras_drsl.DRSLoss` it wants the non-true classes alike, but the pull on a rival is in proportion to its share
    of the non-true probability: those far below the largest rival feel none.

    Formula: `loss = CE(y, p) - lam * H / (C - 1)`, for each sample, with

    - `p`: the softmax of the logits, `C` classes; `y`: the label as a distribution over them.
    - `q_k = w_k p_k / sum(w p)`, `w = 1 - y`: the non-true probabilities, made to sum to 1; `H = -sum_k q_k log q_k`.

    Edges: `lam=0` is Keras's cross-entropy. Two classes leave one rival: `H = 0`. The loss can be negative.

    Args:
        lam: the weight of the complement entropy, a number >= 0. The paper takes turns between the two terms, each step
            at full strength; 1, the default, is their sum.
        **options: those of `keras_drsl.losses.ClassificationLoss`: `from_logits`, `ignore_class`, `axis`, `reduction`,
            `name`, `dtype`. Labels, calls and errors are as explained there.

    Raises:
        ValueError: as `keras_drsl.losses.ClassificationLoss`.

    Example:

    >>> loss = keras_drsl.ComplementObjective()
    >>> round(float(loss([0], [[0.8, 0.1, 0.1]])), 4)  # -log 0.8 - log(2) / 2
    -0.1234

    Reference: Chen et al., "Complement Objective Training", ICLR 2019, arXiv:1903.01182. Their code divides by `C`.
    """

    hyperparameters = ("lam",)

    def __init__(self, lam: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.lam = _arguments.check_non_negative("lam", lam)

    def values(self, inputs: _inputs.Inputs) -> Any:
        """One value a position."""
        rivals = inputs.scores.shape[-1] - 1
        evenness = diversity(logits_of(inputs), inputs.distribution, measure="entropy")
        return cross_entropy(inputs) - self.lam * math.log(rivals) / rivals * evenness
