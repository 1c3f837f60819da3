"""Read labels and predictions of any form: class ids or distributions, logits or probabilities, masks, any class axis.

Losses and metrics call `read_inputs` before their formulas. `LossInputs` is what a formula takes.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor

Shape = tuple[int | None, ...]

# How far from 1 the sum of a distribution over many classes may be in half precision.
SUM_TOLERANCE = 1e-2
# What `1 - sum` of the other classes may be below 0.
NEGATIVE_TOLERANCE = 1e-6


class LossInputs(NamedTuple):
    """Hold labels and predictions in the one form that formulas take.

    Attributes:
        labels: Class ids, int32, shape `(...)`, all within `[0, C)`; or a label distribution, shape `(..., C)`.
        scores: Logits or probabilities, float32 or float64, shape `(..., C)`. At masked positions the values are
            arbitrary and may be NaN. Use `safe_scores` in a formula.
        from_logits: Whether `scores` are logits.
        valid: Bool, shape `(...)`, False at positions excluded by a mask or by `ignore_class`; None if all positions
            are valid.
        in_range: Bool, shape `(...)`, False where a class id is outside `[0, C)`, or where labels or probabilities are
            not a distribution; None if all are known to be right.
        lengths_match: Bool, shape `(...)`, True. The program that computes it fails where lengths that were not known
            before do not match. None if all are known to match.
    """

    labels: Tensor
    scores: Tensor
    from_logits: bool
    valid: Tensor | None
    in_range: Tensor | None
    lengths_match: Tensor | None = None

    @property
    def sparse(self) -> bool:
        """Whether the labels are class ids."""
        return len(self.labels.shape) < len(self.scores.shape)

    @property
    def distribution(self) -> Tensor:
        """The labels as a distribution, shape `(..., C)`."""
        if self.sparse:
            return ops.cast(is_true_class(self.labels, self.scores.shape[-1]), self.scores.dtype)
        return self.labels

    @property
    def safe_scores(self) -> Tensor:
        """The scores, with ones at masked positions: arbitrary values there reach neither the loss nor its gradient."""
        if self.valid is None:
            return self.scores
        return ops.where(ops.expand_dims(self.valid, -1), self.scores, ops.ones_like(self.scores))

    @property
    def scale(self) -> Tensor:
        """The factor of each value, shape `(...)`: 1; 0 at masked positions; NaN where `in_range` is False."""
        return self.mask_values(ops.ones_like(self.scores[..., 0]))

    def mask_values(self, values: Tensor) -> Tensor:
        """Set one value per position to 0 at masked positions and to NaN where `in_range` is False.

        Args:
            values: Shape `(...)`.
        """
        return mask_values(values, self.valid, self.in_range)


def read_inputs(
    y_true: Tensor, y_pred: Tensor, *, from_logits: bool, ignore_class: int | None, axis: int, dtype: str | None = None
) -> LossInputs:
    """Bring labels and predictions into one form.

    Args:
        y_true: Class ids, shape `(...)` or `(..., 1)`, or a label distribution of the shape of `y_pred`.
        y_pred: Probabilities or logits, shape `(..., C)`, or with the classes at `axis`. Its Keras mask is used.
        from_logits: Whether `y_pred` holds logits.
        ignore_class: The id of a class whose positions are masked, or None.
        axis: The axis of the classes in `y_pred`.
        dtype: The dtype to compute in, or None for that of `y_pred`. Half precision becomes float32.

    Raises:
        ValueError: For shapes that do not match, for ragged or sparse tensors, and, where the values are known, for
            class ids outside `[0, C)` and for labels or probabilities that are not a distribution.
    """
    mask = _backend.get_mask(y_pred)  # before anything else: PyTorch's compiler loses it in a conversion
    y_pred = to_dense("y_pred", y_pred)
    scores, from_logits = logits_behind_softmax(y_pred, from_logits, axis)
    scores = _as_float(scores, dtype)
    labels, scores = _move_classes_last(_to_labels(y_true, ignore_class), scores, axis)

    positions = tuple(scores.shape)[:-1]
    valid = _valid_positions(mask, positions, labels, ignore_class)
    if len(labels.shape) < len(scores.shape):
        labels, in_range = _check_class_ids(labels, valid, scores.shape[-1])
    else:
        labels, in_range = _check_distributions(labels, valid)
    per_position = labels[..., 0] if len(labels.shape) == len(scores.shape) else labels
    lengths_match = _match_positions(per_position, mask, scores[..., 0])
    in_range = _all_of(in_range, lengths_match)
    if not from_logits:
        in_range = _all_of(in_range, _check_probabilities(scores, valid))
    return LossInputs(labels, scores, from_logits, valid, in_range, lengths_match)


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
        return mask_values(ops.ones_like(self.ids, dtype=dtype), self.valid, self.in_range)


def read_class_ids(y_true: Tensor, features: Tensor, num_classes: int, *, ignore_class: int | None) -> ClassIds:
    """Bring class ids into one form.

    Args:
        y_true: Class ids, shape `(...)` or `(..., 1)`.
        features: Shape `(..., D)`. Its Keras mask is used.
        num_classes: The number of classes.
        ignore_class: The id of a class whose positions are masked, or None.

    Raises:
        ValueError: As `read_inputs`.
    """
    labels, positions = _to_labels(y_true, ignore_class), tuple(features.shape)[:-1]
    if len(labels.shape) == len(positions) + 1 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    if not shapes_match(tuple(labels.shape), positions):
        raise ValueError(
            "`y_true` must hold one class id per position. "
            f"Received: y_true.shape={tuple(labels.shape)}, positions of shape {positions}"
        )
    mask = _backend.get_mask(features)
    valid = _valid_positions(mask, positions, labels, ignore_class)
    ids, in_range = _check_class_ids(labels, valid, num_classes)
    return ClassIds(ids, valid, _all_of(in_range, _match_positions(labels, mask, features[..., 0])))


def match_weights(sample_weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Check that there is one sample weight per value.

    Args:
        sample_weight: A number, or shape `(...)` or `(..., 1)`, or with 1 in place of a length to share the weight.
        values: One value per position, shape `(...)`.

    Returns:
        The weights as a tensor of the rank of `values`, and `values`, which depend on the check in a graph.

    Raises:
        ValueError: For another shape.
    """
    weights = ops.cast(to_dense("sample_weight", sample_weight), values.dtype)
    given, positions = tuple(weights.shape), tuple(values.shape)
    if len(given) == len(positions) + 1 and given[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    elif not given:
        weights = ops.reshape(weights, (1,) * len(positions))
    lengths = tuple(weights.shape)
    # A length of 1 is broadcast, so it matches any length.
    if not shapes_match(tuple(None if length == 1 else length for length in lengths), positions):
        raise ValueError(
            "`sample_weight`, or what Keras makes of `class_weight`, must hold one weight per position, or 1 in place "
            f"of a length to share the weight. Received: sample_weight.shape={given}, positions of shape {positions}"
        )
    if None in (*lengths, *positions):
        values = values + ops.broadcast_to(ops.zeros_like(weights), ops.shape(values))
    return weights, values


class Reduction(keras.losses.Loss):
    """Reduce values that are computed already, with sample weights, their Keras mask and replicas, as any loss does."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, which are given twice."""
        return y_pred


def logits_behind_softmax(y_pred: Tensor, from_logits: bool, axis: int) -> tuple[Tensor, bool]:
    """Return the logits behind a softmax output. Where they cannot be found, return `y_pred` itself.

    Keras's own losses look for them too.

    Args:
        y_pred: Probabilities or logits, with the classes at `axis`.
        from_logits: Whether `y_pred` is said to hold logits.
        axis: The axis of the classes.

    Returns:
        Logits or probabilities, and whether they are logits.
    """
    is_axis = -len(y_pred.shape) <= axis < len(y_pred.shape)
    logits = _backend.input_of_softmax(y_pred, axis) if is_axis else None
    if logits is None:
        # A copy has no attributes: Keras's cross-entropy takes the logits of a sigmoid for those of a softmax.
        return ops.copy(y_pred) if hasattr(y_pred, "_keras_logits") else y_pred, from_logits
    if from_logits:
        warnings.warn(
            "`from_logits=True`, but `y_pred` is the output of a softmax, so it holds probabilities. "
            "The logits before that softmax are used.",
            stacklevel=4,
        )
    return logits, True


def is_true_class(class_ids: Tensor, num_classes: int, *, axis: int = -1) -> Tensor:
    """Return which classes are the true ones. `ops.one_hot` looks at values on PyTorch, which `torch.func` may forbid.

    Args:
        class_ids: Int32, shape `(...)`.
        num_classes: The number of classes.
        axis: Where the axis of the classes is added.

    Returns:
        Bool, shape `(..., num_classes)`, or with the classes at `axis`.
    """
    ids = ops.expand_dims(class_ids, axis)
    # Of the same rank, as JAX may be told to refuse others.
    shape = [1] * len(ids.shape)
    shape[axis] = num_classes
    return ops.equal(ids, ops.reshape(ops.arange(num_classes, dtype="int32"), shape))


def shapes_match(shape: Shape, other: Shape) -> bool:
    """Return whether two shapes can be equal; None is a length that is not known yet."""
    return len(shape) == len(other) and all(a is None or b is None or a == b for a, b in zip(shape, other, strict=True))


def to_dense(name: str, x: Any) -> Tensor:
    """Return a tensor, or raise `ValueError` for one that does not hold one value per index."""
    if not _backend.is_dense(x):
        raise ValueError(f"`{name}` must be a dense tensor, not a ragged or sparse one. Received: {type(x).__name__}")
    return ops.convert_to_tensor(x)


def _to_labels(y_true: Any, ignore_class: int | None) -> Tensor:
    """Return labels as a tensor. Raise `ValueError` where the backend has no integers large enough for them."""
    labels = to_dense("y_true", y_true)
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if ignore_class is not None and not -(2**31) <= ignore_class < 2**31 and _has_no_int64():
        raise ValueError(
            "`ignore_class` must be a 32-bit integer, unless JAX is told to use 64 bits with `jax_enable_x64`. "
            f"Received: ignore_class={ignore_class}"
        )
    if isinstance(y_true, np.ndarray) and y_true.dtype.kind in "iu" and np.dtype(dtype).itemsize < y_true.itemsize:
        cut = ops.convert_to_numpy(labels) != y_true
        if cut.any():
            raise ValueError(f"`y_true` must hold integers that fit in {dtype}. Received: {y_true[cut].flat[0]}")
    return labels


def _has_no_int64() -> bool:
    return str(keras.backend.standardize_dtype(ops.convert_to_tensor(np.int64(0)).dtype)) != "int64"


def _as_float(x: Tensor, dtype: str | None) -> Tensor:
    """Cast to `dtype`, but at least to float32: in half precision squares overflow and small differences are lost."""
    dtype = dtype or keras.backend.standardize_dtype(x.dtype)
    return ops.cast(x, dtype if dtype == "float64" else "float32")


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
    if len(labels_shape) == rank:
        labels = ops.cast(labels, scores.dtype)
        if labels_shape[axis] is None:
            # A length that turns out to be another one is an error and is not broadcast.
            labels = ops.sum(ops.stack([labels, ops.zeros_like(scores)]), axis=0)
    if axis != rank - 1:
        scores = ops.moveaxis(scores, axis, -1)
        if len(labels_shape) == rank:
            labels = ops.moveaxis(labels, axis, -1)
    return labels, scores


def _all_of(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return where both are True; None is True everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return ops.logical_and(first, second)


def _match_positions(labels: Tensor, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return True per position, with an error while the program runs if lengths turn out not to match.

    Args:
        labels: One label per position.
        mask: A mask of the positions, or None.
        like: A tensor of the shape of the positions.
    """
    tensors = [labels, like] if mask is None else [labels, mask, like]
    if not any(None in tuple(x.shape) for x in tensors):
        return None
    # Tensors of different shapes cannot be stacked, in any backend and by XLA too. Broadcasting would hide them.
    return ops.all(ops.stack([ops.ones_like(x, dtype="bool") for x in tensors]), axis=0)


def mask_values(values: Tensor, valid: Tensor | None, in_range: Tensor | None) -> Tensor:
    """Set values to 0 where they are not valid and to NaN where they are not in range, as `LossInputs.mask_values`."""
    if in_range is not None:
        # 1 or 0/0: NaN arises only where something is wrong. A product, so that the gradient is NaN too.
        right = ops.cast(in_range, values.dtype)
        values = values * (right / right)
    if valid is not None:
        values = ops.where(valid, values, ops.zeros_like(values))
    return values


def _valid_positions(mask: Tensor | None, positions: Shape, labels: Tensor, ignore_class: int | None) -> Tensor | None:
    """Return where positions are valid, a bool per position, or None if all are."""
    valid = None
    if mask is not None:
        if not shapes_match(tuple(mask.shape), positions):
            raise ValueError(
                "The Keras mask must have one value per position. "
                f"Received: mask.shape={tuple(mask.shape)}, positions of shape {positions}"
            )
        valid = ops.cast(mask, "bool")
    if ignore_class is None:
        return valid
    if len(labels.shape) > len(positions):
        ignored = np.reshape(np.arange(labels.shape[-1]) == ignore_class, (1,) * len(positions) + (-1,))
        counts = ops.any(ops.not_equal(labels, ops.cast(ignored, labels.dtype)), axis=-1)
    elif _fits(ignore_class, keras.backend.standardize_dtype(labels.dtype)):
        counts = ops.not_equal(labels, ops.cast(np.asarray(ignore_class), labels.dtype))
    else:
        return valid  # No label of this dtype can be equal to it.
    return counts if valid is None else ops.logical_and(valid, counts)


def _fits(number: int, dtype: str) -> bool:
    """Return whether a dtype represents an integer exactly."""
    if dtype == "bool":
        return number in (0, 1)
    if "int" in dtype:
        info = np.iinfo(dtype)
        return int(info.min) <= number <= int(info.max)
    # 2 to the power of the number of digits of the significand.
    largest = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24, "float64": 2**53}
    return abs(number) <= largest[dtype]


def _check_class_ids(labels: Tensor, valid: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Return class ids as int32, all within the range, and where the labels were.

    Where the values are known, a label that is not a class is an error.
    """
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if "float" in dtype and not _fits(num_classes - 1, dtype):
        raise ValueError(
            f"`y_true` must hold class ids in a dtype that represents all {num_classes} classes exactly. "
            f"Received: y_true.dtype={dtype}"
        )
    ids = ops.cast(labels, "int32")
    is_class = ops.logical_and(ids >= 0, ids < num_classes)
    in_range = ops.logical_and(is_class, ops.equal(ops.cast(ids, dtype), labels))

    def error(wrong: Any) -> str:
        return (
            f"`y_true` must hold class ids in [0, {num_classes}), the range of the {num_classes} classes of "
            f"`y_pred`. Received: {_first(labels, wrong)}. To leave out positions, use `ignore_class`, such as "
            "`ignore_class=-1`: a sample weight of 0 does not leave them out."
        )

    return ops.where(is_class, ids, 0), _where_right(in_range, valid, error)


def _check_distributions(labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return label distributions, uniform at masked positions, and where they are distributions."""
    if valid is not None:
        labels = ops.where(ops.expand_dims(valid, -1), labels, 1.0 / labels.shape[-1])
    total = ops.sum(labels, axis=-1)
    right = is_distribution(labels, total)

    def error(wrong: Any) -> str:
        return (
            "`y_true` must hold class ids or label distributions: finite numbers >= 0 that sum to 1 per position. "
            "For positions to ignore, use a mask, or class ids and `ignore_class`. "
            f"Received: a position that sums to {_first(total, wrong)}"
        )

    return labels, _where_right(right, None, error)


def _check_probabilities(scores: Tensor, valid: Tensor | None) -> Tensor | None:
    """Return where predictions are distributions. NaN predictions are not looked at: the loss is NaN there."""
    total = ops.sum(scores, axis=-1)
    rule = "`y_pred` must hold probabilities, which are >= 0 and sum to 1, unless `from_logits=True`."

    def error(wrong: Any) -> str:
        return f"{rule} Received: a position that sums to {_first(total, wrong)}"

    right = _where_right(ops.logical_or(is_distribution(scores, total), ops.isnan(total)), valid, error)
    if right is not None:
        _backend.stop_program(right, rule)
    return right


def is_distribution(x: Tensor, total: Tensor, *, axis: int = -1, keepdims: bool = False) -> Tensor:
    """Return where the values of all classes are >= 0 and sum to 1, about.

    Args:
        x: The values, with the classes at `axis`.
        total: Their sums over that axis.
        axis: The axis of the classes.
        keepdims: Whether that axis is kept in `total` and in the result, with the length 1.
    """
    positive = ops.all(x >= -NEGATIVE_TOLERANCE, axis=axis, keepdims=keepdims)
    return ops.logical_and(positive, ops.abs(total - 1.0) <= SUM_TOLERANCE)


def _first(x: Tensor, wrong: Any) -> Any:
    """Return the value of the first wrong position. JAX knows which are wrong, but not the values, under `jax.grad`."""
    known = _backend.concrete_value(x)
    return "a traced value" if known is None else known[wrong].flat[0]


def _where_right(right: Tensor, valid: Tensor | None, error: Callable[[Any], str]) -> Tensor | None:
    """Return where positions are right or masked, or None if all are known to be.

    Args:
        right: Bool, shape `(...)`.
        valid: Bool, shape `(...)`, False at masked positions, or None.
        error: Maps where positions are wrong to the message of the error.

    Raises:
        ValueError: Where values are known and one is wrong.
    """
    if valid is not None:
        right = ops.logical_or(right, ops.logical_not(valid))
    known = _backend.concrete_value(right)
    if known is None:
        return right
    if not known.all():
        raise ValueError(error(~known))
    return None
