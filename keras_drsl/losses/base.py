"""Provide the base class of all losses, and the functions that their formulas share."""

import math
import re
import warnings
from typing import Any, ClassVar

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl._validation import check_integer, check_non_negative
from keras_drsl.predictions import LossInputs, Reduction, match_weights, read_inputs
from keras_drsl.spread import class_values, finite


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
    - A sample weight of 0 does not ignore a position: its label must be a class. For labels of -1, as language models
      make them, use `ignore_class=-1`.
    - The logit of a non-true class may be minus infinity, as in a masked vocabulary, where the loss has a finite value:
      in `ComplementObjective`, `GuidedComplementEntropy`, `ProbabilisticallyCompactLoss` and `ZLoss`, in `PRSLoss` if
      the class is not among the largest that it uses, and in `DRSLoss` with `lam=0` or `space="softmax"`. With a label
      smoothing, and in all other losses, the loss is then NaN or infinite. All other logits must be finite.
    - Of ragged and sparse tensors, only the dense form is taken.
    - In a compiled program, a hyperparameter keeps the value that it had when the program was compiled; assigning to
      the attribute is then a warning. To change one during training, give a `keras.Variable` and assign to it. On JAX,
      first make it an attribute of the model, as in `model.lam = lam`: JAX reads only the variables of the model again,
      and a callback must assign to them at the begin or end of an epoch. A variable gets no gradient from the loss, and
      is saved as its value.

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
        sample_weight: Optional weights of the samples or positions: a number, shape `(...)` or `(..., 1)`, or with 1 in
            place of a length to share the weight.

    Returns:
        A scalar, or with `reduction=None` one value per position. An empty batch gives the result that Keras gives.

    Raises:
        ValueError: At construction for an argument out of its range. At a call, also while it is traced, for shapes
            that do not match, fewer than two classes, and probabilities where logits are needed. Where values are
            known, also for class ids outside `[0, C)`, for label distributions that are negative, not finite or do not
            sum to 1, and for probabilities that are negative or do not sum to 1 (a forgotten `from_logits`). In a
            compiled program, where values are not known, these make the loss and its gradient NaN. On TensorFlow
            without XLA, a forgotten `from_logits` is a `tf.errors.InvalidArgumentError` there. Sums may differ from 1
            by 0.01.
        tf.errors.InvalidArgumentError: On TensorFlow, for lengths that are known only when a program runs and do not
            match.

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
    _is_compiled = False

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
        # Keras would cast labels to a floating dtype, which does not represent all class ids, and predictions to
        # tensors without mask and logits. So it only reduces the values.
        return reduce_values(self, *self._values_and_weights(y_true, y_pred, sample_weight))

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Compute one value per position, without sample weights and reduction.

        Args:
            y_true: Labels in any form.
            y_pred: Predictions.
        """
        values, valid, _ = self._values_and_weights(y_true, y_pred, None)
        return set_mask(values, valid)

    def _values_and_weights(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return one value per position, where positions are valid, and the sample weights."""
        inputs = read_inputs(
            y_true,
            y_pred,
            from_logits=self.from_logits,
            ignore_class=self.ignore_class,
            axis=self.axis,
            dtype=self.dtype,
        )
        if self.needs_logits:
            check_logits(type(self).__name__, inputs)
        is_symbolic = isinstance(inputs.scores, keras.KerasTensor)
        self._is_compiled = self._is_compiled or is_symbolic or _backend.is_compiling()
        values, sample_weight = self._weighted_values(inputs, sample_weight)
        return values, inputs.valid, sample_weight

    def _weighted_values(self, inputs: LossInputs, sample_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the formula. Return it, masked, and the sample weights by which Keras multiplies it."""
        values = self._fused_values(inputs)
        if values is None:
            values = inputs.mask_values(self.values(inputs))
        if sample_weight is not None:
            sample_weight, values = match_weights(sample_weight, values)
        return values, sample_weight

    def _fused_values(self, inputs: LossInputs) -> Tensor | None:
        """Compute the formula with its gradient in one pass, masked; None where there is no such program."""
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_compiled and name in self.hyperparameters:
            warnings.warn(
                f"`{name}` was changed after a program was compiled with this loss. That program keeps the old value. "
                f"Call `model.compile` again, or construct the loss with a `keras.Variable` and assign to it. "
                f"Received: {name}={value!r}",
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving. A `keras.Variable` is saved as its value."""
        own = {name: getattr(self, name) for name in (*self.hyperparameters, "from_logits", "ignore_class", "axis")}
        own = {name: float(value) if isinstance(value, keras.Variable) else value for name, value in own.items()}
        return {**super().get_config(), **own, "dtype": self._own_dtype}


def check_strength(name: str, value: Any) -> Any:
    """Return a hyperparameter, or raise `ValueError` unless it is a number >= 0 or a `keras.Variable` of one."""
    if not isinstance(value, keras.Variable):
        return check_non_negative(name, value)
    known = _backend.concrete_value(ops.convert_to_tensor(value))
    if tuple(value.shape) or (known is not None and not 0 <= known < math.inf):
        raise ValueError(f"`{name}` must be a non-negative number, or a variable of one. Received: {name}={value!r}")
    return value


def strength_of(value: Any, dtype: str) -> Any:
    """Return a hyperparameter for use in a formula: a number, or the present value of a variable as a constant.

    Args:
        value: A number or a `keras.Variable`.
        dtype: The dtype of the formula.
    """
    if not isinstance(value, keras.Variable):
        return value
    _backend.warn_if_constant(value)
    return ops.stop_gradient(ops.cast(value, dtype))


def is_zero(value: Any) -> bool:
    """Return whether a hyperparameter is 0 and can be left out of a program. A variable may change."""
    return not isinstance(value, keras.Variable) and value == 0


def mask_ignored(values: Tensor, inputs: LossInputs) -> Tensor:
    """Set the values of ignored positions to 0, and their Keras mask.

    Args:
        values: One value per position, shape `(...)`.
        inputs: The labels and predictions.
    """
    return set_mask(inputs.mask_values(values), inputs.valid)


def set_mask(values: Tensor, valid: Tensor | None) -> Tensor:
    """Set the Keras mask of values, unless all positions are valid.

    Args:
        values: One value per position, shape `(...)`.
        valid: Bool, shape `(...)`, or None.
    """
    return values if valid is None else _backend.set_mask(values, valid)


def reduce_values(loss: keras.losses.Loss, values: Tensor, valid: Tensor | None, weights: Tensor | None) -> Tensor:
    """Reduce values as Keras reduces those of a loss.

    Args:
        loss: The loss, with its reduction.
        values: One value per position, shape `(...)`.
        valid: Bool, shape `(...)`, or None.
        weights: The sample weights, or None.
    """
    if valid is not None and weights is not None:
        weights = ops.copy(weights)  # on PyTorch, Keras multiplies them by the mask in place
    values = set_mask(values, valid)
    return Reduction(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)(values, values, weights)


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


def cross_entropy(inputs: LossInputs, label_smoothing: float = 0.0, *, masked_classes: bool = True) -> Tensor:
    """Compute Keras's cross-entropy, one value per position.

    Args:
        inputs: The labels and predictions.
        label_smoothing: A number in [0, 1).
        masked_classes: Whether the value must be finite for non-true logits of minus infinity. With a label smoothing
            it is infinite. False saves time where the rest of a loss is not finite there.

    Returns:
        Shape `(...)`.
    """
    scores = inputs.safe_scores
    masked_classes = masked_classes and inputs.from_logits and not label_smoothing
    if inputs.sparse and not label_smoothing and (_backend.GATHERS_TRUE_LOGITS or not masked_classes):
        return keras.losses.sparse_categorical_crossentropy(inputs.labels, scores, from_logits=inputs.from_logits)
    y = inputs.distribution
    if masked_classes:
        # 0 log 0 = 0: a masked class that has no share of the label has no part in the sum.
        scores = ops.where(y > 0, scores, finite(scores))
    return keras.losses.categorical_crossentropy(
        y, scores, from_logits=inputs.from_logits, label_smoothing=label_smoothing
    )


def logits_of(inputs: LossInputs) -> Tensor:
    """Return the logits, or the logarithms of probabilities. Both have the same softmax.

    Args:
        inputs: The labels and predictions.

    Returns:
        Shape `(..., C)`. At ignored positions all logits are equal.
    """
    return class_values(inputs.safe_scores, from_logits=inputs.from_logits, space="log_softmax")
