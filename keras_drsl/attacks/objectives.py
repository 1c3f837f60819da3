"""The losses that attacks increase: functions of logits `(batch, C)`, the true class and a target, one value per row.

Symbols: z the logits, y the true class, t the target class (untargeted: unused), z_(k) the k-th largest logit.

             untargeted                                  targeted
    ce       logsumexp(z) - z_y                          z_t - logsumexp(z)
    margin   max_{k != y} z_k - z_y                      z_t - z_y
    dlr      (max_{k != y} z_k - z_y) / (z_(1) - z_(3))  (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

The difference of logits ratio (dlr) and its targeted form are those of Croce and Hein, arXiv:2003.01690. They do not
change with the scale of the logits. Where the non-true logits are equal, their gradient with respect to the true class
vanishes. The gradient of the margin never does.

`"js"` is the Jensen-Shannon divergence between the prediction and the true class (Croce et al., arXiv:2306.12941). It
never exceeds log 2, so predictions that are already wrong do not hide the others.

For a model of positions, with logits `(batch, positions, C)`, the value of a row is the mean over the positions whose
class id is not negative. The margin and the ratio of positions that are already wrong count as 0 there: what counts is
how many are wrong, not by how much.
"""

import math
from typing import Any

from keras import ops

from keras_drsl._typing import Tensor

LOSSES = ("ce", "margin", "dlr")
ATTACK_LOSSES = (*LOSSES, "js")


def objective(loss: str, logits: Tensor, y: Tensor, target: Tensor, *, targeted: bool) -> Tensor:
    """Compute the value that an attack increases, shape `(batch,)`.

    Args:
        loss: `"ce"`, `"margin"`, `"dlr"` or `"js"`. With fewer than four classes, `"dlr"` is the margin.
        logits: Shape `(batch, C)`, or `(batch, positions, C)`.
        y: The true classes, shape `(batch,)`, or `(batch, positions)` and negative where a position does not count.
        target: The target classes, shape `(batch,)`; unused if `targeted` is False.
        targeted: Whether to move towards the target, or away from the true class.
    """
    if len(logits.shape) == 3:
        return _mean_over_positions(loss, logits, y, target, targeted=targeted)
    num_classes = logits.shape[-1]
    is_true = ops.one_hot(y, num_classes, dtype="bool")
    true = ops.sum(ops.where(is_true, logits, 0.0), axis=-1)
    if targeted:
        other = ops.sum(ops.where(ops.one_hot(target, num_classes, dtype="bool"), logits, 0.0), axis=-1)
    else:
        other = ops.max(ops.where(is_true, -float("inf"), logits), axis=-1)
    if loss == "js":
        p = ops.exp((other if targeted else true) - ops.logsumexp(logits, axis=-1))
        divergence = (
            math.log(2.0) + (ops.where(p > 0, p * ops.log(ops.maximum(p, 1e-30)), 0.0) - (1 + p) * ops.log1p(p)) / 2
        )
        return -divergence if targeted else divergence
    if loss == "ce":
        return other - ops.logsumexp(logits, axis=-1) if targeted else ops.logsumexp(logits, axis=-1) - true
    if loss == "margin" or num_classes < 4:
        return other - true
    largest, _ = ops.top_k(logits, 4)
    low = (largest[:, 2] + largest[:, 3]) / 2 if targeted else largest[:, 2]
    return (other - true) / (largest[:, 0] - low + 1e-12)


def _mean_over_positions(loss: str, logits: Tensor, y: Tensor, target: Any, *, targeted: bool) -> Tensor:
    """Return the mean of an objective over the positions of each row that count, shape `(batch,)`."""
    num_positions, num_classes = logits.shape[1:]
    counts = y >= 0
    if targeted:
        target = ops.repeat(target, num_positions, axis=0)
        # A position whose class is the target has nothing to move to.
        counts = ops.logical_and(counts, y != ops.reshape(target, (-1, num_positions)))
    rows = ops.reshape(logits, (-1, num_classes)), ops.reshape(ops.maximum(y, 0), (-1,))
    values = ops.reshape(objective(loss, *rows, target, targeted=targeted), (-1, num_positions))
    if loss in ("margin", "dlr"):
        values = ops.minimum(values, 0.0)
    share = ops.cast(counts, values.dtype)
    return ops.sum(ops.where(counts, values, 0.0), axis=1) / ops.maximum(ops.sum(share, axis=1), 1.0)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return where the prediction is not the true class or a logit is NaN, shape `(batch, ...)` as `y`."""
    wrong = ops.cast(ops.argmax(logits, axis=-1), "int32") != y
    return ops.logical_or(wrong, ops.any(ops.isnan(logits), axis=-1))


def share_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Return 1.0 where the prediction is wrong, or the share of positions that are, float32, shape `(batch,)`."""
    wrong = misclassified(logits, y)
    if len(logits.shape) == 2:
        return ops.cast(wrong, "float32")
    counts = ops.cast(y >= 0, "float32")
    return ops.sum(ops.cast(wrong, "float32") * counts, axis=1) / ops.maximum(ops.sum(counts, axis=1), 1.0)
