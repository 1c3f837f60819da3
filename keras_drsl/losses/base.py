"""What the losses share: labels, predictions, masks, saving."""

import re
from typing import Any, ClassVar

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl._backend import mask_of, with_mask
from keras_drsl.spread import class_values


class ClassificationLoss(keras.losses.Loss):
    """A loss of one value a position, from labels and predictions of any form `keras_drsl.DRSLoss` takes.

    Derive from it to add a loss: check and keep the hyperparameters in the constructor, name them in
    `hyperparameters`, and write the formula in `values`. Labels, the logits behind a softmax, masks, `ignore_class`,
    half precision and saving are dealt with here. CONTRIBUTING.md has an example.

    Edges: positions under a Keras mask or of `ignore_class` don't count and may hold anything. The logits of one that
    counts must be finite; a rival at minus infinity, as of a vocabulary that is masked, makes them NaN or infinite, but
    for `ZLoss` on the cross-entropy, and for `PRSLoss` unless it is among the rivals that count.

    Attributes:
        hyperparameters: the names of the constructor's own arguments, kept under the same names.
        needs_logits: whether the formula depends on a constant added to all logits. Probabilities don't know it, so
            those whose logits cannot be found are an error then.

    Args:
        from_logits: whether `y_pred` holds logits rather than probabilities. On TensorFlow the logits behind a softmax
            are found.
        ignore_class: the id of a class whose positions don't count, or None.
        axis: the axis of the classes in `y_pred`.
        reduction: how Keras reduces the values: `"sum_over_batch_size"`, `"sum"`, `"mean"`,
            `"mean_with_sample_weight"`, `"none"` or None.
        name: the name of the loss, by default that of the class in snake case.
        dtype: the dtype of the loss, by default Keras's `floatx`.

    Call arguments:
        y_true: class ids, shape `(...)` or `(..., 1)`; or a label distribution, shape `(..., C)`.
        y_pred: shape `(..., C)`, or with the classes at `axis`.
        sample_weight: optional weights of the samples or positions.

    Returns:
        A scalar, or with `reduction=None` one value a position.

    Raises:
        ValueError: at construction for an argument out of its range; when called or traced for shapes that cannot
            match, fewer than two classes, probabilities where logits are needed, or (where values can be seen) class
            ids outside `[0, C)`. In a compiled program, where they can't, the loss and its gradient are NaN.
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
        self.ignore_class = None if ignore_class is None else _arguments.check_integer("ignore_class", ignore_class)
        self.axis = _arguments.check_integer("axis", axis)
        self._own_dtype = None if dtype is None else self.dtype

    def values(self, inputs: _inputs.Inputs) -> Any:
        """The formula: one value a position, shape `(...)`; what it gives for positions that don't count is not seen.

        Args:
            inputs: labels and predictions; see its attributes and properties.
        """
        raise NotImplementedError

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The reduced loss; the arguments are explained in the class docstring."""
        mask = mask_of(y_pred)
        if mask is not None:
            # Between here and `call` a compiler may lose it: on torch it does.
            y_true = {**_as_dict(y_true), "mask": mask}
        # Keras's cast before `call` would lose what `call` needs to know of half-precision predictions.
        return super().__call__(y_true, _inputs.cast_keeping_attributes(y_pred, self.dtype), sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """One value a position; Keras applies weights, masks and the reduction."""
        given = _as_dict(y_true)
        inputs = _inputs.read(
            given["y_true"],
            y_pred,
            from_logits=self.from_logits,
            ignore_class=self.ignore_class,
            axis=self.axis,
            mask=given.get("mask"),
        )
        if self.needs_logits:
            check_logits(type(self).__name__, inputs)
        return finish(self._values_of(inputs, given), inputs, self.ignore_class)

    def _values_of(self, inputs: _inputs.Inputs, given: dict[str, Any]) -> Any:
        return self.values(inputs)

    def get_config(self) -> dict[str, Any]:
        """All arguments, for saving."""
        own = {name: getattr(self, name) for name in (*self.hyperparameters, "from_logits", "ignore_class", "axis")}
        return {**super().get_config(), **own, "dtype": self._own_dtype}


def _as_dict(y_true: Any) -> dict[str, Any]:
    """The labels and, where `__call__` adds to them what Keras does not show to `call`, that as well."""
    return y_true if isinstance(y_true, dict) else {"y_true": ops.convert_to_tensor(y_true)}


def finish(values: Any, inputs: _inputs.Inputs, ignore_class: int | None) -> Any:
    """The values as a loss returns them: 0 at positions that don't count, and masked where Keras can't know of it."""
    values = inputs.finish(values)
    return values if ignore_class is None else with_mask(values, inputs.valid)


def check_logits(name: str, inputs: _inputs.Inputs) -> None:
    """`ValueError` for probabilities whose logits are not known."""
    if not inputs.from_logits:
        raise ValueError(
            f"{name} depends on the logits themselves, and those behind `y_pred` cannot be found: they can on "
            "TensorFlow alone, where a softmax is the model's last step. End the model in logits and use "
            "`from_logits=True`. Received: from_logits=False"
        )


def cross_entropy(inputs: _inputs.Inputs, label_smoothing: float = 0.0) -> Any:
    """Keras's cross-entropy, one value a position."""
    if inputs.sparse and not label_smoothing:
        return keras.losses.sparse_categorical_crossentropy(
            inputs.labels, inputs.safe_scores, from_logits=inputs.from_logits
        )
    return keras.losses.categorical_crossentropy(
        inputs.distribution, inputs.safe_scores, from_logits=inputs.from_logits, label_smoothing=label_smoothing
    )


def logits_of(inputs: _inputs.Inputs) -> Any:
    """Logits, or the logarithms of probabilities, which have the same softmax; equal at positions that don't count."""
    return class_values(inputs.safe_scores, from_logits=inputs.from_logits, space="log_softmax")
