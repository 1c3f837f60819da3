"""Read labels and predictions of any form: class ids or distributions, logits or probabilities, masks, any class axis.

Losses and metrics call `read_inputs` before their formulas. `LossInputs` is what a formula takes.
"""

import math
import warnings
from typing import NamedTuple

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor

Shape = tuple[int | None, ...]


class LossInputs(NamedTuple):
    """Hold labels and predictions in the one form that formulas take.

    Attributes:
        labels: Class ids, int32, shape `(...)`, all within `[0, C)`; or a label distribution, shape `(..., C)`.
        scores: Logits or probabilities, float32 or float64, shape `(..., C)`. At masked positions the values are
            arbitrary and may be NaN. Use `safe_scores` in a formula.
        from_logits: Whether `scores` are logits.
        valid: Bool, shape `(...)`, False at positions excluded by a mask or by `ignore_class`; None if all positions
            are valid.
        in_range: Bool, shape `(...)`, False where a class id is outside `[0, C)`; None if all ids are known to be
            classes.
    """

    labels: Tensor
    scores: Tensor
    from_logits: bool
    valid: Tensor | None
    in_range: Tensor | None

    @property
    def sparse(self) -> bool:
        """Whether the labels are class ids."""
        return len(self.labels.shape) < len(self.scores.shape)

    @property
    def distribution(self) -> Tensor:
        """The labels as a distribution, shape `(..., C)`."""
        if self.sparse:
            return ops.one_hot(self.labels, self.scores.shape[-1], dtype=self.scores.dtype)
        return self.labels

    @property
    def safe_scores(self) -> Tensor:
        """The scores, with ones at masked positions: arbitrary values there reach neither the loss nor its gradient."""
        if self.valid is None:
            return self.scores
        return ops.where(ops.expand_dims(self.valid, -1), self.scores, ops.ones_like(self.scores))

    @property
    def scale(self) -> Tensor:
        """The factor of each value, shape `(...)`: 1; 0 at masked positions; NaN where the label is not a class."""
        return self.mask_values(ops.ones_like(self.scores[..., 0]))

    def mask_values(self, values: Tensor) -> Tensor:
        """Set one value per position to 0 at masked positions and to NaN where the label is not a class.

        Args:
            values: Shape `(...)`.
        """
        return _mask_values(values, self.valid, self.in_range)


def read_inputs(
    y_true: Tensor,
    y_pred: Tensor,
    *,
    from_logits: bool,
    ignore_class: int | None,
    axis: int,
    mask: Tensor | None = None,
) -> LossInputs:
    """Bring labels and predictions into one form.

    Args:
        y_true: Class ids, shape `(...)` or `(..., 1)`, or a label distribution of the shape of `y_pred`.
        y_pred: Probabilities or logits, shape `(..., C)`, or with the classes at `axis`.
        from_logits: Whether `y_pred` holds logits.
        ignore_class: The id of a class whose positions are masked, or None.
        axis: The axis of the classes in `y_pred`.
        mask: Bool, False at masked positions; by default the Keras mask of `y_pred`.

    Raises:
        ValueError: For shapes that cannot match, and for class ids outside `[0, C)` where the values are known.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    mask = _backend.get_mask(y_pred) if mask is None else mask
    scores, from_logits = logits_behind_softmax(y_pred, from_logits, axis)
    scores = _as_float(scores)
    labels = ops.convert_to_tensor(y_true)
    labels, scores = _move_classes_last(labels, scores, axis)

    valid = _valid_positions(mask, len(scores.shape) - 1, labels, ignore_class)
    in_range = None
    if len(labels.shape) < len(scores.shape):
        labels, in_range = _check_class_ids(labels, valid, scores.shape[-1])
    elif valid is not None:
        labels = ops.where(ops.expand_dims(valid, -1), labels, 1.0 / scores.shape[-1])
    return LossInputs(labels, scores, from_logits, valid, in_range)


class ClassIds(NamedTuple):
    """Hold class ids in the one form that formulas take.

    Attributes:
        ids: Int32, shape `(...)`, all within `[0, C)`.
        valid: Bool, shape `(...)`, as in `LossInputs`.
        in_range: Bool, shape `(...)`, as in `LossInputs`.
    """

    ids: Tensor
    valid: Tensor | None
    in_range: Tensor | None

    def scale(self, dtype: str) -> Tensor:
        """Return the factor of each value, as `LossInputs.scale`."""
        return _mask_values(ops.ones_like(self.ids, dtype=dtype), self.valid, self.in_range)


def read_class_ids(
    y_true: Tensor, positions: Shape, num_classes: int, *, mask: Tensor | None, ignore_class: int | None
) -> ClassIds:
    """Bring class ids into one form.

    Args:
        y_true: Class ids, shape `(...)` or `(..., 1)`.
        positions: The shape `(...)` that they must have.
        num_classes: The number of classes.
        mask: Bool, shape `(...)`, False at masked positions, or None.
        ignore_class: The id of a class whose positions are masked, or None.

    Raises:
        ValueError: For a shape that cannot match, and for class ids outside `[0, C)` where the values are known.
    """
    labels = ops.convert_to_tensor(y_true)
    if len(labels.shape) == len(positions) + 1 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    if not shapes_match(tuple(labels.shape), positions):
        raise ValueError(
            "`y_true` must hold one class id per position. "
            f"Received: y_true.shape={tuple(labels.shape)}, positions of shape {positions}"
        )
    valid = _valid_positions(mask, len(positions), labels, ignore_class)
    ids, in_range = _check_class_ids(labels, valid, num_classes)
    return ClassIds(ids, valid, in_range)


def cast_keeping_attributes(y_pred: Tensor, dtype: str) -> Tensor:
    """Cast `y_pred` and keep its Keras mask and the logits behind its softmax, which a plain cast loses."""
    mask, logits = _backend.get_mask(y_pred), getattr(y_pred, "_keras_logits", None)
    y_cast = ops.convert_to_tensor(y_pred, dtype=dtype)
    if y_cast is y_pred:
        return y_pred
    if logits is not None:
        y_cast._keras_logits = ops.cast(logits, dtype)
    return y_cast if mask is None else _backend.set_mask(y_cast, mask)


def logits_behind_softmax(y_pred: Tensor, from_logits: bool, axis: int) -> tuple[Tensor, bool]:
    """Return the logits behind a softmax output. Where they cannot be found, return `y_pred` itself.

    Keras's own losses look for them in the same way.

    Args:
        y_pred: Probabilities or logits, with the classes at `axis`.
        from_logits: Whether `y_pred` is said to hold logits.
        axis: The axis of the classes.

    Returns:
        Logits or probabilities, and whether they are logits.
    """
    logits = getattr(y_pred, "_keras_logits", None)
    if logits is None and (axis == -1 or axis == len(y_pred.shape) - 1):
        logits = _backend.input_of_softmax(y_pred)
    if logits is None:
        return y_pred, from_logits
    if from_logits:
        warnings.warn(
            "`from_logits=True`, but `y_pred` is the output of a softmax, so it holds probabilities. "
            "The logits before that softmax are used.",
            stacklevel=4,
        )
    return logits, True


def shapes_match(shape: Shape, other: Shape) -> bool:
    """Return whether two shapes can be equal; None is a length that is not known yet."""
    return len(shape) == len(other) and all(a == b or a is None or b is None for a, b in zip(shape, other, strict=True))


def _as_float(x: Tensor) -> Tensor:
    """Cast to at least float32: in half precision squares overflow and small differences are lost."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return x if dtype in ("float32", "float64") else ops.cast(x, "float32")


def _move_classes_last(labels: Tensor, scores: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Check that the shapes match, drop a label axis of length 1, and move the classes to the last axis."""
    labels_shape, scores_shape = tuple(labels.shape), tuple(scores.shape)
    rank = len(scores_shape)
    received = f"Received: y_true.shape={labels_shape}, y_pred.shape={scores_shape}, axis={axis}"
    if not -rank <= axis < rank:
        raise ValueError(f"`axis` must be an axis of `y_pred`. {received}")
    axis %= rank
    if scores_shape[axis] is None or scores_shape[axis] < 2:
        raise ValueError(f"`y_pred` must have a known number of classes, at least two, along `axis`. {received}")

    positions = scores_shape[:axis] + scores_shape[axis + 1 :]
    if len(labels_shape) == rank and labels_shape[axis] == 1:
        labels = ops.squeeze(labels, axis=axis)
        labels_shape = tuple(labels.shape)
    if not (shapes_match(labels_shape, positions) or shapes_match(labels_shape, scores_shape)):
        raise ValueError(
            "`y_true` must hold one class id per position of `y_pred`, or a label distribution of the shape of "
            f"`y_pred`. {received}"
        )
    if axis != rank - 1:
        scores = ops.moveaxis(scores, axis, -1)
        if len(labels_shape) == rank:
            labels = ops.moveaxis(labels, axis, -1)
    if None in labels_shape:
        # Lengths that turn out not to match then raise an error and are not broadcast.
        labels = ops.reshape(labels, ops.shape(scores)[: len(labels_shape)])
    if len(labels_shape) == rank:
        labels = ops.cast(labels, scores.dtype)
    return labels, scores


def _mask_values(values: Tensor, valid: Tensor | None, in_range: Tensor | None) -> Tensor:
    if in_range is not None:
        # A product, so that the gradient is NaN too.
        values = values * ops.where(in_range, ops.ones_like(values), math.nan)
    if valid is not None:
        values = ops.where(valid, values, ops.zeros_like(values))
    return values


def _valid_positions(mask: Tensor | None, rank: int, labels: Tensor, ignore_class: int | None) -> Tensor | None:
    """Return where positions are valid, bool of rank `rank`, or None if all are."""
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


def _check_class_ids(labels: Tensor, valid: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Return class ids as int32, all within the range, and where the labels were.

    Where the values are known, a label that is not a class is an error.
    """
    dtype = keras.backend.standardize_dtype(labels.dtype)
    largest_exact = {"float16": 2**11, "bfloat16": 2**8}.get(dtype, math.inf)
    if num_classes - 1 > largest_exact:
        raise ValueError(
            f"`y_true` must hold class ids in a dtype that represents all {num_classes} classes exactly. "
            f"Received: y_true.dtype={dtype} (if a loss's `dtype` is the cause, use 'float32')"
        )
    ids = ops.cast(labels, "int32")
    is_class = ops.logical_and(ids >= 0, ids < num_classes)
    in_range = ops.logical_and(is_class, ops.equal(ops.cast(ids, dtype), labels))
    if valid is not None:
        in_range = ops.logical_or(in_range, ops.logical_not(valid))

    known = _backend.concrete_value(in_range)
    if known is not None:
        if not known.all():
            wrong = ops.convert_to_numpy(labels)[~known].flat[0]
            raise ValueError(
                f"`y_true` must hold class ids in [0, {num_classes}), the range of the {num_classes} classes of "
                f"`y_pred`. Received: {wrong}"
            )
        in_range = None
    return ops.where(is_class, ids, 0), in_range
