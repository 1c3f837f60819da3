"""What an attack drives up: functions of logits `(batch, C)`, the true class and a rival, one value a row.

Symbols: z the logits, y the true class, t the rival aimed at (untargeted: any), z_(k) the k-th largest logit.

             untargeted                                  targeted
    ce       logsumexp(z) - z_y                          z_t - logsumexp(z)
    margin   max_{k != y} z_k - z_y                      z_t - z_y
    dlr      (max_{k != y} z_k - z_y) / (z_(1) - z_(3))  (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

The difference of logits ratio (dlr) and its targeted form are those of Croce and Hein, arXiv:2003.01690: they do not
change with the scale of the logits. Where the rivals are level, their gradient with respect to the true class
vanishes; the margin's never does.
"""

from typing import Any

from keras import ops

LOSSES = ("ce", "margin", "dlr")


def objective(loss: str, logits: Any, y: Any, target: Any, *, targeted: bool) -> Any:
    """The value to drive up, shape `(batch,)`. With fewer than four classes "dlr" is the margin."""
    classes = logits.shape[-1]
    is_true = ops.one_hot(y, classes, dtype="bool")
    true = ops.sum(ops.where(is_true, logits, 0.0), axis=-1)
    if targeted:
        rival = ops.sum(ops.where(ops.one_hot(target, classes, dtype="bool"), logits, 0.0), axis=-1)
    else:
        rival = ops.max(ops.where(is_true, -float("inf"), logits), axis=-1)
    if loss == "ce":
        return rival - ops.logsumexp(logits, axis=-1) if targeted else ops.logsumexp(logits, axis=-1) - true
    if loss == "margin" or classes < 4:
        return rival - true
    largest, _ = ops.top_k(logits, 4)
    low = (largest[:, 2] + largest[:, 3]) / 2 if targeted else largest[:, 2]
    return (rival - true) / (largest[:, 0] - low + 1e-12)
