"""The distribution-restrained softmax loss of a linear head, without its logits."""

from functools import cache
from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _backend, _inputs
from keras_drsl.losses.drs import check_smoothing
from keras_drsl.spread import SPREADS


def linear_drs_loss(
    y_true: Any,
    features: Any,
    kernel: Any,
    bias: Any = None,
    lam: float = 0.3,
    *,
    chunk_size: int = 8192,
    spread: str = "sum_of_squares",
    label_smoothing: float = 0.0,
    ignore_class: int | None = None,
) -> Any:
    """`drs_loss` of the logits `features @ kernel + bias`, which are never held in memory together.

    Use it in a custom training step where a vocabulary-sized head makes the logits the largest tensor of all. They are
    computed `chunk_size` classes at a time, twice: once for the loss, once more for the gradient. The price is one
    more matrix product, three to four; what is saved is every array of `batch x C`.

    Formula: as `keras_drsl.DRSLoss` in log space. The log-sum-exp and the rivals' mean and centred sum of squares are
    merged chunk by chunk: with `n, m, q` the count, mean and centred sum so far and `k, a, s` those of a chunk,
    `q <- q + s + (a - m)^2 n k / (n + k)` and `m <- m + (a - m) k / (n + k)`.

    Edges: as `keras_drsl.DRSLoss`; half-precision inputs are multiplied and accumulated in float32, and gradients come
    back in the dtypes of the inputs. It can be differentiated once. On TensorFlow and JAX.

    Args:
        y_true: class ids, shape `(...)` or `(..., 1)`.
        features: what the head is applied to, shape `(..., D)`.
        kernel: shape `(D, C)`.
        bias: shape `(C,)`, or None.
        lam: the strength of the restraint, a number >= 0.
        chunk_size: how many classes at a time, >= 1; memory grows with `batch x chunk_size`.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: a number in [0, 1).
        ignore_class: the id of a class whose positions are 0 and carry a Keras mask, or None.

    Returns:
        The loss of each position, shape `(...)`, float32 (float64 for float64 features).

    Raises:
        ValueError: for arguments out of their range, shapes that don't match, and class ids outside `[0, C)` as
            `keras_drsl.DRSLoss`.
        RuntimeError: on the torch backend.

    Example:

    >>> head = keras.layers.Dense(50_000)
    >>> features = keras.random.normal((4, 16), seed=0)
    >>> head.build(features.shape)
    >>> values = keras_drsl.linear_drs_loss(np.arange(4), features, head.kernel, head.bias)
    >>> dense = keras_drsl.drs_loss(np.arange(4), head(features), from_logits=True)
    >>> bool(keras.ops.all(keras.ops.isclose(values, dense, rtol=1e-4)))
    True

    Reference: arXiv:2303.12363 for the loss; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
    arXiv:2411.09009, for the idea of not holding the logits.
    """
    if not _backend.compiles():
        raise RuntimeError(
            f"`linear_drs_loss` needs TensorFlow or JAX. Received: KERAS_BACKEND={keras.config.backend()}"
        )
    lam = _arguments.check_non_negative("lam", lam)
    label_smoothing = check_smoothing(label_smoothing)
    _arguments.check_choice("spread", spread, SPREADS)
    chunk_size = _arguments.check_integer("chunk_size", chunk_size, at_least=1)

    features, kernel = ops.convert_to_tensor(features), ops.convert_to_tensor(kernel)
    size, classes = _check_shapes(features, kernel, bias)
    bias = ops.zeros((classes,), kernel.dtype) if bias is None else ops.convert_to_tensor(bias)
    positions = tuple(features.shape)[:-1]
    labels = _inputs.read_class_ids(
        y_true, positions, classes, mask=_backend.mask_of(features), ignore_class=ignore_class
    )

    strength = lam / (classes - 1) if spread == "variance" else lam
    dtypes = tuple(keras.backend.standardize_dtype(x.dtype) for x in (features, kernel, bias))
    forward, backward = _programs(strength, label_smoothing, min(chunk_size, classes), size, classes, dtypes)
    compute_dtype = _compute_dtype(dtypes[0])
    values = _backend.with_backward(
        forward,
        backward,
        (ops.reshape(features, (-1, size)), kernel, bias),
        (ops.reshape(labels.ids, (-1,)), ops.reshape(labels.scale(compute_dtype), (-1,))),
    )
    values = ops.reshape(values, ops.shape(features)[:-1])
    return values if ignore_class is None else _backend.with_mask(values, labels.valid)


def _check_shapes(features: Any, kernel: Any, bias: Any) -> tuple[int, int]:
    """The number of features and of classes."""
    head = tuple(kernel.shape)
    bias_shape = head[1:] if bias is None else tuple(bias.shape)
    received = f"Received: features.shape={tuple(features.shape)}, kernel.shape={head}, bias.shape={bias_shape}"
    if len(head) != 2 or len(features.shape) < 2 or features.shape[-1] != head[0]:
        raise ValueError(f"`features` and `kernel` must have the shapes (..., D) and (D, C). {received}")
    if head[1] < 2:
        raise ValueError(f"`kernel` must have two classes or more. {received}")
    if bias_shape != head[1:]:
        raise ValueError(f"`bias` must have the shape (C,). {received}")
    return head[0], head[1]


def _compute_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


@cache
def _programs(
    strength: float, smoothing: float, chunk: int, size: int, classes: int, dtypes: tuple[str, ...]
) -> tuple[Any, Any]:
    """The compiled programs of the values and of their gradients for one setting."""
    compute_dtype = _compute_dtype(dtypes[0])
    full, rest = divmod(classes, chunk)

    def over_chunks(step: Any, state: Any) -> Any:
        """`step(start, width, state)` for all chunks: equal ones in a loop, then what is left."""
        state = ops.fori_loop(0, full, lambda i, state: step(i * chunk, chunk, state), state)
        return step(full * chunk, rest, state) if rest else state

    def logits_of(features: Any, kernel: Any, bias: Any, ids: Any, start: Any, width: int) -> tuple[Any, ...]:
        """The part of the kernel, its logits, and which of them are true ones."""
        part = ops.cast(ops.slice(kernel, (0, start), (size, width)), compute_dtype)
        logits = ops.matmul(features, part) + ops.cast(ops.slice(bias, (start,), (width,)), compute_dtype)
        return part, logits, ops.arange(width, dtype="int32") == ops.expand_dims(ids - start, -1)

    def values(features: Any, kernel: Any, bias: Any, ids: Any, scale: Any) -> tuple[Any, Any]:
        features = _without_invalid(ops.cast(features, compute_dtype), scale)

        def step(start: Any, width: int, state: Any) -> Any:
            top, total_exp, count, mean, squares, z_true = state
            _, z, is_true = logits_of(features, kernel, bias, ids, start, width)
            new_top = ops.maximum(top, ops.max(z, axis=-1))
            total_exp = total_exp * ops.exp(top - new_top) + ops.sum(ops.exp(z - new_top[:, None]), axis=-1)
            z_true = z_true + ops.sum(ops.where(is_true, z, 0.0), axis=-1)
            added = width - ops.sum(ops.cast(is_true, compute_dtype), axis=-1)
            added_mean = ops.sum(ops.where(is_true, 0.0, z), axis=-1) / ops.maximum(added, 1)
            added_squares = ops.sum(ops.square(ops.where(is_true, 0.0, z - added_mean[:, None])), axis=-1)
            share = added / ops.maximum(count + added, 1)
            step_of_mean = (added_mean - mean) * share
            squares = squares + added_squares + (added_mean - mean) * step_of_mean * count
            return new_top, total_exp, count + added, mean + step_of_mean, squares, z_true

        zeros = ops.zeros_like(scale)
        top, total_exp, count, mean, squares, z_true = over_chunks(step, (zeros - 1e30, *[zeros] * 5))
        log_total = top + ops.log(total_exp)
        mean_of_all = (mean * count + z_true) / classes
        loss = log_total - (1 - smoothing) * z_true - smoothing * mean_of_all + strength * squares
        return loss * scale, (log_total, mean)

    def gradients(
        features: Any, kernel: Any, bias: Any, ids: Any, scale: Any, statistics: Any, upstream: Any
    ) -> tuple[Any, Any, Any]:
        features = _without_invalid(ops.cast(features, compute_dtype), scale)
        log_total, mean = (ops.expand_dims(x, -1) for x in statistics)
        factor = ops.expand_dims(scale * upstream, -1)

        def step(start: Any, width: int, state: Any) -> Any:
            of_features, of_kernel, of_bias = state
            part, z, is_true = logits_of(features, kernel, bias, ids, start, width)
            of_logits = factor * (
                ops.exp(z - log_total)
                - smoothing / classes
                + ops.where(is_true, smoothing - 1, 2 * strength * (z - mean))
            )
            of_part = ops.matmul(ops.transpose(features), of_logits)
            return (
                of_features + ops.matmul(of_logits, ops.transpose(part)),
                ops.slice_update(of_kernel, (0, start), ops.cast(of_part, dtypes[1])),
                ops.slice_update(of_bias, (start,), ops.cast(ops.sum(of_logits, axis=0), dtypes[2])),
            )

        start = (ops.zeros_like(features), ops.zeros((size, classes), dtypes[1]), ops.zeros((classes,), dtypes[2]))
        of_features, of_kernel, of_bias = over_chunks(step, start)
        return ops.cast(of_features, dtypes[0]), of_kernel, of_bias

    rows = ((None,), compute_dtype)
    inputs = [
        ((None, size), dtypes[0]),
        ((size, classes), dtypes[1]),
        ((classes,), dtypes[2]),
        ((None,), "int32"),
        rows,
    ]
    return _backend.compiled(values, *inputs), _backend.compiled(gradients, *inputs, (rows, rows), rows)


def _without_invalid(features: Any, scale: Any) -> Any:
    """Features of 0 where a position doesn't count and may hold anything."""
    return ops.where(ops.expand_dims(scale == 0, -1), 0.0, features)
