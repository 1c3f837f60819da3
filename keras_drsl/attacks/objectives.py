"""The losses that attacks increase: functions of logits `(batch, C)`, the true class and a target, one value per row.

Symbols: z the logits, y the true class, t the target class (untargeted: unused), z_(k) the k-th largest logit.

             untargeted                                  targeted
    ce       logsumexp(z) - z_y                          z_t - logsumexp(z)
    margin   max_{k != y} z_k - z_y                      z_t - z_y
    dlr      (max_{k != y} z_k - z_y) / (z_(1) - z_(3))  (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

The difference of logits ratio (dlr) and its targeted form are those of Croce and Hein, arXiv:2003.01690. They do not
change with the scale of the logits. Where the non-true logits are equal, their gradient with respect to the true class
vanishes. The gradient of the margin never does.
"""

from keras import ops

from keras_drsl._typing import Tensor

LOSSES = ("ce", "margin", "dlr")


def objective(loss: str, logits: Tensor, y: Tensor, target: Tensor, *, targeted: bool) -> Tensor:
    """Compute the value that an attack increases, shape `(batch,)`.

    Args:
        loss: `"ce"`, `"margin"` or `"dlr"`. With fewer than four classes, `"dlr"` is the margin.
        logits: Shape `(batch, C)`.
        y: The true classes, shape `(batch,)`.
        target: The target classes, shape `(batch,)`; unused if `targeted` is False.
        targeted: Whether to move towards the target, or away from the true class.
    """
    num_classes = logits.shape[-1]
    is_true = ops.one_hot(y, num_classes, dtype="bool")
    true = ops.sum(ops.where(is_true, logits, 0.0), axis=-1)
    if targeted:
        other = ops.sum(ops.where(ops.one_hot(target, num_classes, dtype="bool"), logits, 0.0), axis=-1)
    else:
        other = ops.max(ops.where(is_true, -float("inf"), logits), axis=-1)
    if loss == "ce":
        return other - ops.logsumexp(logits, axis=-1) if targeted else ops.logsumexp(logits, axis=-1) - true
    if loss == "margin" or num_classes < 4:
        return other - true
    largest, _ = ops.top_k(logits, 4)
    low = (largest[:, 2] + largest[:, 3]) / 2 if targeted else largest[:, 2]
    return (other - true) / (largest[:, 0] - low + 1e-12)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return where the prediction is not the true class or a logit is NaN, shape `(batch,)`."""
    wrong = ops.cast(ops.argmax(logits, axis=-1), "int32") != y
    return ops.logical_or(wrong, ops.any(ops.isnan(logits), axis=-1))
