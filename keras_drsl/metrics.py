"""Provide metrics to watch during training."""

from typing import Any

import keras
from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl._validation import check_choice, check_integer
from keras_drsl.predictions import LossInputs, match_weights, read_inputs
from keras_drsl.spread import MEASURES, SPACES, class_values, diversity


@keras.saving.register_keras_serializable(package="keras_drsl")
def softmax_diversity(
    y_true: Tensor,
    y_pred: Tensor,
    *,
    measure: str = "variance",
    space: str = "log_softmax",
    from_logits: bool = False,
    ignore_class: int | None = None,
    axis: int = -1,
) -> Tensor:
    """Compute the diversity of the non-true softmax values, one value per sample.

    Use it to inspect single images. `SoftmaxDiversity` is the metric to give to `compile`, and explains the measures.

    Args:
        y_true: Labels in any form that `keras_drsl.DRSLoss` takes.
        y_pred: Probabilities, or logits with `from_logits=True`, shape `(..., C)`, or with the classes at `axis`.
        measure: `"variance"`, `"std"` or `"entropy"`.
        space: `"log_softmax"` or `"softmax"`; not used for the entropy.
        from_logits: Whether `y_pred` holds logits.
        ignore_class: The id of a class whose positions are ignored, or None.
        axis: The axis of the classes in `y_pred`.

    Returns:
        One value per position, shape `y_pred.shape` without `axis`; 0 at ignored positions.

    Raises:
        ValueError: As `SoftmaxDiversity`.

    Example:

    >>> y_pred = [[0.8, 0.1, 0.1], [0.7, 0.1, 0.2]]
    >>> [round(float(value), 4) for value in keras_drsl.softmax_diversity([0, 0], y_pred)]
    [0.0, 0.1201]

    Reference: Wang et al., "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363.
    """
    check_choice("measure", measure, MEASURES)
    check_choice("space", space, SPACES)
    inputs = read_inputs(y_true, y_pred, from_logits=from_logits, ignore_class=ignore_class, axis=axis)
    return _diversity_per_position(inputs, measure, space)


# Not a subclass of MeanMetricWrapper, which ignores the Keras masks of values.
@keras.saving.register_keras_serializable(package="keras_drsl")
class SoftmaxDiversity(keras.metrics.Mean):
    """Compute how much the softmax values of the non-true classes differ, averaged over the samples.

    Use it with any classification loss to watch what the penalty of `keras_drsl.DRSLoss` reduces.

    Shapes: labels `(...)`, `(..., 1)` or `(..., C)` and predictions `(..., C)` give a scalar.

    Formula: the mean over the samples of

    - `measure="variance"`: `sum_k w_k (v_k - m)^2 / n`. Multiplied by `C - 1`, it is the default `r` of `DRSLoss`.
    - `measure="std"`: the square root of each sample's variance, in units of `v`.
    - `measure="entropy"`: `-sum_k q_k log q_k / log(C - 1)`. For one-hot labels it is in [0, 1]: 1 when the non-true
      classes have equal probabilities, 0 when all but one have probability 0. Less entropy is more diversity.

    with

    - `p`: the softmax output over `C` classes; `y`: the label as a distribution over them; `w = 1 - y`.
    - `v = log p` with `space="log_softmax"`, `v = p` with `space="softmax"`.
    - `n = sum(w)`; `m = sum(w * v) / n`; `q = w * p / sum(w * p)`.

    Note:

    - For two classes and a one-hot label there is one non-true class: variance and std are 0, and the entropy is 1
      by definition.
    - Labels that are not one-hot give weight to all `C` classes, so the entropy can be slightly above 1.
    - Probabilities below 1e-30 are replaced by 1e-30, unless the logits behind them can be found (TensorFlow).
    - Positions under a Keras mask or of `ignore_class` are ignored.
    - The logit of a non-true class may be minus infinity, as in a masked vocabulary: it counts as a probability of 0 in
      the entropy and with `space="softmax"`. Variance and std of log probabilities are infinite or NaN there, and so is
      their mean.
    - As with every Keras metric, sample and class weights are used only for metrics in
      `compile(weighted_metrics=...)`.
    - `EarlyStopping` and `ModelCheckpoint` do not know whether a larger value is better. Give them `mode="min"` for
      variance and std, and `mode="max"` for the entropy.

    Args:
        measure: `"variance"`, `"std"` or `"entropy"`.
        space: `"log_softmax"` or `"softmax"`; not used for the entropy.
        from_logits: Whether `y_pred` holds logits rather than probabilities.
        ignore_class: The id of a class whose positions are ignored, or None.
        axis: The axis of the classes in `y_pred`.
        name: The name in the logs.
        dtype: The dtype of the metric, by default Keras's `floatx`.

    Returns:
        A scalar.

    Raises:
        ValueError: At construction for an unknown `measure` or `space`. At a call, also while it is traced, for labels
            and predictions that do not match, as `keras_drsl.DRSLoss`.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, activation="softmax")])
    >>> model.compile(loss=keras_drsl.DRSLoss(), metrics=[keras_drsl.SoftmaxDiversity()])
    >>> data = {"x": np.ones((4, 8)), "y": np.arange(4), "validation_data": (np.ones((4, 8)), np.arange(4))}
    >>> stop = keras.callbacks.EarlyStopping(monitor="val_softmax_diversity", mode="min", patience=3)
    >>> history = model.fit(**data, callbacks=[stop], verbose=0)
    >>> "val_softmax_diversity" in history.history
    True

    Reference: Wang et al., "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363.
    """

    def __init__(
        self,
        *,
        measure: str = "variance",
        space: str = "log_softmax",
        from_logits: bool = False,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str = "softmax_diversity",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.measure = check_choice("measure", measure, MEASURES)
        self.space = check_choice("space", space, SPACES)
        self.from_logits = bool(from_logits)
        self.ignore_class = None if ignore_class is None else check_integer("ignore_class", ignore_class)
        self.axis = check_integer("axis", axis)

    def update_state(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add a batch to the mean.

        Args:
            y_true: Labels in any form that `keras_drsl.DRSLoss` takes.
            y_pred: Predictions, shape `(..., C)`, or with the classes at `axis`.
            sample_weight: Optional weights of the samples or positions: a number, shape `(...)` or `(..., 1)`, or one
                weight per sample.
        """
        inputs = read_inputs(
            y_true, y_pred, from_logits=self.from_logits, ignore_class=self.ignore_class, axis=self.axis
        )
        values = _diversity_per_position(inputs, self.measure, self.space)
        if sample_weight is not None:
            sample_weight, values = _weight_per_position(sample_weight, values)
        if inputs.valid is not None:
            valid = ops.cast(inputs.valid, values.dtype)
            sample_weight = valid if sample_weight is None else valid * sample_weight
        super().update_state(values, sample_weight=sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving."""
        return {
            **super().get_config(),
            "measure": self.measure,
            "space": self.space,
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
            "axis": self.axis,
        }


def _diversity_per_position(inputs: LossInputs, measure: str, space: str) -> Tensor:
    # The entropy is computed from log probabilities, whatever the space.
    space = "log_softmax" if measure == "entropy" else space
    values = class_values(inputs.safe_scores, from_logits=inputs.from_logits, space=space)
    return inputs.mask_values(diversity(values, inputs.distribution, measure=measure))


def _weight_per_position(sample_weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights of the rank of the values, and the values. As in Keras, a weight per sample has all its steps."""
    sample_weight = ops.convert_to_tensor(sample_weight)
    while len(sample_weight.shape) < len(values.shape):
        sample_weight = ops.expand_dims(sample_weight, -1)
    return match_weights(sample_weight, values)
