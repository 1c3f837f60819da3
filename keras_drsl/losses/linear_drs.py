"""Provide the distribution-restrained softmax loss of a linear head, without storing its logits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl._validation import check_choice, check_integer
from keras_drsl.losses.base import check_strength, set_mask, strength_of
from keras_drsl.losses.drs import check_smoothing, drs_loss
from keras_drsl.losses.fused import MAX_PROGRAMS
from keras_drsl.predictions import ClassIds, is_true_class, read_class_ids, to_dense
from keras_drsl.spread import SPREADS


def linear_drs_loss(
    y_true: Tensor,
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    lam: float = 0.3,
    *,
    chunk_size: int = 8192,
    spread: str = "sum_of_squares",
    label_smoothing: float = 0.0,
    ignore_class: int | None = None,
) -> Tensor:
    """Compute `drs_loss` of the logits `features @ kernel + bias`, which are never all in memory at the same time.

    Use it in a custom training step where a head with a large vocabulary makes the logits the largest tensor. They are
    computed `chunk_size` classes at a time, once for the loss and again for the gradient. This costs four matrix
    products in place of three. It saves every array of size `batch x C`.

    Formula: as `keras_drsl.DRSLoss` in log space. The log-sum-exp, the mean of the non-true logits and the sum of the
    squares of their deviations are updated chunk by chunk. With `n, m, q` the count, mean and sum of squares so far and
    `k, a, s` those of a chunk, `q <- q + s + (a - m)^2 n k / (n + k)` and `m <- m + (a - m) k / (n + k)`.

    Note:

    - The notes on `keras_drsl.DRSLoss` hold.
    - XLA compiles programs for a number of classes, and again for at most four numbers of rows between a power of two
      and the next: rows of zeros are added. The programs of the last 32 heads are kept. Other values of `lam` and
      `label_smoothing` need no new program.
    - In a functional model, called with a `keras.KerasTensor`, the operations are those of `drs_loss` and hold the
      logits.
    - Half-precision inputs are multiplied and accumulated in float32. Gradients have the dtypes of the inputs.
    - The loss can be differentiated once.
    - It runs on TensorFlow and JAX.

    Args:
        y_true: Class ids, shape `(...)` or `(..., 1)`.
        features: The input of the head, shape `(..., D)`.
        kernel: Shape `(D, C)`.
        bias: Shape `(C,)`, or None.
        lam: The strength of the penalty, a number >= 0, or a `keras.Variable` of one.
        chunk_size: How many classes to compute at a time, an integer >= 1. Memory grows with `batch x chunk_size`.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: A number in [0, 1).
        ignore_class: The id of a class whose positions are ignored, or None. With an id or
            a mask the values have a Keras mask.

    Returns:
        One value per position, shape `(...)`, float32 (float64 for float64 features).

    Raises:
        ValueError: For arguments out of their range, shapes that do not match, and class ids outside `[0, C)` as
            `keras_drsl.DRSLoss`.
        RuntimeError: On PyTorch.

    Example:

    >>> head = keras.layers.Dense(50_000)
    >>> features = keras.random.normal((4, 16), seed=0)
    >>> head.build(features.shape)
    >>> values = keras_drsl.linear_drs_loss(np.arange(4), features, head.kernel, head.bias)
    >>> dense = keras_drsl.drs_loss(np.arange(4), head(features), from_logits=True)
    >>> bool(keras.ops.all(keras.ops.isclose(values, dense, rtol=1e-4)))
    True

    Reference: arXiv:2303.12363 for the loss; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
    arXiv:2411.09009, for the idea of not storing the logits.
    """
    if not _backend.HAS_XLA:
        raise RuntimeError(f"`linear_drs_loss` needs TensorFlow or JAX. Received: KERAS_BACKEND={_backend.NAME}")
    lam = check_strength("lam", lam)
    label_smoothing = check_smoothing(label_smoothing)
    check_choice("spread", spread, SPREADS)
    chunk_size = check_integer("chunk_size", chunk_size, at_least=1)

    features, kernel = to_dense("features", features), to_dense("kernel", kernel)
    bias = None if bias is None else to_dense("bias", bias)
    classes = _check_shapes(features, kernel, bias)
    if any(isinstance(x, keras.KerasTensor) for x in (y_true, features, kernel, bias)):
        # In a functional model, whose operations are those of Keras.
        logits = ops.matmul(features, kernel) if bias is None else ops.add(ops.matmul(features, kernel), bias)
        options = {"spread": spread, "label_smoothing": label_smoothing, "ignore_class": ignore_class}
        return drs_loss(y_true, logits, lam, from_logits=True, **options)
    labels = read_class_ids(y_true, features, classes, ignore_class=ignore_class)
    return linear_values(
        labels,
        features,
        kernel,
        bias,
        lam,
        spread=spread,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
    )


def linear_values(
    labels: ClassIds,
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    lam: Any,
    *,
    spread: str = "sum_of_squares",
    label_smoothing: float = 0.0,
    chunk_size: int = 8192,
    transposed: bool = False,
) -> Tensor:
    """Compute the loss of a linear head from labels that were read, with arguments that were checked.

    Args:
        labels: The class ids.
        features: Shape `(..., D)`.
        kernel: Shape `(D, C)`, or `(C, D)` if `transposed`, as an embedding has it.
        bias: Shape `(C,)`, or None.
        lam: As in `linear_drs_loss`.
        spread: As in `linear_drs_loss`.
        label_smoothing: As in `linear_drs_loss`.
        chunk_size: As in `linear_drs_loss`.
        transposed: Whether the classes are the first axis of the kernel.

    Returns:
        One value per position, shape `(...)`.
    """
    bias = _bias_or_zeros(bias, kernel, transposed)
    head = _chunked_head(features, kernel, bias, chunk_size, transposed)
    forward, backward = compiled_programs(head)
    scale = ops.reshape(labels.scale(head.compute_dtype), (-1,))
    rows = ops.reshape(features, (-1, head.size)), ops.reshape(labels.ids, (-1,)), scale
    # The scale of added rows is 0, so they are ignored.
    padded, *constants = _backend.pad_rows(*rows)
    lam = strength_of(lam, head.compute_dtype)
    strength = lam / (head.classes - 1) if spread == "variance" else lam
    numbers = (ops.convert_to_tensor(number, head.compute_dtype) for number in (strength, label_smoothing))
    values = _backend.custom_vjp(forward, backward, (padded, kernel, bias), (*constants, *numbers))
    values = ops.reshape(values[: ops.shape(rows[0])[0]], ops.shape(features)[:-1])
    return set_mask(values, labels.valid)


def _check_shapes(features: Tensor, kernel: Tensor, bias: Tensor | None) -> int:
    """Return the number of classes, or raise `ValueError` for shapes that do not match."""
    head = tuple(kernel.shape)
    bias_shape = head[1:] if bias is None else tuple(bias.shape)
    received = f"Received: features.shape={tuple(features.shape)}, kernel.shape={head}, bias.shape={bias_shape}"
    if len(head) != 2 or len(features.shape) < 2 or features.shape[-1] != head[0]:
        raise ValueError(f"`features` and `kernel` must have the shapes (..., D) and (D, C). {received}")
    if head[1] < 2:
        raise ValueError(f"`kernel` must have at least two classes. {received}")
    if bias_shape != head[1:]:
        raise ValueError(f"`bias` must have the shape (C,). {received}")
    classes: int = head[1]
    return classes


@dataclass(frozen=True)
class ChunkedHead:
    """Compute the loss of a linear head and its gradient, a chunk of classes at a time.

    Attributes:
        chunk: How many classes a chunk has.
        size: The number of features.
        classes: The number of classes.
        dtypes: The dtypes of features, kernel and bias.
        transposed: Whether the kernel has the shape `(C, D)`.
    """

    chunk: int
    size: int
    classes: int
    dtypes: tuple[str, ...]
    transposed: bool = False

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """The shape of the kernel."""
        return (self.classes, self.size) if self.transposed else (self.size, self.classes)

    @property
    def compute_dtype(self) -> str:
        """The dtype that logits are computed in."""
        return "float64" if self.dtypes[0] == "float64" else "float32"

    def over_chunks(self, step: Callable[[Any, int, Any], Any], state: Any) -> Any:
        """Apply `step(start, width, state)` to all chunks: first those of full width, in a loop, then the rest."""
        full, rest = divmod(self.classes, self.chunk)
        state = ops.fori_loop(0, full, lambda i, state: step(i * self.chunk, self.chunk, state), state)
        return step(full * self.chunk, rest, state) if rest else state

    def chunk_of_logits(
        self, features: Tensor, kernel: Tensor, bias: Tensor, ids: Tensor, start: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a chunk of the kernel, its logits, and which of them belong to true classes."""
        if self.transposed:
            part = ops.transpose(ops.slice(kernel, (start, 0), (width, self.size)))
        else:
            part = ops.slice(kernel, (0, start), (self.size, width))
        part = ops.cast(part, self.compute_dtype)
        logits = ops.matmul(features, part) + ops.cast(ops.slice(bias, (start,), (width,)), self.compute_dtype)[None]
        return part, logits, is_true_class(ids - start, width)

    def forward(
        self,
        features: Tensor,
        kernel: Tensor,
        bias: Tensor,
        ids: Tensor,
        scale: Tensor,
        strength: Tensor,
        smoothing: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the values, and the statistics that the gradient needs.

        Args:
            features: Shape `(rows, D)`.
            kernel: Shape `(D, C)`.
            bias: Shape `(C,)`.
            ids: Class ids, int32, shape `(rows,)`.
            scale: The factor of each value, shape `(rows,)`.
            strength: The factor of the sum of squares.
            smoothing: The label smoothing.
        """
        features = _replace_ignored(ops.cast(features, self.compute_dtype), scale)

        def step(start: Tensor, width: int, state: Any) -> Any:
            top, total_exp, count, mean, squares, z_true = state
            _, z, is_true = self.chunk_of_logits(features, kernel, bias, ids, start, width)
            new_top = ops.maximum(top, ops.max(z, axis=-1))
            total_exp = total_exp * ops.exp(top - new_top) + ops.sum(ops.exp(z - new_top[:, None]), axis=-1)
            z_true = z_true + ops.sum(ops.where(is_true, z, 0.0), axis=-1)
            added = width - ops.sum(ops.cast(is_true, self.compute_dtype), axis=-1)
            added_mean = ops.sum(ops.where(is_true, 0.0, z), axis=-1) / ops.maximum(added, 1)
            added_squares = ops.sum(ops.square(ops.where(is_true, 0.0, z - added_mean[:, None])), axis=-1)
            share = added / ops.maximum(count + added, 1)
            step_of_mean = (added_mean - mean) * share
            squares = squares + added_squares + (added_mean - mean) * step_of_mean * count
            return new_top, total_exp, count + added, mean + step_of_mean, squares, z_true

        zeros = ops.zeros_like(scale)
        state = self.over_chunks(step, (zeros - 1e30, *[zeros] * 5))
        top, total_exp, count, mean, squares, z_true = state
        log_total = top + ops.log(total_exp)
        mean_of_all = (mean * count + z_true) / self.classes
        loss = log_total - (1 - smoothing) * z_true - smoothing * mean_of_all + strength * squares
        return loss * scale, (log_total, mean)

    def backward(
        self,
        features: Tensor,
        kernel: Tensor,
        bias: Tensor,
        ids: Tensor,
        scale: Tensor,
        strength: Tensor,
        smoothing: Tensor,
        statistics: tuple[Tensor, Tensor],
        upstream: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of features, kernel and bias."""
        features = _replace_ignored(ops.cast(features, self.compute_dtype), scale)
        log_total, mean = (ops.expand_dims(x, -1) for x in statistics)
        factor = ops.expand_dims(scale * upstream, -1)

        def step(start: Tensor, width: int, state: Any) -> Any:
            of_features, of_kernel, of_bias = state
            part, z, is_true = self.chunk_of_logits(features, kernel, bias, ids, start, width)
            of_logits = factor * (
                ops.exp(z - log_total)
                - smoothing / self.classes
                + ops.where(is_true, smoothing - 1, 2 * strength * (z - mean))
            )
            if self.transposed:
                of_part, place = ops.matmul(ops.transpose(of_logits), features), (start, 0)
            else:
                of_part, place = ops.matmul(ops.transpose(features), of_logits), (0, start)
            return (
                of_features + ops.matmul(of_logits, ops.transpose(part)),
                ops.slice_update(of_kernel, place, ops.cast(of_part, self.dtypes[1])),
                ops.slice_update(of_bias, (start,), ops.cast(ops.sum(of_logits, axis=0), self.dtypes[2])),
            )

        empty_kernel = ops.zeros(self.kernel_shape, self.dtypes[1])
        state = (ops.zeros_like(features), empty_kernel, ops.zeros((self.classes,), self.dtypes[2]))
        of_features, of_kernel, of_bias = self.over_chunks(step, state)
        return ops.cast(of_features, self.dtypes[0]), of_kernel, of_bias


def largest_others(
    labels: ClassIds,
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    count: int,
    *,
    chunk_size: int,
    transposed: bool,
) -> Tensor:
    """Return the classes of the largest non-true logits of each position, from the largest down.

    Args:
        labels: The class ids.
        features: Shape `(..., D)`.
        kernel: As in `linear_values`.
        bias: As in `linear_values`.
        count: How many.
        chunk_size: As in `linear_values`.
        transposed: As in `linear_values`.

    Returns:
        Int32, shape `(rows, count)`, with one row for each position.
    """
    bias = _bias_or_zeros(bias, kernel, transposed)
    features, kernel, bias = (ops.stop_gradient(ops.convert_to_tensor(x)) for x in (features, kernel, bias))
    head = _chunked_head(features, kernel, bias, chunk_size, transposed)
    rows, ids = ops.cast(ops.reshape(features, (-1, head.size)), head.compute_dtype), ops.reshape(labels.ids, (-1,))

    def step(start: Tensor, width: int, state: Any) -> Any:
        largest, places = state
        _, z, is_true = head.chunk_of_logits(rows, kernel, bias, ids, start, width)
        found, where = ops.top_k(ops.where(is_true, -1e30, z), min(count, width))
        values = ops.concatenate([largest, found], axis=-1)
        candidates = ops.concatenate([places, ops.cast(where, "int32") + start], axis=-1)
        largest, order = ops.top_k(values, count)
        return largest, ops.take_along_axis(candidates, ops.cast(order, "int32"), axis=-1)

    lowest = ops.full((ops.shape(rows)[0], count), -2e30, dtype=head.compute_dtype)
    places: Tensor = head.over_chunks(step, (lowest, ops.cast(ops.zeros_like(lowest), "int32")))[1]
    return places


def _bias_or_zeros(bias: Tensor | None, kernel: Tensor, transposed: bool) -> Tensor:
    return ops.zeros((kernel.shape[0 if transposed else 1],), kernel.dtype) if bias is None else bias


def _chunked_head(features: Tensor, kernel: Tensor, bias: Tensor, chunk_size: int, transposed: bool) -> ChunkedHead:
    size, classes = tuple(kernel.shape)[:: -1 if transposed else 1]
    return ChunkedHead(
        chunk=min(chunk_size, classes),
        size=size,
        classes=classes,
        dtypes=tuple(keras.backend.standardize_dtype(x.dtype) for x in (features, kernel, bias)),
        transposed=transposed,
    )


@lru_cache(maxsize=MAX_PROGRAMS)
def compiled_programs(head: ChunkedHead) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the programs of the values and of the gradients. They are cached so that each is traced once."""
    rows = ((None,), head.compute_dtype)
    inputs = [
        ((None, head.size), head.dtypes[0]),
        (head.kernel_shape, head.dtypes[1]),
        ((head.classes,), head.dtypes[2]),
        ((None,), "int32"),
        rows,
        ((), head.compute_dtype),
        ((), head.compute_dtype),
    ]
    return _backend.jit(head.forward, *inputs), _backend.jit(head.backward, *inputs, (rows, rows), rows)


def _replace_ignored(features: Tensor, scale: Tensor) -> Tensor:
    """Set the features of ignored positions, whose values are arbitrary, to 0."""
    return ops.where(ops.expand_dims(scale == 0, -1), 0.0, features)
