"""Provide the z-loss, on the cross-entropy or on another loss."""

from typing import Any

import keras
from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl.losses.base import ClassificationLoss, check_strength, cross_entropy, strength_of
from keras_drsl.losses.prs import PRSLoss
from keras_drsl.predictions import LossInputs

INHERITED = ("from_logits", "ignore_class", "axis", "reduction", "dtype")


@keras.saving.register_keras_serializable(package="keras_drsl")
class ZLoss(ClassificationLoss):
    """Compute a loss plus the squared log-sum-exp of the logits, which keeps the logits near a fixed level.

    Use it in training large language models, or on top of `keras_drsl.DRSLoss`, which does not change when a constant
    is added to all logits.

    Shapes: as `keras_drsl.losses.ClassificationLoss`.

    Formula: `loss = base + lam * log(sum_k exp z_k)^2`, per sample, with

    - `z`: the logits.
    - `base`: the cross-entropy, or the value of `loss`.

    Note:

    - `lam=0` is `base` alone.
    - Probabilities whose logits cannot be found are an error.

    Args:
        lam: The strength, a number >= 0. The default of 1e-4 is PaLM's.
        loss: Another loss of this package, such as `keras_drsl.DRSLoss(from_logits=True)`, but not `PRSLoss` or
            `ZLoss`; None for the cross-entropy. Its `from_logits`, `ignore_class`, `axis`, `reduction` and `dtype` hold
            here too, unless they are given below.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`, and for a `loss` of another kind.

    Example:

    >>> loss = keras_drsl.ZLoss(0.1, loss=keras_drsl.DRSLoss(lam=0.0, from_logits=True))
    >>> round(float(loss([0], [[0.0, 0.0, 0.0]])), 4)  # log 3 + 0.1 * (log 3)^2
    1.2193

    Reference: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311, section 5.
    """

    hyperparameters = ("lam",)
    needs_logits = True

    def __init__(self, lam: float = 1e-4, *, loss: ClassificationLoss | None = None, **options: Any) -> None:
        if loss is not None:
            if not isinstance(loss, ClassificationLoss) or isinstance(loss, ZLoss | PRSLoss):
                raise ValueError(
                    "`loss` must be a loss of keras_drsl other than PRSLoss and ZLoss, or None. "
                    f"Received: loss={loss!r}"
                )
            options = {name: loss.get_config()[name] for name in INHERITED} | options
        super().__init__(**options)
        self.lam = check_strength("lam", lam)
        self.loss = loss

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        lam = strength_of(self.lam, inputs.scores.dtype)
        return self._base(inputs) + lam * ops.square(ops.logsumexp(inputs.safe_scores, axis=-1))

    def _base(self, inputs: LossInputs) -> Tensor:
        if self.loss is None:
            return cross_entropy(inputs)
        self.loss._is_compiled = self._is_compiled
        values = self.loss._fused_values(inputs)
        return self.loss.values(inputs) if values is None else values

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving."""
        return {**super().get_config(), "loss": keras.saving.serialize_keras_object(self.loss)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ZLoss":
        """Make the loss from what `get_config` returned.

        Args:
            config: The arguments.
        """
        return cls(**{**config, "loss": keras.saving.deserialize_keras_object(config["loss"])})
