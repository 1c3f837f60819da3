"""Compute the distribution-restrained softmax loss and its gradient together, in one pass over the logits.

Automatic differentiation of the formula stores the softmax, its logarithm, a one-hot and a mask, each as large as the
logits. Here value and gradient are computed together from closed forms, one block of rows at a time, while the block
is in the processor's cache. The gradient is the only array of the size of the logits that is stored.

The formulas are for logits, in log space. Symbols: `p = softmax(z)`; `y`: the label distribution, 1 for the true class
and 0 for the others where labels are class ids; `a`: the label smoothing; `u = (1 - a) y + a / C`: the smoothed labels;
`w = 1 - y`; `n = sum w`; `m = sum(w z) / n`: the mean of the non-true logits; `d = z - m`: their deviations;
`c = lam` for the sum of squares, `c = lam / n` for the variance.

- `value = sum(u) log(sum exp z) - sum(u z) + c sum(w d^2)`
- `gradient = sum(u) p - u + 2 c w d`

PyTorch runs its operations one by one; `fused_torch.py` computes the same there with fewer arrays.

All other derivatives, as the second ones and those with respect to label distributions, are those of the formula as it
is written, `formula`.

Reference: arXiv:2303.12363 for the loss. The computation in blocks is our own.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl.losses.forms import BlockPlan, Form
from keras_drsl.predictions import LossInputs, is_distribution, is_true_class, mask_values
from keras_drsl.spread import smallest_number, spread

# Up to this many logits, the formula as it is written is as fast, and needs no separate compilation.
FEW_LOGITS = 2**13

# A processor computes this many classes or more row by row. With fewer, it computes the rows side by side: a sum over
# a few numbers does not fill its vector registers.
LONG_ROWS = 64

# Deviations are measured from the largest non-true logit among the first classes, this many. See
# `_value_and_gradient`.
NEARBY_CLASSES = 64

# Programs for more numbers of classes than this replace the oldest ones. Each is compiled for at most four numbers of
# rows between a power of two and the next: see `pad_rows`.
MAX_PROGRAMS = 32

# A block holds at most this share of all rows, or memory would grow with the number of cores, but may always hold this
# many logits.
LARGEST_SHARE = 1 / 256
SMALLEST_BLOCK = 3 * 2**15


def should_fuse(inputs: LossInputs, space: str) -> bool:
    """Return whether to compute the loss in one pass: whether the formula and the backend allow it."""
    scores = inputs.scores
    if isinstance(scores, keras.KerasTensor) or not all(n is None or isinstance(n, int) for n in scores.shape):
        # The first cannot be computed, and a symbolic length of `jax.export` cannot be divided into blocks.
        return False
    few = None not in scores.shape and math.prod(scores.shape) <= FEW_LOGITS
    in_log_space = inputs.from_logits and space == "log_softmax"
    return in_log_space and not few and _backend.allows_custom_gradient(scores, inputs.labels)


def fused_drs_loss(
    labels: Tensor,
    logits: Tensor,
    scale: Tensor,
    *,
    lam: Tensor | float,
    spread: str,
    label_smoothing: float,
    masked: bool = True,
    plan: BlockPlan | None = None,
) -> Tensor:
    """Compute the loss of each position. It can be differentiated any number of times.

    Args:
        labels: Class ids, int32, shape `(...)`, all within `[0, C)`; or a label distribution, shape `(..., C)`.
        logits: Shape `(..., C)`.
        scale: The factor of each value and its gradient, shape `(...)`. Values of labels that are not a distribution
            are NaN, unless it is 0.
        lam: The strength of the penalty, a number or a tensor.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: A number in [0, 1).
        masked: Whether value and gradient are 0 for arbitrary logits where `scale` is 0.
        plan: The size of the blocks, by default for the running device.

    Returns:
        Shape `(...)`, the dtype of `logits`.
    """
    classes = logits.shape[-1]
    dtype = keras.backend.standardize_dtype(logits.dtype)
    form = Form(spread, label_smoothing > 0, masked, sparse=len(labels.shape) < len(logits.shape))
    plan = BlockPlan(_backend.cpu_cores()) if plan is None else plan
    label_rows = ops.reshape(labels, (-1,) if form.sparse else (-1, classes))
    rows = ops.reshape(logits, (-1, classes)), label_rows, ops.reshape(scale, (-1,))
    # The scale of added rows is 0.
    padded = _backend.pad_rows(*rows)
    # Not `ops.cast`, which rounds a number to float32 first.
    numbers = ops.convert_to_tensor(lam, dtype), ops.convert_to_tensor(label_smoothing, dtype)
    program = compiled_program(classes, dtype, form, plan)
    values = _backend.custom_gradient(program, partial(formula, form), *padded, *numbers)
    return ops.reshape(values[: ops.shape(rows[0])[0]], ops.shape(logits)[:-1])


def formula(form: Form, logits: Tensor, labels: Tensor, scale: Tensor, lam: Tensor, smoothing: Tensor) -> Tensor:
    """Compute the values of all rows as the formula is written."""
    y = _distribution(form, labels, logits)
    z = ops.where(ops.expand_dims(scale == 0, -1), 0.0, logits) if form.masked else logits
    smoothed = (1 - smoothing) * y + smoothing / logits.shape[-1]
    values = lam * spread(z, y, kind=form.spread) - ops.sum(smoothed * ops.log_softmax(z, axis=-1), axis=-1)
    return scale * values


def _distribution(form: Form, labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels of either form as a distribution."""
    return ops.cast(is_true_class(labels, logits.shape[-1]), logits.dtype) if form.sparse else labels


@lru_cache(maxsize=MAX_PROGRAMS)
def compiled_program(classes: int, dtype: str, form: Form, plan: BlockPlan) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the program of value and gradient. It is cached so that it is traced once."""
    if not _backend.HAS_XLA:  # pragma: no cover, on torch only
        from keras_drsl.losses import fused_torch

        return partial(fused_torch.value_and_gradient, form, plan)
    labels = ((None,), "int32") if form.sparse else ((None, classes), dtype)
    specs = ((None, classes), dtype), labels, ((None,), dtype), ((), dtype), ((), dtype)
    return _backend.jit(partial(value_and_gradient, form, plan), *specs)


def value_and_gradient(
    form: Form, plan: BlockPlan, logits: Tensor, labels: Tensor, scale: Tensor, lam: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the values of all rows, and their gradient."""
    classes = logits.shape[-1]
    if plan.cores is None:
        # An accelerator's compiler fuses the operations and stores nothing; on several devices, each has its own rows.
        return _row_by_row(partial(ops.sum, axis=-1, keepdims=True), form, lam, smoothing, logits, labels, scale)
    if classes < LONG_ROWS:
        block, per_core = _side_by_side, _backend.LOGITS_PER_CORE[0]
    else:
        # A processor multiplies matrices faster than it adds the numbers of a row.
        ones = ops.ones((classes, 1), dtype=logits.dtype)
        block, per_core = partial(_row_by_row, lambda x: ops.matmul(x, ones)), _backend.LOGITS_PER_CORE[1]
    per_core = plan.logits_per_core or per_core
    # Two cores share the rows of a block: of one row, they would share nothing.
    fewest = min(plan.cores, 2)
    most, least = (max(fewest, number // classes) for number in (plan.cores * per_core, min(SMALLEST_BLOCK, per_core)))
    return _in_blocks(partial(block, form, lam, smoothing), most, least, logits, labels, scale)


def _row_by_row(
    total: Callable[[Tensor], Tensor],
    form: Form,
    lam: Tensor,
    smoothing: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the values of some rows, and their gradient; `total` sums over the classes."""
    y = _distribution(form, labels, logits)
    values, gradient = _value_and_gradient(total, -1, form, lam, smoothing, logits, y, ops.expand_dims(scale, -1))
    return ops.squeeze(values, -1), gradient


def _side_by_side(
    form: Form, lam: Tensor, smoothing: Tensor, logits: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the values of some rows, and their gradient, with the classes at the first axis."""
    z = ops.transpose(logits)
    y = ops.cast(is_true_class(labels, z.shape[0], axis=0), z.dtype) if form.sparse else ops.transpose(labels)
    total = partial(ops.sum, axis=0, keepdims=True)
    values, gradient = _value_and_gradient(total, 0, form, lam, smoothing, z, y, scale[None])
    return ops.squeeze(values, 0), ops.transpose(gradient)


def _value_and_gradient(
    total: Callable[[Tensor], Tensor],
    axis: int,
    form: Form,
    lam: Tensor,
    smoothing: Tensor,
    logits: Tensor,
    y: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the closed forms, with the classes at `axis`. Values and scale have the length 1 there."""
    classes = logits.shape[axis]
    z = logits - ops.max(logits, axis=axis, keepdims=True)
    if form.masked:
        # At ignored positions logits may be NaN.
        z = ops.where(scale == 0, 0.0, z)
    w = 1 - y
    exp_z = ops.exp(z)
    # Not `total`: a product with ones adds all numbers to the largest one, and would lose the smallest.
    total_exp = ops.sum(exp_z, axis=axis, keepdims=True)
    mass = 1.0 if form.sparse else total(y)
    count = classes - mass
    # A sum of many numbers far from 0 is rounded, and for equal non-true logits the errors of their deviations have the
    # same sign. So deviations are measured from one of these logits: those of equal ones are exactly 0.
    first = slice(min(NEARBY_CLASSES, classes))
    w_first, z_first = (x[..., first] if axis else x[first] for x in (w, z))
    near = ops.max(ops.where(w_first > 0, z_first, smallest_number(z)), axis=axis, keepdims=True)
    distance = z - near
    deviation = distance - total(w * distance) / count
    weighted = w * deviation
    strength = lam / count if form.spread == "variance" else lam
    smoothed, true_logit = y, total(y * z)
    if not form.sparse:
        right = ops.logical_or(scale == 0, is_distribution(y, mass, axis=axis, keepdims=True))
        scale = mask_values(scale, None, right)
    if form.smooth:
        mass = (1 - smoothing) * mass + smoothing
        smoothed = (1 - smoothing) * y + smoothing / classes
        true_logit = (1 - smoothing) * true_logit + smoothing / classes * total(z)
    values = mass * ops.log(total_exp) - true_logit + strength * total(weighted * deviation)
    gradient = exp_z * (mass * scale / total_exp) + scale * (2 * strength * weighted - smoothed)
    return values * scale, gradient


def _in_blocks(
    block: Callable[..., tuple[Tensor, Tensor]], most: int, least: int, logits: Tensor, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `block` for a few rows at a time. The last block overlaps the one before, so that all have one size.

    Args:
        block: Maps some rows to their values and gradient.
        most: The number of rows of a block where there are very many.
        least: The number of rows of a block where there are few.
        logits: Shape `(rows, classes)`.
        *rows: Tensors of the same length.
    """
    count, classes = ops.shape(logits)[0], logits.shape[-1]
    size: Any
    if isinstance(count, int):
        size = min(most, max(least, int(count * LARGEST_SHARE)))
        if count <= size:
            return block(logits, *rows)
    else:
        share = ops.cast(ops.cast(count, "float32") * LARGEST_SHARE, "int32")
        size = ops.minimum(ops.minimum(most, ops.maximum(least, share)), count)

    def part(x: Tensor, start: Tensor) -> Tensor:
        return ops.slice(x, (start, *[0] * (len(x.shape) - 1)), (size, *x.shape[1:]))

    def step(i: Tensor, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        start = ops.minimum(i * size, count - size)
        values, gradient = block(*(part(x, start) for x in (logits, *rows)))
        return ops.slice_update(results[0], (start,), values), ops.slice_update(results[1], (start, 0), gradient)

    empty = (ops.zeros((count,), dtype=logits.dtype), ops.zeros((count, classes), dtype=logits.dtype))
    blocks = (count + size - 1) // (size if isinstance(size, int) else ops.maximum(size, 1))
    results: tuple[Tensor, Tensor] = ops.fori_loop(0, blocks, step, empty)
    return results
