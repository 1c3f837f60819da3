"""The distribution-restrained softmax loss."""

from typing import Any

import keras

from keras_drsl import _arguments, _inputs, one_pass
from keras_drsl.losses.base import ClassificationLoss, cross_entropy, finish
from keras_drsl.spread import SPACES, SPREADS, class_values
from keras_drsl.spread import spread as spread_of


@keras.saving.register_keras_serializable(package="keras_drsl")
def drs_loss(
    y_true: Any,
    y_pred: Any,
    lam: float = 0.3,
    *,
    from_logits: bool = False,
    space: str = "log_softmax",
    spread: str = "sum_of_squares",
    label_smoothing: float = 0.0,
    ignore_class: int | None = None,
    axis: int = -1,
) -> Any:
    """Cross-entropy plus a restraint on how much the non-true softmax values differ, one value a sample.

    The function behind `DRSLoss`, which explains the formula and the arguments. Use it where unreduced values are
    wanted: a custom training step, a look at single images. In `model.compile` prefer the class: under mixed precision
    Keras casts what it gives to a function, and the mask and the logits behind a softmax are lost on the way.

    Args:
        y_true: labels in any form `DRSLoss` takes.
        y_pred: probabilities, or logits with `from_logits=True`, shape `(..., C)` (the classes along `axis`).
        lam: as in `DRSLoss`, like all that follow.
        from_logits: whether `y_pred` holds logits.
        space: `"log_softmax"` or `"softmax"`.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: a number in [0, 1).
        ignore_class: a class id, or None.
        axis: the axis of the classes in `y_pred`.

    Returns:
        The loss of each position, shape `y_pred.shape` without `axis`, float64 for float64 predictions and float32
        otherwise. Positions ruled out by `ignore_class` or by a Keras mask are 0; for `ignore_class`, the values
        carry a Keras mask too, so that Keras averages over the others.

    Raises:
        ValueError: as `DRSLoss`, when called or while it is traced.

    Example:

    >>> y_true = [0, 2]
    >>> y_pred = [[0.8, 0.1, 0.1], [0.1, 0.3, 0.6]]
    >>> [round(float(value), 4) for value in keras_drsl.drs_loss(y_true, y_pred)]
    [0.2231, 0.6919]

    The first image's rivals are even, so its loss is its cross-entropy, -log 0.8. The second pays 0.3 times the
    spread of log 0.1 and log 0.3 on top of -log 0.6.

    Reference: arXiv:2303.12363.
    """
    lam = _arguments.check_non_negative("lam", lam)
    label_smoothing = check_smoothing(label_smoothing)
    _arguments.check_choice("space", space, SPACES)
    _arguments.check_choice("spread", spread, SPREADS)

    inputs = _inputs.read(y_true, y_pred, from_logits=from_logits, ignore_class=ignore_class, axis=axis)
    return finish(_values(inputs, lam, space, spread, label_smoothing), inputs, ignore_class)


@keras.saving.register_keras_serializable(package="keras_drsl")
class DRSLoss(ClassificationLoss):
    """Distribution-restrained softmax loss: cross-entropy that keeps the non-true classes alike.

    Use it in place of `SparseCategoricalCrossentropy` or `CategoricalCrossentropy` (it takes the labels of both) when
    a classifier should be harder to attack at small budgets for no extra cost. It works best together with noise on
    the inputs while training, and it does not replace adversarial training. A larger `lam` restrains more.

    Formula: `loss = CE(y, p) + lam * r`, for each sample, with

    - `p`: the softmax of the logits `z`, `C` classes; `y`: the label as a distribution over them, `sum(y) = 1`.
    - `CE(y, p) = -sum_k y_k log p_k`.
    - `w = 1 - y`: the weight of each class as a non-true one; for a one-hot `y`, 0 on the true class, 1 on its rivals.
    - `v = log p` with `space="log_softmax"`, `v = p` with `space="softmax"`.
    - `n = sum(w) = C - 1`; `m = sum(w * v) / n`, the mean of the non-true values.
    - `r = sum_k w_k (v_k - m)^2` with `spread="sum_of_squares"`, the same divided by `n` with `spread="variance"`.

    The default pulls each rival's logit towards the mean by `2 lam (v_k - m)`, whatever the number of classes;
    the pull of the variance is `C - 1` times weaker and fades away as classes are added.

    Edges: equal non-true values give `r = 0` and no pull. Two classes and a one-hot label leave one rival: `r = 0`.
    `lam=0` is Keras's cross-entropy, in value and gradient. In log space `r` does not change when a constant is added
    to all logits. Logits are used wherever they can be found behind a softmax output (TensorFlow); elsewhere
    probabilities are clipped, by Keras's `epsilon` in the cross-entropy and at 1e-30 in the restraint, and have no
    gradient below. Positions under a Keras mask or of `ignore_class` don't count, may hold anything, and the mean is
    taken over the others. Sample weights are applied to the finished values: a position of weight 0 is not known to
    the loss and must hold a valid label and finite predictions. So must the logits of a position that counts: a rival
    at minus infinity is infinitely far from the others, and the loss is NaN. Half-precision predictions are computed in
    float32. Where the logits behind a float16 softmax cannot be found, its gradient, up to 1 / p, overflows: on JAX and
    torch end a model of mixed precision in logits or in a softmax of float32. The softmax space takes probabilities as
    they are and does not make them sum to 1.

    Args:
        lam: the strength of the restraint, a number >= 0. Good values lie between 0.03 and 3.
        from_logits: whether `y_pred` holds logits rather than probabilities.
        space: where the spread is measured, `"log_softmax"` or `"softmax"`. The second hardly restrains a confident
            model, whose non-true probabilities are all near 0.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: a number in [0, 1): the cross-entropy's labels become `(1 - s) y + s / C`. The restraint's
            weights `w` are made from the labels as given.
        ignore_class: the id of a class whose positions don't count, such as 255 or -1 in a segmentation map. A label
            distribution is ignored where it is what `keras.ops.one_hot` makes of that id: all zeros if no class.
        axis: the axis of the classes in `y_pred`.
        reduction: how Keras reduces the values: `"sum_over_batch_size"`, `"sum"`, `"mean"`,
            `"mean_with_sample_weight"`, `"none"` or None.
        name: the name of the loss.
        dtype: the dtype of the loss, by default Keras's `floatx`.

    Call arguments:
        y_true: class ids, shape `(...)` or `(..., 1)`; or a label distribution, shape `(..., C)`: one-hot, smoothed,
            mixed. The dots are `batch`, `batch, time`, `batch, height, width` and so on.
        y_pred: shape `(..., C)`, or with the classes at `axis`.
        sample_weight: optional weights of the samples or positions.

    Returns:
        A scalar, or with `reduction=None` one value a position.

    Raises:
        ValueError: at construction for an argument out of its range; when called or traced for shapes that cannot
            match, fewer than two classes, or (where values can be seen) class ids outside `[0, C)`. In a compiled
            program, where they can't, the loss and its gradient are NaN.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, activation="softmax")])
    >>> model.compile(optimizer="adam", loss=keras_drsl.DRSLoss(lam=0.3))
    >>> history = model.fit(np.ones((4, 8)), np.arange(4), verbose=0)

    A model saved with this loss is loaded after `import keras_drsl`, or with `compile=False`.

    Reference: Wang et al., "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363.
    """

    hyperparameters = ("lam", "space", "spread", "label_smoothing")

    def __init__(
        self,
        lam: float = 0.3,
        *,
        from_logits: bool = False,
        space: str = "log_softmax",
        spread: str = "sum_of_squares",
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "drs_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(
            from_logits=from_logits, ignore_class=ignore_class, axis=axis, reduction=reduction, name=name, dtype=dtype
        )
        self.lam = _arguments.check_non_negative("lam", lam)
        self.space = _arguments.check_choice("space", space, SPACES)
        self.spread = _arguments.check_choice("spread", spread, SPREADS)
        self.label_smoothing = check_smoothing(label_smoothing)

    def values(self, inputs: _inputs.Inputs) -> Any:
        """One value a position."""
        return _values(inputs, self.lam, self.space, self.spread, self.label_smoothing)


def _values(inputs: _inputs.Inputs, lam: float, space: str, spread: str, label_smoothing: float) -> Any:
    """In one pass where that helps; else the formula as it is written. `lam=0` is Keras's cross-entropy."""
    helps = one_pass.helps(inputs.scores.shape[-1])
    if lam > 0 and space == "log_softmax" and inputs.sparse and inputs.from_logits and helps:
        return one_pass.drs_loss(
            inputs.labels, inputs.scores, inputs.scale, lam=lam, spread=spread, label_smoothing=label_smoothing
        )
    values = cross_entropy(inputs, label_smoothing)
    if lam > 0:
        v = class_values(inputs.safe_scores, from_logits=inputs.from_logits, space=space)
        values = values + lam * spread_of(v, inputs.distribution, kind=spread)
    return values


def check_smoothing(value: Any) -> float:
    """`label_smoothing` as a float, or `ValueError`."""
    return _arguments.check_number("label_smoothing", value, "a number in [0, 1)", lambda number: 0 <= number < 1)
