"""Cross-entropy plus the restraint, value and gradient together, in one pass over the logits.

Automatic differentiation of the formula keeps the softmax, its logarithm, a one-hot and a mask, each as large as the
logits. Here the closed forms of value and gradient are computed together, a block of rows at a time, while the block
lies in the processor's cache: nothing of that size is kept but the gradient itself.

For class ids, in log space. With `p = softmax(z)`, `t = 1` on the true class and 0 elsewhere, `w = 1 - t`,
`m` the mean and `d = w (z - m)` the deviation of the rivals' logits, smoothing `a`, and `c = lam` for the sum of
squares or `lam / (C - 1)` for the variance:

- `value = log(sum exp z) - (1 - a) z_true - a mean(z) + c sum d^2`
- `gradient = p - (1 - a) t - a / C + 2 c d`
- `Hessian u = p (u - sum(p u)) + 2 c w (u - sum(w u) / (C - 1))`, for whoever differentiates twice.

Reference: arXiv:2303.12363 for the loss; the block-wise form is ours.
"""

from functools import lru_cache, partial
from typing import Any

import keras
from keras import ops

from keras_drsl import _backend

# How many logits of a block a processor core works on: 256 KiB in float32, to stay in its cache with what is made of
# them.
LOGITS_PER_CORE = 2**16

# How many classes are asked where the rivals' logits lie.
FIRST = 64

# However many the cores, a block of many logits holds no more than this share of them all: memory is its price.
LARGEST_SHARE = 1 / 128

# Below, rows are too short to be worked on several at a time: at 10 classes the formula is as fast for small batches,
# needs no compilation of its own, and is faster for large batches in a training step that XLA compiles as a whole.
MIN_CLASSES = 64


def drs_loss(class_ids: Any, logits: Any, scale: Any, *, lam: float, spread: str, label_smoothing: float) -> Any:
    """The loss of each position, differentiable with respect to `logits` as often as needed.

    Args:
        class_ids: int32, shape `(...)`, all within `[0, C)`.
        logits: shape `(..., C)`.
        scale: what to multiply each value and its gradient by, shape `(...)`; where it is 0 both are 0 whatever the
            logits are.
        lam: the strength of the restraint.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: a number in [0, 1).

    Returns:
        Shape `(...)`, the dtype of `logits`.
    """
    classes = logits.shape[-1]
    strength = lam / (classes - 1) if spread == "variance" else lam
    dtype = keras.backend.standardize_dtype(logits.dtype)
    value_and_gradient, hessian_product = _programs(label_smoothing, classes, dtype)
    rows = ops.reshape(logits, (-1, classes))
    constants = ops.reshape(class_ids, (-1,)), ops.reshape(scale, (-1,)), ops.cast(strength, dtype)
    values = _backend.with_gradient(value_and_gradient, hessian_product, rows, *constants)
    return ops.reshape(values, ops.shape(logits)[:-1])


def helps(classes: int) -> bool:
    """Whether the one pass is faster than the formula: where XLA compiles it and rows are long enough to gain by it."""
    return _backend.compiles() and classes >= MIN_CLASSES


@lru_cache(maxsize=64)
def _programs(smoothing: float, classes: int, dtype: str) -> tuple[Any, Any]:
    """The two programs for one setting; made once, so that they are traced once."""

    def block(strength: Any, logits: Any, class_ids: Any, scale: Any, true_logits: Any) -> tuple[Any, Any]:
        scale = ops.expand_dims(scale, -1)
        is_true = ops.arange(classes, dtype="int32") == ops.expand_dims(class_ids, -1)
        top = ops.max(logits, axis=-1, keepdims=True)
        # Logits that don't count, NaN perhaps, are left behind here, and `scale` makes 0 of what follows.
        z = ops.where(scale == 0, 0.0, logits - top)
        z_true = ops.where(scale == 0, 0.0, ops.expand_dims(true_logits, -1) - top)
        exp_z = ops.exp(z)
        total_exp = ops.sum(exp_z, axis=-1, keepdims=True)
        # Sums of many numbers far from 0 are a little off, and where the rivals are level for all of them in the same
        # direction. Some rivals' mean is a place near them all to measure from.
        first = min(FIRST, classes)
        among = ops.cast(class_ids < first, z.dtype)[:, None]
        near = ops.sum(ops.where(is_true[:, :first], 0.0, z[:, :first]), axis=-1, keepdims=True) / (first - among)
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
        if smoothing:
            gradient = gradient - smoothing / classes * scale
        return ops.squeeze(values * scale, -1), gradient

    def value_and_gradient(logits: Any, class_ids: Any, scale: Any, strength: Any) -> tuple[Any, Any]:
        return _by_blocks(partial(block, strength), logits, class_ids, scale, _backend.pick(logits, class_ids))

    def hessian_product(logits: Any, class_ids: Any, scale: Any, strength: Any, vector: Any) -> Any:
        scale = ops.expand_dims(scale, -1)
        p = ops.softmax(ops.where(scale == 0, 0.0, logits), axis=-1)
        w = 1.0 - ops.one_hot(class_ids, classes, dtype=logits.dtype)
        product = p * (vector - ops.sum(p * vector, axis=-1, keepdims=True)) + 2 * strength * w * (
            vector - ops.sum(w * vector, axis=-1, keepdims=True) / (classes - 1)
        )
        return product * scale

    program = _backend.compiled(
        value_and_gradient, ((None, classes), dtype), ((None,), "int32"), ((None,), dtype), ((), dtype)
    )
    return program, hessian_product


def _by_blocks(block: Any, logits: Any, *rows: Any) -> tuple[Any, Any]:
    """`block` of all rows, a few at a time; the last block overlaps the one before it rather than being shorter."""
    count, classes = ops.shape(logits)[0], logits.shape[-1]
    cores = _backend.cpu_cores()
    if cores is None:
        # An accelerator's compiler fuses all of it and keeps nothing; several devices have their own rows each.
        return block(logits, *rows)
    size = cores * max(1, LOGITS_PER_CORE // classes)
    floor = 2 * max(1, LOGITS_PER_CORE // classes)
    if isinstance(count, int):
        size = min(size, max(floor, int(count * LARGEST_SHARE)))
        if count <= size:
            return block(logits, *rows)
    else:
        share = ops.cast(ops.cast(count, "float32") * LARGEST_SHARE, "int32")
        size = ops.minimum(ops.minimum(size, ops.maximum(floor, share)), count)

    def step(i: Any, results: tuple[Any, Any]) -> tuple[Any, Any]:
        start = ops.minimum(i * size, count - size)
        part = (ops.slice(x, (start,), (size,)) for x in rows)
        values, gradient = block(ops.slice(logits, (start, 0), (size, classes)), *part)
        return ops.slice_update(results[0], (start,), values), ops.slice_update(results[1], (start, 0), gradient)

    empty = (ops.zeros((count,), dtype=logits.dtype), ops.zeros((count, classes), dtype=logits.dtype))
    blocks = (count + size - 1) // (size if isinstance(size, int) else ops.maximum(size, 1))
    return ops.fori_loop(0, blocks, step, empty)
