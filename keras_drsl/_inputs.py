"""What a loss or metric does with `y_true` and `y_pred` before its formula: labels, logits, masks, classes last."""

import math
import warnings
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_drsl._backend import known_values, mask_of, with_mask


class Inputs(NamedTuple):
    """Labels and predictions in the one form the formulas take.

    Attributes:
        labels: class ids, int32, shape `(...)`, all within `[0, C)`; or a label distribution, shape `(..., C)`.
        scores: logits or probabilities, float32 or float64, shape `(..., C)`. They may be anything, NaN included, at
            positions that don't count.
        from_logits: whether `scores` are logits.
        valid: bool, shape `(...)`, False where a mask or `ignore_class` rules the position out; None if nothing does.
        in_range: bool, shape `(...)`, False where a class id is none; None if that is impossible or known not to be.
    """

    labels: Any
    scores: Any
    from_logits: bool
    valid: Any
    in_range: Any

    @property
    def sparse(self) -> bool:
        return len(self.labels.shape) < len(self.scores.shape)

    @property
    def distribution(self) -> Any:
        """The labels as a distribution, shape `(..., C)`."""
        if self.sparse:
            return ops.one_hot(self.labels, self.scores.shape[-1], dtype=self.scores.dtype)
        return self.labels

    @property
    def safe_scores(self) -> Any:
        """The scores, equal at positions that don't count: what stands there reaches neither value nor gradient."""
        if self.valid is None:
            return self.scores
        return ops.where(ops.expand_dims(self.valid, -1), self.scores, ops.ones_like(self.scores))

    @property
    def scale(self) -> Any:
        """What a value counts, shape `(...)`: 1, 0 where the position doesn't, NaN where its label is no class."""
        return self.finish(ops.ones_like(self.scores[..., 0]))

    def finish(self, values: Any) -> Any:
        """One value a position: 0 where the position doesn't count, NaN where its label is no class."""
        return _finish(values, self.valid, self.in_range)


def read(
    y_true: Any, y_pred: Any, *, from_logits: bool, ignore_class: int | None, axis: int, mask: Any = None
) -> Inputs:
    """Bring labels and predictions into one form, or raise `ValueError` if they are none.

    The mask is that of `y_pred` unless one is given.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    mask = mask_of(y_pred) if mask is None else mask
    scores, from_logits = logits_behind(y_pred, from_logits, axis)
    scores = _as_float(scores)
    labels = ops.convert_to_tensor(y_true)
    labels, scores = _classes_last(labels, scores, axis)

    valid = _valid(mask, len(scores.shape) - 1, labels, ignore_class)
    in_range = None
    if len(labels.shape) < len(scores.shape):
        labels, in_range = _class_ids(labels, valid, scores.shape[-1])
    elif valid is not None:
        labels = ops.where(ops.expand_dims(valid, -1), labels, 1.0 / scores.shape[-1])
    return Inputs(labels, scores, from_logits, valid, in_range)


class ClassIds(NamedTuple):
    """Class ids in the one form the formulas take.

    Attributes:
        ids: int32, shape `(...)`, all within `[0, C)`.
        valid: bool, shape `(...)`, as in `Inputs`.
        in_range: bool, shape `(...)`, as in `Inputs`.
    """

    ids: Any
    valid: Any
    in_range: Any

    def scale(self, dtype: str) -> Any:
        """What a value counts, shape `(...)`: 1, 0 where the position doesn't, NaN where its label is no class."""
        return _finish(ops.ones_like(self.ids, dtype=dtype), self.valid, self.in_range)


def read_class_ids(y_true: Any, positions: tuple, classes: int, *, mask: Any, ignore_class: int | None) -> ClassIds:
    """Bring class ids of shape `(...)` or `(..., 1)` into one form, or raise `ValueError` if they are none."""
    labels = ops.convert_to_tensor(y_true)
    if len(labels.shape) == len(positions) + 1 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    if not can_match(tuple(labels.shape), positions):
        raise ValueError(
            "`y_true` must hold a class id for each position. "
            f"Received: y_true.shape={tuple(labels.shape)}, positions of shape {positions}"
        )
    valid = _valid(mask, len(positions), labels, ignore_class)
    ids, in_range = _class_ids(labels, valid, classes)
    return ClassIds(ids, valid, in_range)


def cast_keeping_attributes(y_pred: Any, dtype: str) -> Any:
    """Cast `y_pred` without losing its Keras mask or the logits behind its softmax, as a plain cast does."""
    mask, logits = mask_of(y_pred), getattr(y_pred, "_keras_logits", None)
    y_cast = ops.convert_to_tensor(y_pred, dtype=dtype)
    if y_cast is y_pred:
        return y_pred
    if logits is not None:
        y_cast._keras_logits = ops.cast(logits, dtype)
    return y_cast if mask is None else with_mask(y_cast, mask)


def logits_behind(y_pred: Any, from_logits: bool, axis: int) -> tuple[Any, bool]:
    """The logits a softmax output was computed from where they can be found, as Keras's own losses do."""
    logits = getattr(y_pred, "_keras_logits", None)
    if logits is None and (axis == -1 or axis == len(y_pred.shape) - 1):
        # In a TensorFlow graph, the operation that made a tensor can be asked for its input.
        operation = getattr(y_pred, "op", None)
        if operation is not None and operation.type == "Softmax":
            logits = operation.inputs[0]
    if logits is None:
        return y_pred, from_logits
    if from_logits:
        warnings.warn(
            "`from_logits=True`, but `y_pred` comes out of a softmax, so it holds probabilities. "
            "The logits before that softmax are used.",
            stacklevel=4,
        )
    return logits, True


def _as_float(x: Any) -> Any:
    """A float tensor of at least float32: in half precision squares overflow and small differences vanish."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return x if dtype in ("float32", "float64") else ops.cast(x, "float32")


def _classes_last(labels: Any, scores: Any, axis: int) -> tuple[Any, Any]:
    """Check that the shapes match, drop a label's axis of length 1, move the classes to the last axis."""
    labels_shape, scores_shape = tuple(labels.shape), tuple(scores.shape)
    rank = len(scores_shape)
    received = f"Received: y_true.shape={labels_shape}, y_pred.shape={scores_shape}, axis={axis}"
    if not -rank <= axis < rank:
        raise ValueError(f"`axis` must be an axis of `y_pred`. {received}")
    axis %= rank
    if scores_shape[axis] is None or scores_shape[axis] < 2:
        raise ValueError(f"`y_pred` must have two classes or more, their number known, along `axis`. {received}")

    positions = scores_shape[:axis] + scores_shape[axis + 1 :]
    if len(labels_shape) == rank and labels_shape[axis] == 1:
        labels = ops.squeeze(labels, axis=axis)
        labels_shape = tuple(labels.shape)
    if not (can_match(labels_shape, positions) or can_match(labels_shape, scores_shape)):
        raise ValueError(
            "`y_true` must hold a class id for each position of `y_pred` or a label distribution of `y_pred`'s shape. "
            + received
        )
    if axis != rank - 1:
        scores = ops.moveaxis(scores, axis, -1)
        if len(labels_shape) == rank:
            labels = ops.moveaxis(labels, axis, -1)
    if None in labels_shape:
        # Lengths that turn out not to match are an error then, and not broadcast.
        labels = ops.reshape(labels, ops.shape(scores)[: len(labels_shape)])
    if len(labels_shape) == rank:
        labels = ops.cast(labels, scores.dtype)
    return labels, scores


def _finish(values: Any, valid: Any, in_range: Any) -> Any:
    if in_range is not None:
        # A product, so that the gradient is NaN too.
        values = values * ops.where(in_range, ops.ones_like(values), math.nan)
    if valid is not None:
        values = ops.where(valid, values, ops.zeros_like(values))
    return values


def can_match(shape: tuple, other: tuple) -> bool:
    """Whether two shapes, with None for a length not yet known, can be the same."""
    return len(shape) == len(other) and all(a == b or a is None or b is None for a, b in zip(shape, other, strict=True))


def _valid(mask: Any, rank: int, labels: Any, ignore_class: int | None) -> Any:
    """Where a position counts, bool of rank `rank`, or None where nothing rules any out."""
    valid = ops.cast(mask, "bool") if mask is not None and len(mask.shape) == rank else None
    if ignore_class is None:
        return valid
    if len(labels.shape) > rank:
        ignored = ops.cast(ops.equal(ops.arange(labels.shape[-1]), ignore_class), labels.dtype)
        counts = ops.any(ops.not_equal(labels, ignored), axis=-1)
    else:
        if "int" in keras.backend.standardize_dtype(labels.dtype):
            labels = ops.cast(labels, "int32")  # unsigned labels cannot be compared with -1
        counts = ops.not_equal(labels, ignore_class)
    return counts if valid is None else ops.logical_and(valid, counts)


def _class_ids(labels: Any, valid: Any, num_classes: int) -> tuple[Any, Any]:
    """Class ids as int32, and where they are classes at all. Raises where the values can be seen."""
    dtype = keras.backend.standardize_dtype(labels.dtype)
    largest_exact = {"float16": 2**11, "bfloat16": 2**8}.get(dtype, math.inf)
    if num_classes - 1 > largest_exact:
        raise ValueError(
            f"`y_true` must hold class ids in a dtype that can tell all {num_classes} classes apart. "
            f"Received: y_true.dtype={dtype} (if a loss's `dtype` is the cause, use 'float32')"
        )
    ids = ops.cast(labels, "int32")
    in_range = ops.logical_and(ops.logical_and(ids >= 0, ids < num_classes), ops.equal(ops.cast(ids, dtype), labels))
    if valid is not None:
        in_range = ops.logical_or(in_range, ops.logical_not(valid))

    known = known_values(in_range)
    if known is not None:
        if not known.all():
            wrong = ops.convert_to_numpy(labels)[~known].flat[0]
            raise ValueError(
                f"`y_true` must hold class ids in [0, {num_classes}), the range of the {num_classes} classes of "
                f"`y_pred`. Received: {wrong}"
            )
        in_range = None
    counts = ops.logical_and(ids >= 0, ids < num_classes)
    return ops.where(counts, ids, 0), in_range
