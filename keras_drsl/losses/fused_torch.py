"""Compute the closed forms of `fused.py` on PyTorch, which runs one operation at a time.

There is no compiler that fuses operations, so most of them write into an array that exists. A block of rows stays in
the processor's cache from the first operation to the last.
"""

import torch

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl.losses.forms import BlockPlan, Form


def value_and_gradient(
    form: Form, plan: BlockPlan, logits: Tensor, labels: Tensor, scale: Tensor, lam: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the values of all rows, and their gradient."""
    rows, classes = logits.shape
    values, gradient = logits.new_empty(rows), torch.empty_like(logits)
    size = max(rows, 1)
    if plan.cores is not None and logits.device.type == "cpu":
        size = max(1, plan.cores * (plan.logits_per_core or _backend.LOGITS_PER_CORE[1]) // classes)
    for start in range(0, rows, size):
        some = slice(start, start + size)
        values[some] = _block(form, logits[some], labels[some], scale[some, None], lam, smoothing, gradient[some])[:, 0]
    return values, gradient


def _block(
    form: Form, logits: Tensor, labels: Tensor, scale: Tensor, lam: Tensor, smoothing: Tensor, gradient: Tensor
) -> Tensor:
    """Write the gradient of some rows into `gradient`, and return their values, shape `(rows, 1)`."""
    classes = logits.shape[1]
    if form.masked:
        # At ignored positions logits may be NaN.
        logits = logits.masked_fill(scale == 0, 0.0)
    log_p = torch.log_softmax(logits, -1, out=gradient)
    if form.sparse:
        true = labels.long()[:, None]
        count = classes - 1
        # Deviations are measured from a non-true logit, so that those of equal logits are exactly 0.
        weighted = deviation = logits - logits.gather(1, (true + 1) % classes)
        total = deviation.scatter_(1, true, 0.0).sum(-1, keepdim=True)
        deviation.sub_(total / count).scatter_(1, true, 0.0)
        squares = torch.linalg.vector_norm(deviation, dim=-1, keepdim=True).square_()
        true_log_p = log_p.gather(1, true)
        mass = 1.0
    else:
        mass = labels.sum(-1, keepdim=True)
        count = classes - mass
        weighted = 1 - labels
        deviation = logits - logits.gather(1, labels.argmin(-1, keepdim=True))
        deviation.sub_((weighted * deviation).sum(-1, keepdim=True) / count)
        weighted.mul_(deviation)
        squares = deviation.mul_(weighted).sum(-1, keepdim=True)
        true_log_p = (labels * log_p).sum(-1, keepdim=True)
    strength = lam / count if form.spread == "variance" else lam
    values = strength * squares - true_log_p
    if form.smooth:
        values += smoothing * (true_log_p - log_p.mean(-1, keepdim=True))
        mass = (1 - smoothing) * mass + smoothing
    given = (1 - smoothing) * scale
    log_p.exp_().mul_(mass * scale).addcmul_(weighted, 2 * strength * scale)
    if form.smooth:
        log_p.sub_(smoothing / classes * scale)
    if form.sparse:
        log_p.scatter_add_(1, true, -given)
    else:
        log_p.addcmul_(labels, given, value=-1)
    return values * scale
