"""Provide the partially recentralized softmax loss."""

from typing import Any

import keras
from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl._validation import check_integer
from keras_drsl.losses.base import (
    ClassificationLoss,
    check_logits,
    check_strength,
    cross_entropy,
    is_zero,
    mask_ignored,
    strength_of,
)
from keras_drsl.predictions import LossInputs, is_true_class, match_weights, read_inputs
from keras_drsl.spread import smallest_number


@keras.saving.register_keras_serializable(package="keras_drsl")
def prs_loss(
    y_true: Tensor,
    y_pred: Tensor,
    lam: float = 1e-4,
    *,
    start: int = 0,
    end: int = 4,
    sample_weight: Tensor | None = None,
    from_logits: bool = False,
    ignore_class: int | None = None,
    axis: int = -1,
) -> Tensor:
    """Compute cross-entropy plus a penalty on the largest non-true logits that differ between tokens.

    Use it where you need values that are not reduced, such as in a custom training step. `PRSLoss` explains the formula
    and the arguments. There is one value per token.

    Args:
        y_true: Labels in any form that `DRSLoss` takes.
        y_pred: Logits with `from_logits=True`, or a softmax whose logits can be found, shape `(..., C)`, or with the
            classes at `axis`.
        lam: The strength of the penalty, a number >= 0.
        start: The first rank of the sorted non-true logits that is used, an integer >= 0.
        end: The rank after the last one that is used, an integer above `start` and at most `C - 1`.
        sample_weight: The weight of each token in the penalty, numbers >= 0 of shape `(...)`, `(..., 1)`, or with 1 in
            place of a length. The returned values are not multiplied by it.
        from_logits: Whether `y_pred` holds logits.
        ignore_class: The id of a class whose tokens are ignored, or None.
        axis: The axis of the classes in `y_pred`.

    Returns:
        One value per token, shape `y_pred.shape` without `axis`; 0 for tokens ignored by `ignore_class` or a mask.

    Raises:
        ValueError: As `PRSLoss`.

    Example:

    >>> y_pred = [[3.0, 1.0, 1.0], [3.0, 1.0, 1.0]]
    >>> [round(float(value), 4) for value in keras_drsl.prs_loss([0, 0], y_pred, lam=0.1, end=2, from_logits=True)]
    [0.3782, 0.3782]

    The non-true logits of both tokens have the same mean, so the penalty of each is `0.1 * 2 * log 2`. It is added to
    the cross-entropy, 0.2395.

    Reference: Wang et al., "Partially Recentralization Softmax Loss for Vision-Language Models Robustness",
    arXiv:2402.03627.
    """
    lam = check_strength("lam", lam)
    start, end = _check_ranks(start, end)
    inputs = read_inputs(y_true, y_pred, from_logits=from_logits, ignore_class=ignore_class, axis=axis)
    check_logits("PRSLoss", inputs)
    if sample_weight is not None:
        sample_weight = _weight_per_token(sample_weight, inputs)
    return mask_ignored(_loss_per_token(inputs, lam, start, end, sample_weight), inputs)


@keras.saving.register_keras_serializable(package="keras_drsl")
class PRSLoss(ClassificationLoss):
    """Compute cross-entropy plus a penalty on the largest non-true logits that differ between tokens.

    Use it for models of sequences, with predictions `(batch, time, vocabulary)`. `keras_drsl.DRSLoss` makes the
    non-true logits of one token alike. This loss makes the mean of the largest non-true logits alike for all tokens of
    a batch.

    Shapes: as `keras_drsl.losses.ClassificationLoss`; a position is a token.

    Formula: `loss_i = CE_i - lam * N * log_softmax(a)_i`, per token `i`, with

    - `CE_i`: the cross-entropy.
    - `a_i`: the mean of ranks `start` to `end - 1` of the non-true logits, sorted from the largest down.
    - `log_softmax(a)_i = a_i - log(sum_j s_j exp a_j)`: a sum over all tokens `j` of the batch that are not ignored;
      `s`: their sample weights, 1 by default.
    - `N`: the number that Keras divides by: the number of tokens that are not masked. The default reduction then gives
      the authors' sum, `sum_i s_i CE_i / N - lam * sum_i s_i log_softmax(a)_i`. For
      `reduction="mean_with_sample_weight"`, which divides by the sum of `s`, `N` is that sum.

    Only the `end` largest logits are found; the vocabulary is not sorted.

    Note:

    - The value of a token depends on the other tokens of its batch. The loss of two batches is not the loss of both
      together. Each replica of `tf.distribute` has a penalty over its own tokens, and the loss is the mean over
      replicas, as with batch normalization. Under `keras.distribution` on JAX the penalty is over all devices.
    - Tokens under a Keras mask or of `ignore_class` have no influence. If no token is left, the loss is 0.
    - The mean of the penalty is at least `lam * N * log N`, its value where all `a_i` are equal. So the loss grows
      with the number of tokens, and its exponential is not a perplexity. Use a cross-entropy metric beside it.
    - A token of weight 0 is not in the penalty, and one of weight 2 counts as two tokens. Weights are >= 0 and have
      as many axes as there are of tokens; `(batch, 1)` is one weight per sequence.
    - Keras passes sample and class weights to loss objects only. If you give the function `prs_loss` to `compile`,
      the penalty does not use them.
    - For a label distribution, the true class is the most likely one.
    - A constant added to the logits of one token changes the loss, so probabilities whose logits cannot be found
      are an error.
    - `lam=0` is Keras's cross-entropy.

    Args:
        lam: The strength of the penalty, a number >= 0. The authors use 1e-6 to 1e-3, for sums over the tokens of their
            batches.
        start: The first rank that is used, an integer >= 0.
        end: The rank after the last one that is used, an integer above `start` and at most `C - 1`. The authors use 4
            to 20.
        **options: `from_logits`, `ignore_class`, `axis`, `reduction`, `name` and `dtype`, as in
            `keras_drsl.losses.ClassificationLoss`.

    Returns:
        As `keras_drsl.losses.ClassificationLoss`.

    Raises:
        ValueError: As `keras_drsl.losses.ClassificationLoss`, for an `end` above `C - 1`, and for weights of another
            shape.

    Example:

    >>> model = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(100, 8), keras.layers.Dense(100)])
    >>> model.compile(optimizer="adam", loss=keras_drsl.PRSLoss(from_logits=True))
    >>> history = model.fit(np.ones((4, 5)), np.ones((4, 5)), verbose=0)

    Reference: Wang et al., "Partially Recentralization Softmax Loss for Vision-Language Models Robustness",
    arXiv:2402.03627, as their code computes it.
    """

    hyperparameters = ("lam", "start", "end")
    needs_logits = True

    def __init__(self, lam: float = 1e-4, *, start: int = 0, end: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.lam = check_strength("lam", lam)
        self.start, self.end = _check_ranks(start, end)

    def values(self, inputs: LossInputs) -> Tensor:
        """Compute one value per token, without sample weights."""
        return _loss_per_token(inputs, self.lam, self.start, self.end, None)

    def _weighted_values(self, inputs: LossInputs, sample_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if sample_weight is None:
            return super()._weighted_values(inputs, None)
        weights = _weight_per_token(sample_weight, inputs)
        by_weight = self.reduction == "mean_with_sample_weight"
        values = _loss_per_token(inputs, self.lam, self.start, self.end, weights, count_weights=by_weight)
        return inputs.mask_values(values), weights


def _loss_per_token(
    inputs: LossInputs, lam: Any, start: int, end: int, weights: Tensor | None, *, count_weights: bool = False
) -> Tensor:
    """Compute the formula; `count_weights` makes `N` the sum of the weights."""
    classes = inputs.scores.shape[-1]
    if end > classes - 1:
        raise ValueError(f"`end` must be at most the number of non-true classes, {classes - 1}. Received: end={end}")
    values = cross_entropy(inputs)
    if is_zero(lam):
        return values
    a = _mean_of_largest(inputs, start, end)
    return values + strength_of(lam, a.dtype) * recentralization(a, inputs.valid, weights, count_weights=count_weights)


def recentralization(a: Tensor, valid: Tensor | None, weights: Tensor | None, *, count_weights: bool) -> Tensor:
    """Return the penalty of each token, `-N log_softmax(a)`.

    Args:
        a: The mean of the largest non-true logits of each token, shape `(...)`.
        valid: Bool, shape `(...)`, False for tokens that are ignored; None if none are.
        weights: The sample weights of the tokens, shape `(...)`, or None.
        count_weights: Whether `N` is the sum of the weights.
    """
    counts = ops.ones_like(a) if valid is None else ops.cast(valid, a.dtype)
    weights = counts if weights is None else counts * ops.cast(weights, a.dtype)
    lowest = smallest_number(a)
    # One more number, as there may be no tokens.
    counted = ops.append(ops.where(weights > 0, a, lowest), ops.full((1,), lowest, dtype=a.dtype))
    top = ops.stop_gradient(ops.max(counted))
    top = ops.where(top > lowest, top, 0.0)
    total = ops.sum(weights * ops.exp(ops.where(weights > 0, a - top, 0.0)))
    log_softmax = a - top - ops.log(ops.where(total > 0, total, 1.0))
    number = ops.sum(weights if count_weights else counts)
    return -number * log_softmax


def _mean_of_largest(inputs: LossInputs, start: int, end: int) -> Tensor:
    """Return `a`, the mean of some of the largest non-true logits of each token."""
    z = inputs.safe_scores
    labels = inputs.labels if inputs.sparse else ops.argmax(inputs.labels, axis=-1)
    is_true = is_true_class(ops.cast(labels, "int32"), z.shape[-1])
    lowest = smallest_number(z)
    largest = ops.top_k(ops.where(is_true, lowest, z), end)[0][..., start:]
    # The true class is among the largest only where too many others are minus infinity, and so is their mean.
    return ops.mean(ops.where(largest > lowest, largest, 2.0 * largest), axis=-1)


def _weight_per_token(weights: Tensor, inputs: LossInputs) -> Tensor:
    """Return one sample weight per token. Keras would not broadcast weights before it divides by their sum."""
    weights, zeros = match_weights(weights, ops.zeros_like(inputs.scores[..., 0]))
    return weights + zeros


def _check_ranks(start: Any, end: Any) -> tuple[int, int]:
    """Return `start` and `end` as integers, or raise `ValueError` unless `0 <= start < end`."""
    start = check_integer("start", start, at_least=0)
    end = check_integer("end", end)
    if start >= end:
        raise ValueError(f"`end` must be above `start`. Received: start={start}, end={end}")
    return start, end
