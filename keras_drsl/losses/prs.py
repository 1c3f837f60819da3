"""The partially recentralized softmax loss."""

import math
from typing import Any

import keras
from keras import ops

from keras_drsl import _arguments, _inputs
from keras_drsl.losses.base import ClassificationLoss, check_logits, cross_entropy, finish


@keras.saving.register_keras_serializable(package="keras_drsl")
def prs_loss(
    y_true: Any,
    y_pred: Any,
    lam: float = 1e-4,
    *,
    start: int = 0,
    end: int = 4,
    sample_weight: Any = None,
    from_logits: bool = False,
    ignore_class: int | None = None,
    axis: int = -1,
) -> Any:
    """Cross-entropy plus a restraint that evens out the largest non-true logits between tokens, one value a token.

    The function behind `PRSLoss`, which explains the formula and the arguments.

    Args:
        y_true: labels in any form `DRSLoss` takes.
        y_pred: logits with `from_logits=True`, or a softmax whose logits can be found, shape `(..., C)` (the classes
            along `axis`).
        lam: as in `PRSLoss`, like all that follow.
        start: the first of the sorted non-true logits that counts.
        end: the first that doesn't any more.
        sample_weight: how much each token counts in the restraint, numbers >= 0 of shape `(...)`, `(..., 1)` or with 1
            in place of a length; it does not weigh the values that are returned.
        from_logits: whether `y_pred` holds logits.
        ignore_class: a class id, or None.
        axis: the axis of the classes in `y_pred`.

    Returns:
        The loss of each token, shape `y_pred.shape` without `axis`; 0 for those ruled out by `ignore_class` or a mask.

    Raises:
        ValueError: as `PRSLoss`.

    Example:

    >>> y_pred = [[3.0, 1.0, 1.0], [3.0, 1.0, 1.0]]
    >>> [round(float(value), 4) for value in keras_drsl.prs_loss([0, 0], y_pred, lam=0.1, end=2, from_logits=True)]
    [0.3782, 0.3782]

    The rivals of both tokens have the same mean, so each pays `0.1 * 2 * log 2` on top of its cross-entropy, 0.2395.

    Reference: arXiv:2402.03627.
    """
    lam = _arguments.check_non_negative("lam", lam)
    start, end = _check_range(start, end)
    inputs = _inputs.read(y_true, y_pred, from_logits=from_logits, ignore_class=ignore_class, axis=axis)
    check_logits("PRSLoss", inputs)
    if sample_weight is not None:
        sample_weight = _one_a_token(sample_weight, ops.convert_to_tensor(y_pred), axis, inputs.scores.dtype)
    return finish(_values(inputs, lam, start, end, sample_weight), inputs, ignore_class)


@keras.saving.register_keras_serializable(package="keras_drsl")
class PRSLoss(ClassificationLoss):
    """Partially recentralized softmax loss: cross-entropy that evens out the largest non-true logits between tokens.

    Made for models of sequences, `(batch, time, vocabulary)`. Where `keras_drsl.DRSLoss` keeps the rivals of one token
    alike, this keeps the level of the strongest rivals alike from token to token. It is the one loss here in which the
    value of a token depends on the others of its batch.

    Formula: `loss_i = CE_i - lam * N * log_softmax(a)_i`, for each token `i`, with

    - `a_i`: the mean of places `start` to `end - 1` of the non-true logits, sorted from the largest down.
    - `log_softmax(a)_i = a_i - log(sum_j s_j exp a_j)`, over all tokens `j` of the batch that count; `s`: their sample
      weights, 1 if there are none.
    - `N`: what Keras will divide by, the number of tokens that are not masked, so that the default reduction gives
      `sum_i s_i CE_i / N - lam * sum_i s_i log_softmax(a)_i`, the authors' sum. With
      `reduction="mean_with_sample_weight"`, which divides by the sum of `s`, `N` is that sum.

    The vocabulary is not sorted: its `end` largest are found.

    Edges: tokens under a Keras mask or of `ignore_class` are as if they were not there; if none is left, the loss is
    0. The restraint is at least `lam * N * log N`, which it is where all `a_i` are equal, so the loss itself grows
    with the tokens of a batch, and its exponential is no perplexity: log a cross-entropy as a metric beside it. A token
    of weight 0 takes no part in the restraint, one of weight 2 takes part as two would. With label distributions, the
    true class is the likeliest. A constant added to the logits of one token changes the loss, so probabilities whose
    logits cannot be found are an error. `lam=0` is Keras's cross-entropy. Sample weights are 0 or more and need as many
    axes as there are of tokens, `(batch, 1)` for one a sequence.

    What depends on the batch: the restraint is over the tokens that are computed together. Twice the batch is not twice
    the same loss; each replica of `tf.distribute` evens out its own tokens, and the loss is the mean over replicas, as
    with batch normalization. Under `keras.distribution` on JAX it spans all devices. Keras shows sample and class
    weights to a loss object only: where `prs_loss` is given to `compile`, the restraint does not know them.

    Args:
        lam: the strength of the restraint, a number >= 0; the authors' lie between 1e-6 and 1e-3, for sums over
            the tokens of their batches.
        start: the first place that counts, an integer >= 0.
        end: the first that doesn't any more, an integer above `start` and at most `C - 1`; the authors' lie between 4
            and 20.
        **options: those of `keras_drsl.losses.ClassificationLoss`: `from_logits`, `ignore_class`, `axis`, `reduction`,
            `name`, `dtype`. Labels, calls and errors are as explained there.

    Raises:
        ValueError: as `keras_drsl.losses.ClassificationLoss`, and for more places than there are rivals.

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
        self.lam = _arguments.check_non_negative("lam", lam)
        self.start, self.end = _check_range(start, end)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The reduced loss; the arguments are explained in the class docstring."""
        if sample_weight is not None:
            sample_weight = _one_a_token(sample_weight, y_pred, self.axis, self.dtype)
            # Keras shows `call` what it is given for `y_true`, and not the weights, which it changes in place on torch.
            y_true = {"y_true": ops.convert_to_tensor(y_true), "sample_weight": ops.copy(sample_weight)}
        return super().__call__(y_true, y_pred, sample_weight)

    def _values_of(self, inputs: _inputs.Inputs, given: dict[str, Any]) -> Any:
        by_weight = self.reduction == "mean_with_sample_weight"
        weights = given.get("sample_weight")
        return _values(inputs, self.lam, self.start, self.end, weights, count_weights=by_weight)


def _values(
    inputs: _inputs.Inputs, lam: float, start: int, end: int, weights: Any, *, count_weights: bool = False
) -> Any:
    classes = inputs.scores.shape[-1]
    if end > classes - 1:
        raise ValueError(f"`end` must be at most the number of rivals, {classes - 1}. Received: end={end}")
    values = cross_entropy(inputs)
    if lam == 0:
        return values
    z = inputs.safe_scores
    labels = inputs.labels if inputs.sparse else ops.argmax(inputs.labels, axis=-1)
    is_true = ops.equal(ops.arange(classes, dtype="int32"), ops.expand_dims(ops.cast(labels, "int32"), -1))
    largest = ops.top_k(ops.where(is_true, -math.inf, z), end)[0]
    a = ops.mean(largest[..., start:], axis=-1)

    counts = ops.ones_like(a) if inputs.valid is None else ops.cast(inputs.valid, a.dtype)
    weights = counts if weights is None else counts * ops.cast(weights, a.dtype)
    top = ops.stop_gradient(ops.max(ops.where(weights > 0, a, -math.inf)))
    top = ops.where(ops.isfinite(top), top, 0.0)
    total = ops.sum(weights * ops.exp(ops.where(weights > 0, a - top, 0.0)))
    log_softmax = a - top - ops.log(ops.where(total > 0, total, 1.0))
    number = ops.sum(weights if count_weights else counts)
    return values - lam * number * log_softmax


def _one_a_token(weights: Any, y_pred: Any, axis: int, dtype: Any) -> Any:
    """Sample weights, one a token. Keras would apply them to the values as they are, and divide by their own sum."""
    zeros = ops.cast(ops.zeros_like(ops.take(ops.convert_to_tensor(y_pred), 0, axis=axis)), dtype)
    weights = ops.cast(ops.convert_to_tensor(weights), dtype)
    given, positions = tuple(weights.shape), tuple(zeros.shape)
    if len(given) == len(positions) + 1 and given[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    # A length of 1 is shared, and so matches any.
    if not _inputs.can_match(tuple(None if one == 1 else one for one in weights.shape), positions):
        raise ValueError(
            "`sample_weight` must hold a weight for each token, or 1 in place of a length that shares one; so must "
            f"what Keras makes of `class_weight`. Received: sample_weight.shape={given}, tokens of shape {positions}"
        )
    return weights + zeros


def _check_range(start: Any, end: Any) -> tuple[int, int]:
    start = _arguments.check_integer("start", start, at_least=0)
    end = _arguments.check_integer("end", end)
    if start >= end:
        raise ValueError(f"`end` must be above `start`. Received: start={start}, end={end}")
    return start, end
