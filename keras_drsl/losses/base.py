"""Provide the base class of all losses, and the functions that their formulas share."""

import re
from typing import Any, ClassVar

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl._validation import check_integer
from keras_drsl.predictions import LossInputs, cast_keeping_attributes, read_inputs
from keras_drsl.spread import class_values


class ClassificationLoss(keras.losses.Loss):
    """Compute one value per position from labels and predictions of any form, and reduce the values as Keras does.

    This is the base class of the losses in this package. Derive from it to add a loss: keep the hyperparameters as
    attributes, name them in `hyperparameters`, and write the formula in `values`. The base class handles class ids and
    label distributions, the logits behind a softmax, masks, `ignore_class`, half precision and saving.

    Shapes: labels `(...)`, `(..., 1)` or `(..., C)` and predictions `(..., C)` give values `(...)`. The dots stand for
    `batch`, `batch, time`, `batch, height, width` and so on; each index of them is a position. `C` is the number of
    classes.

    Note:

    - Positions under a Keras mask or of `ignore_class` are ignored; their values may be arbitrary.
    - At all other positions logits must be finite. Where the logit of a non-true class is minus infinity, as in a
      masked vocabulary, a loss is NaN or infinite. Exceptions are `ZLoss` on the cross-entropy, and `PRSLoss` if
      the class is not among the largest that it uses.

    Attributes:
        hyperparameters: The names of the constructor's own arguments. Each must be an attribute of the same name, so
            that it is saved with the loss.
        needs_logits: Whether a constant added to all logits changes the value. Such a loss cannot be computed from
            probabilities, and raises an error where their logits cannot be found.

    Args:
        from_logits: Whether `y_pred` holds logits rather than probabilities. On TensorFlow the logits behind a softmax
            are found.
        ignore_class: The id of a class whose positions are ignored, or None.
        axis: The axis of the classes in `y_pred`.
        reduction: How Keras reduces the values: `"sum_over_batch_size"`, `"sum"`, `"mean"`,
            `"mean_with_sample_weight"`, `"none"` or None.
        name: The name of the loss, by default the class name in snake case.
        dtype: The dtype of the loss, by default Keras's `floatx`.

    Call arguments:
        y_true: Class ids, shape `(...)` or `(..., 1)`; or a label distribution, shape `(..., C)`.
        y_pred: Shape `(..., C)`, or with the classes at `axis`.
        sample_weight: Optional weights of the samples or positions.

    Returns:
        A scalar, or with `reduction=None` one value per position.

    Raises:
        ValueError: At construction for an argument out of its range. At a call, also while it is traced, for shapes
            that cannot match, fewer than two classes, probabilities where logits are needed, and (where values are
            known) class ids outside `[0, C)`. In a compiled program, where values are not known, such an id makes the
            loss and its gradient NaN.

    Example:

    >>> class Brier(keras_drsl.losses.ClassificationLoss):
    ...     def values(self, inputs):
    ...         p = keras.ops.softmax(keras_drsl.losses.logits_of(inputs), axis=-1)
    ...         return keras.ops.sum(keras.ops.square(p - inputs.distribution), axis=-1)
    >>> round(float(Brier()([0], [[0.8, 0.1, 0.1]])), 4)  # 0.2^2 + 0.1^2 + 0.1^2
    0.06
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ()
    needs_logits: ClassVar[bool] = False

    def __init__(
        self,
        *,
        from_logits: bool = False,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        name = name or re.sub(r"(?<=.)([A-Z][a-z])", r"_\1", type(self).__name__).lower()
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.from_logits = bool(from_logits)
        self.ignore_class = None if ignore_class is None else check_integer("ignore_class", ignore_class)
        self.axis = check_integer("axis", axis)
        self._own_dtype = None if dtype is None else self.dtype

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute the formula, one value per position. Values at ignored positions are not used.

        Args:
            inputs: Labels and predictions; see the attributes and properties of `keras_drsl.losses.LossInputs`.

        Returns:
            Shape `(...)`.
        """
        raise NotImplementedError

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Compute the reduced loss; the class docstring explains the arguments."""
        mask = _backend.get_mask(y_pred)
        if mask is not None:
            # A compiler may lose the mask between here and `call`; PyTorch's does.
            y_true = {**_as_dict(y_true), "mask": mask}
        # Keras casts half-precision predictions before `call`, and would lose their attributes.
        return super().__call__(y_true, cast_keeping_attributes(y_pred, self.dtype), sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Compute one value per position. Keras applies weights, masks and the reduction.

        Args:
            y_true: Labels in any form.
            y_pred: Predictions.
        """
        given = _as_dict(y_true)
        inputs = read_inputs(
            given["y_true"],
            y_pred,
            from_logits=self.from_logits,
            ignore_class=self.ignore_class,
            axis=self.axis,
            mask=given.get("mask"),
        )
        if self.needs_logits:
            check_logits(type(self).__name__, inputs)
        return mask_ignored(self._weighted_values(inputs, given.get("sample_weight")), inputs, self.ignore_class)

    def _weighted_values(self, inputs: LossInputs, sample_weight: Tensor | None) -> Tensor:
        """Compute the formula with sample weights. They are None unless a subclass passes them from `__call__`."""
        return self.values(inputs)

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving."""
        own = {name: getattr(self, name) for name in (*self.hyperparameters, "from_logits", "ignore_class", "axis")}
        return {**super().get_config(), **own, "dtype": self._own_dtype}


def _as_dict(y_true: Any) -> dict[str, Tensor]:
    """Return the labels, and the other values that `__call__` has added because Keras does not pass them to `call`."""
    return y_true if isinstance(y_true, dict) else {"y_true": ops.convert_to_tensor(y_true)}


def mask_ignored(values: Tensor, inputs: LossInputs, ignore_class: int | None) -> Tensor:
    """Set the values of ignored positions to 0. With `ignore_class`, also set the Keras mask.

    Args:
        values: One value per position, shape `(...)`.
        inputs: The labels and predictions.
        ignore_class: A class id, or None.
    """
    values = inputs.mask_values(values)
    return values if ignore_class is None else _backend.set_mask(values, inputs.valid)


def check_logits(name: str, inputs: LossInputs) -> None:
    """Raise `ValueError` for probabilities whose logits are not known.

    Args:
        name: The name of the loss.
        inputs: The labels and predictions.
    """
    if not inputs.from_logits:
        raise ValueError(
            f"{name} needs logits, and those behind `y_pred` cannot be found. They can be found only on TensorFlow, "
            "where a softmax is the model's last operation. End the model in logits and use `from_logits=True`. "
            "Received: from_logits=False"
        )


def cross_entropy(inputs: LossInputs, label_smoothing: float = 0.0) -> Tensor:
    """Compute Keras's cross-entropy, one value per position.

    Args:
        inputs: The labels and predictions.
        label_smoothing: A number in [0, 1).

    Returns:
        Shape `(...)`.
    """
    if inputs.sparse and not label_smoothing:
        return keras.losses.sparse_categorical_crossentropy(
            inputs.labels, inputs.safe_scores, from_logits=inputs.from_logits
        )
    return keras.losses.categorical_crossentropy(
        inputs.distribution, inputs.safe_scores, from_logits=inputs.from_logits, label_smoothing=label_smoothing
    )


def logits_of(inputs: LossInputs) -> Tensor:
    """Return the logits, or the logarithms of probabilities. Both have the same softmax.

    Args:
        inputs: The labels and predictions.

    Returns:
        Shape `(..., C)`. At ignored positions all logits are equal.
    """
    return class_values(inputs.safe_scores, from_logits=inputs.from_logits, space="log_softmax")
