"""Provide the bilateral softmax loss."""

from typing import Any

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl._validation import check_positive
from keras_drsl.losses.base import ClassificationLoss, logits_of
from keras_drsl.predictions import LossInputs
from keras_drsl.spread import smallest_number


@keras.saving.register_keras_serializable(package="keras_drsl")
class BilateralSoftmaxLoss(ClassificationLoss):
    """Compute the softmax loss with a temperature for the positive classes and one for the negative ones.

    Use it for recommendation, where the classes are items and the logits are the similarities of a user and the items.
    The loss of a sample with several positives rises little for one positive of a low score, which may be a mistake.

    Shapes: as `keras_drsl.losses.ClassificationLoss`.

    Formula: `loss = (t2 / t1) log sum_{k: y_k = 0} exp(z_k / t2) - log sum_k y_k exp(z_k / t1)`, per sample, with

    - `z`: the logits.
    - `y`: the label as a distribution over the `C` classes. Classes of a weight above 0 are positive, the others are
      negative.
    - `t1 = positive_temperature`, `t2 = negative_temperature`.

    Note:

    - With one positive class and both temperatures 1, it is the cross-entropy without the true class in its
      denominator: `log sum_{k != y} exp z_k - z_y`. It has no lower limit.
    - A constant added to all logits does not change the value, so probabilities are taken too.
    - Give several positives as a distribution: divide a row of zeros and ones by its sum. A row of zeros is not a
      distribution, and an error.
    - A row without a class of weight 0, as with smoothed labels, has no negatives. Its loss is NaN.

    Args:
        positive_temperature: `t1`, a number > 0. The larger, the more alike the positives of a sample count.
        negative_temperature: `t2`, a number > 0.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`, and for a temperature that is not positive.

    Example:

    >>> loss = keras_drsl.BilateralSoftmaxLoss(1.0, 1.0, from_logits=True)
    >>> round(float(loss([0], [[2.0, 1.0, 1.0]])), 4)  # log(2 e) - 2
    -0.3069

    Reference: Wu et al., "BSL: Understanding and Improving Softmax Loss for Recommendation", arXiv:2312.12882.
    """

    hyperparameters = ("positive_temperature", "negative_temperature")

    def __init__(self, positive_temperature: float = 0.1, negative_temperature: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.positive_temperature = check_positive("positive_temperature", positive_temperature)
        self.negative_temperature = check_positive("negative_temperature", negative_temperature)

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        z, y = logits_of(inputs), inputs.distribution
        # Both sides move by the same number, which large logits would lose in rounding.
        z = z - ops.stop_gradient(_backend.max_of_classes(z))
        is_positive = y > 0
        lowest = smallest_number(z)
        weighted = z / self.positive_temperature + ops.log(ops.where(is_positive, y, 1.0))
        positives = ops.logsumexp(ops.where(is_positive, weighted, lowest), axis=-1)
        negatives = ops.logsumexp(ops.where(is_positive, lowest, z / self.negative_temperature), axis=-1)
        has_negatives = ops.logical_not(ops.all(is_positive, axis=-1))
        negatives = ops.where(has_negatives, negatives, float("nan"))
        return self.negative_temperature / self.positive_temperature * negatives - positives
