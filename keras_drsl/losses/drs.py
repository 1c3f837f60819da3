"""Provide the distribution-restrained softmax loss."""

import warnings
from typing import Any

import keras

from keras_drsl._typing import Tensor
from keras_drsl._validation import check_choice, check_number
from keras_drsl.losses import fused
from keras_drsl.losses.base import ClassificationLoss, check_strength, cross_entropy, is_zero, set_mask, strength_of
from keras_drsl.predictions import LossInputs, read_inputs
from keras_drsl.spread import SPACES, SPREADS, class_values
from keras_drsl.spread import spread as spread_of


@keras.saving.register_keras_serializable(package="keras_drsl")
def drs_loss(
    y_true: Tensor,
    y_pred: Tensor,
    lam: float = 0.3,
    *,
    from_logits: bool = False,
    space: str = "log_softmax",
    spread: str = "sum_of_squares",
    label_smoothing: float = 0.0,
    ignore_class: int | None = None,
    axis: int = -1,
) -> Tensor:
    """Compute cross-entropy plus a penalty on the spread of the non-true softmax values, one value per sample.

    Use it where you need values that are not reduced, such as in a custom training step or to inspect single images.
    `DRSLoss` explains the formula. In `model.compile` use the class: under mixed precision Keras casts the arguments of
    a function, and their mask and the logits behind a softmax are lost.

    Args:
        y_true: Labels in any form that `DRSLoss` takes.
        y_pred: Probabilities, or logits with `from_logits=True`, shape `(..., C)`, or with the classes at `axis`.
        lam: The strength of the penalty, a number >= 0, or a `keras.Variable` of one.
        from_logits: Whether `y_pred` holds logits.
        space: `"log_softmax"` or `"softmax"`, as in `DRSLoss`.
        spread: `"sum_of_squares"` or `"variance"`, as in `DRSLoss`.
        label_smoothing: A number in [0, 1), as in `DRSLoss`.
        ignore_class: The id of a class whose positions are ignored, or None.
        axis: The axis of the classes in `y_pred`.

    Returns:
        One value per position, shape `y_pred.shape` without `axis`: float64 for float64 predictions, otherwise float32.
        The values of ignored positions are 0. The values then also have a Keras mask, so that Keras averages over the
        other positions.

    Raises:
        ValueError: As `DRSLoss`, at a call, also while it is traced.

    Example:

    >>> y_true = [0, 2]
    >>> y_pred = [[0.8, 0.1, 0.1], [0.1, 0.3, 0.6]]
    >>> [round(float(value), 4) for value in keras_drsl.drs_loss(y_true, y_pred)]
    [0.2231, 0.6919]

    The non-true probabilities of the first image are equal, so its loss is its cross-entropy, -log 0.8. For the second
    image, 0.3 times the spread of log 0.1 and log 0.3 is added to -log 0.6.

    Reference: Wang et al., "Distribution-restrained Softmax Loss for the Model Robustness", arXiv:2303.12363.
    """
    lam = check_strength("lam", lam)
    label_smoothing = check_smoothing(label_smoothing)
    check_choice("space", space, SPACES)
    check_choice("spread", spread, SPREADS)

    inputs = read_inputs(y_true, y_pred, from_logits=from_logits, ignore_class=ignore_class, axis=axis)
    values = _fused(inputs, lam, space, spread, label_smoothing)
    if values is None:
        values = inputs.mask_values(_formula(inputs, lam, space, spread, label_smoothing))
    return set_mask(values, inputs.valid)


@keras.saving.register_keras_serializable(package="keras_drsl")
class DRSLoss(ClassificationLoss):
    """Compute cross-entropy plus a penalty on the spread of the non-true softmax values.

    Use it in place of `SparseCategoricalCrossentropy` or `CategoricalCrossentropy`. It takes the labels of both, and
    makes a classifier harder to attack with small perturbations at no extra cost. It works best together with noise on
    the training inputs. It does not replace adversarial training.

    Shapes: labels `(...)`, `(..., 1)` or `(..., C)` and predictions `(..., C)` give values `(...)`. The dots stand for
    `batch`, `batch, time`, `batch, height, width` and so on; each index of them is a position, here called a sample.

    Formula: `loss = CE(y, p) + lam * r`, per sample, with

    - `p`: the softmax of the logits `z`, `C` classes; `y`: the label as a distribution over them, `sum(y) = 1`.
    - `CE(y, p) = -sum_k y_k log p_k`: the cross-entropy.
    - `w = 1 - y`: the weight of each class as a non-true class; for a class id, 0 for the true class, 1 for the others.
    - `v`: the values of the classes, `log p` with `space="log_softmax"` and `p` with `space="softmax"`.
    - `n = sum(w) = C - 1`; `m = sum(w * v) / n`: the mean of the non-true values.
    - `r = sum_k w_k (v_k - m)^2` with `spread="sum_of_squares"`, divided by `n` with `spread="variance"`.

    With the defaults, the gradient of `lam * r` with respect to a non-true logit is `2 lam (v_k - m)`, for any number
    of classes. With `spread="variance"` it is `C - 1` times smaller, so it vanishes for many classes.

    Note:

    - Equal non-true values give `r = 0` and no gradient. So do two classes with a one-hot label, as a
      warning says once.
    - `lam=0` is Keras's cross-entropy, in value and gradient.
    - In log space, a constant added to all logits does not change `r`.
    - On TensorFlow, the logits behind a softmax are found and used. Otherwise probabilities are clipped: by Keras's
      `epsilon` in the cross-entropy and at 1e-30 in `r`. Below these limits they have no gradient.
    - Positions under a Keras mask or of `ignore_class` are ignored; their values may be arbitrary. The mean is
      taken over the others.
    - Keras applies sample weights to the values afterwards. A position of weight 0 still needs a valid label and
      finite predictions. For labels of -1, as language models make them, use `ignore_class=-1`.
    - At positions that are not ignored, logits must be finite. A non-true logit of minus infinity, as in a masked
      vocabulary, makes the loss NaN or infinite. With `lam=0` or `space="softmax"` it has a finite value, and is taken.
    - Half-precision predictions are computed in float32. The gradient of a float16 softmax is up to `1 / p` and
      overflows where its logits cannot be found. On JAX and PyTorch, end a model of mixed precision in logits or in
      a float32 softmax.
    - Probabilities must sum to 1 within 0.01, which those of half precision do for up to 300,000 classes.
    - A compiled program keeps its `lam`. To change it during training, see `keras_drsl.losses.ClassificationLoss`.

    Args:
        lam: The strength of the penalty, a number >= 0, or a `keras.Variable` of one. Good values lie between 0.03
            and 3.
        from_logits: Whether `y_pred` holds logits rather than probabilities.
        space: Where the spread is measured, `"log_softmax"` or `"softmax"`. In `"softmax"` it has almost no effect on a
            confident model, whose non-true probabilities are all near 0.
        spread: `"sum_of_squares"` or `"variance"`.
        label_smoothing: A number `s` in [0, 1). The labels of the cross-entropy become `(1 - s) y + s / C`. The weights
            `w` still use the given labels.
        ignore_class: The id of a class whose positions are ignored, such as 255 or -1 in a segmentation map; or None. A
            label distribution is ignored where it equals `keras.ops.one_hot` of that id, which is all zeros for an id
            outside the classes.
        axis: The axis of the classes in `y_pred`.
        reduction: How Keras reduces the values: `"sum_over_batch_size"`, `"sum"`, `"mean"`,
            `"mean_with_sample_weight"`, `"none"` or None.
        name: The name of the loss.
        dtype: The dtype of the loss, by default Keras's `floatx`.

    Call arguments:
        y_true: Class ids, shape `(...)` or `(..., 1)`; or a label distribution, shape `(..., C)`, such as one-hot,
            smoothed or mixed labels.
        y_pred: Shape `(..., C)`, or with the classes at `axis`.
        sample_weight: Optional weights of the samples or positions.

    Returns:
        A scalar, or with `reduction=None` one value per position.

    Raises:
        ValueError: At construction for an argument out of its range, and at a call for labels and predictions that are
            none, as `keras_drsl.losses.ClassificationLoss`. In a compiled program, where values are not known, wrong
            values make the loss and its gradient NaN.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10, activation="softmax")])
    >>> model.compile(optimizer="adam", loss=keras_drsl.DRSLoss(lam=0.3))
    >>> history = model.fit(np.ones((4, 8)), np.arange(4), verbose=0)

    To load a model saved with this loss, first `import keras_drsl`, or use `compile=False`.

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
        self.lam = check_strength("lam", lam)
        self.space = check_choice("space", space, SPACES)
        self.spread = check_choice("spread", spread, SPREADS)
        self.label_smoothing = check_smoothing(label_smoothing)
        self._has_warned = False

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per position."""
        return _formula(inputs, self.lam, self.space, self.spread, self.label_smoothing)

    def _fused_values(self, inputs: LossInputs) -> Tensor | None:
        if type(self).values is not DRSLoss.values:  # another formula
            return None
        if inputs.scores.shape[-1] == 2 and not is_zero(self.lam) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "With two classes `DRSLoss` is cross-entropy: the only non-true class has no spread.",
                stacklevel=2,
            )
        return _fused(inputs, self.lam, self.space, self.spread, self.label_smoothing)


def _formula(inputs: LossInputs, lam: Any, space: str, spread: str, label_smoothing: float) -> Tensor:
    """Compute the loss as the formula is written, one value per position."""
    if is_zero(lam):
        return cross_entropy(inputs, label_smoothing)
    lam = strength_of(lam, inputs.scores.dtype)
    v = class_values(inputs.safe_scores, from_logits=inputs.from_logits, space=space)
    values = cross_entropy(inputs, label_smoothing, masked_classes=space == "softmax")
    return values + lam * spread_of(v, inputs.distribution, kind=spread)


def _fused(inputs: LossInputs, lam: Any, space: str, spread: str, label_smoothing: float) -> Tensor | None:
    """Compute the loss in one pass, 0 at ignored positions and NaN at wrong ones; None where there is no program."""
    if is_zero(lam) or not fused.should_fuse(inputs, space):
        return None
    # The program looks at label distributions itself.
    scale = inputs.scale if inputs.sparse else inputs._replace(in_range=inputs.lengths_match).scale
    return fused.fused_drs_loss(
        inputs.labels,
        inputs.scores,
        scale,
        lam=strength_of(lam, inputs.scores.dtype),
        spread=spread,
        label_smoothing=label_smoothing,
        masked=inputs.valid is not None,
    )


def check_smoothing(value: Any) -> float:
    """Return `label_smoothing` as a float, or raise `ValueError` unless it is a number in [0, 1)."""
    return check_number("label_smoothing", value, "a number in [0, 1)", lambda number: 0 <= number < 1)
