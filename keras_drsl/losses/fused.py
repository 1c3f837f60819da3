"""Compute the distribution-restrained softmax loss and its gradient together, in one pass over the logits.

Automatic differentiation of the formula stores the softmax, its logarithm, a one-hot and a mask, each as large as the
logits. Here value and gradient are computed together from closed forms, one block of rows at a time, while the block
is in the processor's cache. The gradient is the only array of the size of the logits that is stored.

The formulas are for class ids, in log space. Symbols: `p = softmax(z)`; `t`: 1 for the true class and 0 for the others;
`w = 1 - t`; `m`: the mean of the non-true logits; `d = w (z - m)`: their deviations; `a`: the label smoothing;
`c = lam` for the sum of squares, `c = lam / (C - 1)` for the variance.

- `value = log(sum exp z) - (1 - a) z_true - a mean(z) + c sum d^2`
- `gradient = p - (1 - a) t - a / C + 2 c d`
- `Hessian u = p (u - sum(p u)) + 2 c w (u - sum(w u) / (C - 1))`, a product with a vector `u`, for second derivatives.

Reference: arXiv:2303.12363 for the loss. The computation in blocks is our own.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl.predictions import LossInputs, is_true_class

# The one pass is used for this many classes or more. With 10 classes, the formula as it is written is as fast for small
# batches, needs no separate compilation, and is faster for large batches in a training step that XLA compiles as a
# whole.
MIN_CLASSES = 64

# Deviations are measured from the mean of the non-true logits among the first classes, this many. See
# `_value_and_gradient_of_rows`.
NEARBY_CLASSES = 64

# Programs for more numbers of classes than this replace the oldest ones. Each is compiled for at most four numbers of
# rows between a power of two and the next: see `pad_rows`.
MAX_PROGRAMS = 32

# A block holds at most this share of all rows, or memory would grow with the number of cores.
LARGEST_SHARE = 1 / 128


class BlockPlan(NamedTuple):
    """Set the size of the blocks of rows.

    Attributes:
        cores: How many processor cores work on a block; None for one block of all rows.
        logits_per_core: How many logits of a block one core works on. The default is 256 KiB in float32: the logits and
            what is computed from them stay in the core's cache.
    """

    cores: int | None
    logits_per_core: int = 2**16


def should_fuse(inputs: LossInputs, space: str) -> bool:
    """Return whether to compute the loss in one pass: whether the formula allows it, XLA exists and rows are long."""
    scores = inputs.scores
    supported = _backend.HAS_XLA and inputs.sparse and inputs.from_logits and space == "log_softmax"
    # A `KerasTensor` cannot be computed, and a symbolic length of `jax.export` cannot be divided into blocks.
    concrete = not isinstance(scores, keras.KerasTensor) and all(n is None or isinstance(n, int) for n in scores.shape)
    return supported and concrete and scores.shape[-1] >= MIN_CLASSES


def fused_drs_loss(
    class_ids: Tensor,
    logits: Tensor,
    scale: Tensor,
    *,
    lam: Tensor | float,
    spread: str,
    label_smoothing: float,
    plan: BlockPlan | None = None,
) -> Tensor:
    """Compute the loss of each position. It can be differentiated with respect to `logits` any number of times.

    Args:
        class_ids: Int32, shape `(...)`, all within `[0, C)`.
        logits: Shape `(..., C)`.
        scale: The factor of each value and its gradient, shape `(...)`. Where it is 0, both are 0 for arbitrary logits.
        lam: The strength of the penalty, a number or a tensor.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: A number in [0, 1).
        plan: The size of the blocks, by default for the running device.

    Returns:
        Shape `(...)`, the dtype of `logits`.
    """
    classes = logits.shape[-1]
    strength = lam / (classes - 1) if spread == "variance" else lam
    dtype = keras.backend.standardize_dtype(logits.dtype)
    plan = BlockPlan(_backend.cpu_cores()) if plan is None else plan
    rows = ops.reshape(logits, (-1, classes)), ops.reshape(class_ids, (-1,)), ops.reshape(scale, (-1,))
    # The scale of added rows is 0, so they are ignored.
    padded, *constants = _backend.pad_rows(*rows)
    numbers = ops.cast(strength, dtype), ops.cast(label_smoothing, dtype)
    program = compiled_program(classes, dtype, plan)
    values = _backend.custom_gradient(program, _hessian_product, padded, *constants, *numbers)
    return ops.reshape(values[: ops.shape(rows[0])[0]], ops.shape(logits)[:-1])


@lru_cache(maxsize=MAX_PROGRAMS)
def compiled_program(classes: int, dtype: str, plan: BlockPlan) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the program of value and gradient. It is cached so that it is traced once."""
    specs = ((None, classes), dtype), ((None,), "int32"), ((None,), dtype), ((), dtype), ((), dtype)
    return _backend.jit(partial(value_and_gradient, plan), *specs)


def value_and_gradient(
    plan: BlockPlan, logits: Tensor, class_ids: Tensor, scale: Tensor, strength: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the values of all rows, and their gradient."""
    block = partial(_value_and_gradient_of_rows, strength, smoothing)
    return _in_blocks(block, plan, logits, class_ids, scale, _backend.gather_rows(logits, class_ids))


def _value_and_gradient_of_rows(
    strength: Tensor, smoothing: Tensor, logits: Tensor, class_ids: Tensor, scale: Tensor, true_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the values of some rows, and their gradient."""
    classes = logits.shape[-1]
    scale = ops.expand_dims(scale, -1)
    is_true = is_true_class(class_ids, classes)
    top = ops.max(logits, axis=-1, keepdims=True)
    # At ignored positions logits may be NaN. They are replaced here, and `scale` sets all that follows to 0.
    z = ops.where(scale == 0, 0.0, logits - top)
    z_true = ops.where(scale == 0, 0.0, ops.expand_dims(true_logits, -1) - top)
    exp_z = ops.exp(z)
    total_exp = ops.sum(exp_z, axis=-1, keepdims=True)
    # A sum of many numbers far from 0 is rounded, and for equal non-true logits the errors of their deviations have the
    # same sign. So deviations are measured from a value near all of these logits: the mean of some of them.
    first = min(NEARBY_CLASSES, classes)
    among_first = ops.cast(class_ids < first, z.dtype)[:, None]
    near = ops.sum(ops.where(is_true[:, :first], 0.0, z[:, :first]), axis=-1, keepdims=True) / (first - among_first)
    distance = z - near
    mean = ops.sum(ops.where(is_true, 0.0, distance), axis=-1, keepdims=True) / (classes - 1)
    deviation = ops.where(is_true, 0.0, distance - mean)
    total = (near + mean) * (classes - 1) + z_true
    values = (
        ops.log(total_exp)
        - (1 - smoothing) * z_true
        - (smoothing / classes) * total
        + strength * ops.sum(ops.square(deviation), axis=-1, keepdims=True)
    )
    gradient = exp_z * (scale / total_exp) + ops.where(
        is_true, (smoothing - 1) * scale, (2 * strength * scale) * deviation
    )
    gradient = gradient - smoothing / classes * scale
    return ops.squeeze(values * scale, -1), gradient


def _hessian_product(
    logits: Tensor, class_ids: Tensor, scale: Tensor, strength: Tensor, smoothing: Tensor, vector: Tensor
) -> Tensor:
    """Multiply the second derivative of each value by a vector. The smoothing has no part in it."""
    classes = logits.shape[-1]
    scale = ops.expand_dims(scale, -1)
    p = ops.softmax(ops.where(scale == 0, 0.0, logits), axis=-1)
    w = 1.0 - ops.cast(is_true_class(class_ids, classes), logits.dtype)
    product = p * (vector - ops.sum(p * vector, axis=-1, keepdims=True)) + 2 * strength * w * (
        vector - ops.sum(w * vector, axis=-1, keepdims=True) / (classes - 1)
    )
    return product * scale


def _in_blocks(
    block: Callable[..., tuple[Tensor, Tensor]], plan: BlockPlan, logits: Tensor, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `block` for a few rows at a time. The last block overlaps the one before, so that all have one size."""
    count, classes = ops.shape(logits)[0], logits.shape[-1]
    if plan.cores is None:
        # An accelerator's compiler fuses the operations and stores nothing; on several devices, each has its own rows.
        return block(logits, *rows)
    rows_per_core = max(1, plan.logits_per_core // classes)
    size, smallest = plan.cores * rows_per_core, 2 * rows_per_core
    if isinstance(count, int):
        size = min(size, max(smallest, int(count * LARGEST_SHARE)))
        if count <= size:
            return block(logits, *rows)
    else:
        share = ops.cast(ops.cast(count, "float32") * LARGEST_SHARE, "int32")
        size = ops.minimum(ops.minimum(size, ops.maximum(smallest, share)), count)

    def step(i: Tensor, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        start = ops.minimum(i * size, count - size)
        part = (ops.slice(x, (start,), (size,)) for x in rows)
        values, gradient = block(ops.slice(logits, (start, 0), (size, classes)), *part)
        return ops.slice_update(results[0], (start,), values), ops.slice_update(results[1], (start, 0), gradient)

    empty = (ops.zeros((count,), dtype=logits.dtype), ops.zeros((count, classes), dtype=logits.dtype))
    blocks = (count + size - 1) // (size if isinstance(size, int) else ops.maximum(size, 1))
    results: tuple[Tensor, Tensor] = ops.fori_loop(0, blocks, step, empty)
    return results
