"""The z-loss, for itself or added to another loss."""

from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl.losses.base import ClassificationLoss, cross_entropy
from keras_drsl.losses.prs import PRSLoss

INHERITED = ("from_logits", "ignore_class", "axis", "reduction", "dtype")


@keras.saving.register_keras_serializable(package="keras_drsl")
class ZLoss(ClassificationLoss):
    """A loss plus the squared log-sum-exp of the logits, which keeps these from drifting.

    The restraint of large language models. `keras_drsl.DRSLoss` leaves a constant added to all logits free; this ties
    it down.

    Formula: `loss = base + lam * log(sum_k exp z_k)^2`, for each sample, with `z` the logits and `base` the
    cross-entropy or what `loss` gives.

    Edges: `lam=0` is the base alone. Probabilities whose logits cannot be found are an error.

    Args:
        lam: the strength, a number >= 0; the default is PaLM's.
        loss: another loss of this package to add to, such as `keras_drsl.DRSLoss(from_logits=True)`, but for
            `PRSLoss` and a `ZLoss`; its options below, but for the name, then hold here unless they are given. None for
            the cross-entropy.
        **options: those of `keras_drsl.losses.ClassificationLoss`: `from_logits`, `ignore_class`, `axis`, `reduction`,
            `name`, `dtype`. Labels, calls and errors are as explained there.

    Raises:
        ValueError: as `keras_drsl.losses.ClassificationLoss`, and for a `loss` it cannot add to.

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
        self.lam = _arguments.check_non_negative("lam", lam)
        self.loss = loss

    def values(self, inputs: _inputs.Inputs) -> Any:
        """One value a position."""
        base = cross_entropy(inputs) if self.loss is None else self.loss.values(inputs)
        return base + self.lam * ops.square(ops.logsumexp(inputs.safe_scores, axis=-1))

    def get_config(self) -> dict[str, Any]:
        """All arguments, for saving."""
        return {**super().get_config(), "loss": keras.saving.serialize_keras_object(self.loss)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ZLoss":
        """The loss of a configuration that `get_config` gave."""
        return cls(**{**config, "loss": keras.saving.deserialize_keras_object(config["loss"])})
