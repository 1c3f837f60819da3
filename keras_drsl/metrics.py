"""Metrics to watch while training."""

from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl.spread import MEASURES, SPACES, class_values, diversity


def softmax_diversity(
    y_true: Any,
    y_pred: Any,
    *,
    measure: str = "variance",
    space: str = "log_softmax",
    from_logits: bool = False,
    ignore_class: int | None = None,
    axis: int = -1,
) -> Any:
    """The diversity of the non-true softmax values, one value a sample.

    The function behind `SoftmaxDiversity`, which explains the measures and the arguments. Use it to look at single
    images.

    Args:
        y_true: labels in any form `keras_drsl.DRSLoss` takes.
        y_pred: probabilities, or logits with `from_logits=True`, shape `(..., C)` (the classes along `axis`).
        measure: `"variance"`, `"std"` or `"entropy"`.
        space: `"log_softmax"` or `"softmax"`.
        from_logits: whether `y_pred` holds logits.
        ignore_class: a class id whose positions are 0, or None.
        axis: the axis of the classes in `y_pred`.

    Returns:
        Shape `y_pred.shape` without `axis`.

    Raises:
        ValueError: as `SoftmaxDiversity`.

    Example:

    >>> y_pred = [[0.8, 0.1, 0.1], [0.7, 0.1, 0.2]]
    >>> [round(float(value), 4) for value in keras_drsl.softmax_diversity([0, 0], y_pred)]
    [0.0, 0.1201]

    Reference: arXiv:2303.12363.
    """
    _arguments.check_choice("measure", measure, MEASURES)
    _arguments.check_choice("space", space, SPACES)
    inputs = _inputs.read(y_true, y_pred, from_logits=from_logits, ignore_class=ignore_class, axis=axis)
    return _diversity(inputs, measure, space)


@keras.saving.register_keras_serializable(package="keras_drsl")
class SoftmaxDiversity(keras.metrics.Mean):  # not MeanMetricWrapper, which passes masks of values over
    """How much the softmax values of the non-true classes differ, averaged over the samples.

    Use it beside any classification loss to watch what `keras_drsl.DRSLoss` restrains: the value in the logs is the
    mean over the samples of

    - `measure="variance"`: `sum_k w_k (v_k - m)^2 / n`. Times `C - 1`, it is the default restraint inside the loss.
    - `measure="std"`: its square root, sample by sample, in units of `v`.
    - `measure="entropy"`: `-sum_k q_k log q_k / log(C - 1)`, in [0, 1] for one-hot labels: 1 when the non-true classes
      share their probability evenly, 0 when one has all of it. The lower, the more diverse.

    Here `p` is the softmax output over `C` classes and `y` the label as a distribution; `w = 1 - y`; `v = log p` with
    `space="log_softmax"` and `v = p` with `space="softmax"`; `n = sum(w)`; `m = sum(w * v) / n`; `q` is `w * p` divided
    by its sum.

    Edges: for two classes and a one-hot label there is one rival, and variance and std are 0; the entropy for two
    classes is 1 by definition. Labels that are no one-hot give weight to all `C` classes, so the entropy can exceed 1
    a little. Probabilities below 1e-30 count as 1e-30 unless the logits behind them can be found (TensorFlow).
    Positions under a Keras mask or of `ignore_class` don't count. As with every Keras metric, only those named in
    `compile(weighted_metrics=...)` are given sample and class weights.

    Args:
        measure: `"variance"`, `"std"` or `"entropy"`.
        space: `"log_softmax"` or `"softmax"`; without meaning for the entropy.
        from_logits: whether `y_pred` holds logits rather than probabilities.
        ignore_class: the id of a class whose positions don't count, or None.
        axis: the axis of the classes in `y_pred`.
        name: the name in the logs.
        dtype: the dtype of the metric, by default Keras's `floatx`.

    Raises:
        ValueError: at construction for an unknown `measure` or `space`; when called or traced for labels and
            predictions that don't fit, as `keras_drsl.DRSLoss`.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, activation="softmax")])
    >>> model.compile(loss=keras_drsl.DRSLoss(), metrics=[keras_drsl.SoftmaxDiversity()])
    >>> data = {"x": np.ones((4, 8)), "y": np.arange(4), "validation_data": (np.ones((4, 8)), np.arange(4))}
    >>> stop = keras.callbacks.EarlyStopping(monitor="val_softmax_diversity", mode="min", patience=3)
    >>> history = model.fit(**data, callbacks=[stop], verbose=0)
    >>> "val_softmax_diversity" in history.history
    True

    `EarlyStopping` and `ModelCheckpoint` cannot know which way is better for a name of ours: give them `mode="min"`
    for variance and std, `mode="max"` for the entropy.

    Reference: arXiv:2303.12363.
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
        self.measure = _arguments.check_choice("measure", measure, MEASURES)
        self.space = _arguments.check_choice("space", space, SPACES)
        self.from_logits = bool(from_logits)
        self.ignore_class = None if ignore_class is None else _arguments.check_integer("ignore_class", ignore_class)
        self.axis = _arguments.check_integer("axis", axis)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch to the mean.

        Args:
            y_true: labels in any form `keras_drsl.DRSLoss` takes.
            y_pred: predictions, shape `(..., C)`.
            sample_weight: optional weights of the samples or positions.
        """
        inputs = _inputs.read(
            y_true, y_pred, from_logits=self.from_logits, ignore_class=self.ignore_class, axis=self.axis
        )
        values = _diversity(inputs, self.measure, self.space)
        if inputs.valid is not None:
            sample_weight = _weights_of_valid(ops.cast(inputs.valid, self.dtype), sample_weight)
        super().update_state(values, sample_weight=sample_weight)

    def get_config(self) -> dict[str, Any]:
        """All arguments, for saving."""
        return {
            **super().get_config(),
            "measure": self.measure,
            "space": self.space,
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
            "axis": self.axis,
        }


def _diversity(inputs: _inputs.Inputs, measure: str, space: str) -> Any:
    # Entropy is a property of the distribution, whatever space its values are given in.
    space = "log_softmax" if measure == "entropy" else space
    values = class_values(inputs.safe_scores, from_logits=inputs.from_logits, space=space)
    return inputs.finish(diversity(values, inputs.distribution, measure=measure))


def _weights_of_valid(valid: Any, sample_weight: Any) -> Any:
    """Weights that are 0 where a position doesn't count, shape `(...)`: Keras's means don't see masks of values."""
    if sample_weight is None:
        return valid
    sample_weight = ops.cast(sample_weight, valid.dtype)
    if len(sample_weight.shape) > len(valid.shape):
        sample_weight = ops.squeeze(sample_weight, axis=-1)
    while len(sample_weight.shape) < len(valid.shape):
        sample_weight = ops.expand_dims(sample_weight, -1)
    return valid * sample_weight
