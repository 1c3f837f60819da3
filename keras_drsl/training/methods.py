"""The methods of adversarial training: which inputs they learn from, and what they add to the loss.

Symbols: x the clean inputs, x' the attacked ones, y the true classes, p and p' the softmax of the logits of x and x'.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from keras import ops

from keras_drsl._typing import Tensor
from keras_drsl._validation import check_non_negative
from keras_drsl.attacks.objectives import objective


class CleanBatch(NamedTuple):
    """Hold a batch before the attack: the second argument of the `loss_fn` of a `Method`.

    Attributes:
        x: The inputs, float32, shape `(batch, ...)`.
        y: The class ids, int32, shape `(batch,)`.
        labels: The labels as `fit` received them: class ids or one-hot.
        logits: The logits of `x`, the model as at inference, float32, shape `(batch, C)`. No gradient flows through
            them.
    """

    x: Tensor
    y: Tensor
    labels: Tensor
    logits: Tensor


class AttackedBatch(NamedTuple):
    """Hold a batch after the attack: the inputs of `AdversarialTraining.call` in a training step.

    Attributes:
        clean: The clean inputs, or the first random copy for a method with `random_copies`, float32, shape
            `(batch, ...)`.
        adversarial: The attacked inputs, or the second random copy, of the same shape.
        is_correct: 1.0 where the model classified the input correctly before the attack, else 0.0, shape `(batch,)`.
        loss_increase: The increase of the cross-entropy by the attack, 0 without one, shape `(batch,)`.
    """

    clean: Tensor
    adversarial: Tensor
    is_correct: Tensor
    loss_increase: Tensor


class Outputs(NamedTuple):
    """Hold the outputs of the model for an `AttackedBatch`, as `AdversarialTraining.call` returns them.

    Attributes:
        clean: The outputs for `AttackedBatch.clean`, shape `(batch, C)`; None if the method does not use them.
        adversarial: The outputs for `AttackedBatch.adversarial`, shape `(batch, C)`.
    """

    clean: Tensor | None
    adversarial: Tensor


Field: TypeAlias = Literal["clean", "adversarial"]
LossFn: TypeAlias = Callable[[Tensor, CleanBatch], Tensor]
Penalty: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def cross_entropy(logits: Tensor, batch: CleanBatch) -> Tensor:
    """Compute the cross-entropy of the true class, shape `(batch,)`.

    Args:
        logits: The logits at the current point of the attack, shape `(batch, C)`.
        batch: The clean batch.
    """
    return objective("ce", logits, batch.y, None, targeted=False)


def compiled_loss(logits: Tensor, batch: CleanBatch) -> Tensor:
    """Stand for the loss given to `compile`, which `AdversarialTraining` puts in its place.

    Args:
        logits: The logits at the current point of the attack, shape `(batch, C)`.
        batch: The clean batch.
    """
    raise NotImplementedError("Only `AdversarialTraining` knows the loss given to `compile`.")


def margin(logits: Tensor, batch: CleanBatch) -> Tensor:
    """Compute the largest non-true logit minus the true one, shape `(batch,)`.

    Args:
        logits: The logits at the current point of the attack, shape `(batch, C)`.
        batch: The clean batch.
    """
    return objective("margin", logits, batch.y, None, targeted=False)


def kl_divergence(logits: Tensor, batch: CleanBatch) -> Tensor:
    """Compute the Kullback-Leibler divergence from the clean prediction, `KL(p || p')`, shape `(batch,)`.

    Args:
        logits: The logits at the current point of the attack, shape `(batch, C)`.
        batch: The clean batch.
    """
    return _kl(ops.log_softmax(batch.logits), ops.log_softmax(logits))


def trades_penalty(log_p: Tensor, log_q: Tensor, y: Tensor, beta: float) -> Tensor:
    """Compute the penalty of TRADES, shape `(batch,)`.

    Formula: `beta * KL(p || p')`.

    Args:
        log_p: The log-probabilities of the clean inputs, shape `(batch, C)`.
        log_q: Those of the attacked inputs, `log p'`, shape `(batch, C)`.
        y: The class ids, shape `(batch,)`.
        beta: The weight, >= 0.
    """
    return beta * _kl(log_p, log_q)


def improved_kl_penalty(log_p: Tensor, log_q: Tensor, y: Tensor, beta: float) -> Tensor:
    """Compute the improved Kullback-Leibler divergence, shape `(batch,)`.

    Use it in TRADES: `METHODS["trades"].replace(penalty=improved_kl_penalty)`.

    Formula: `beta * (variance_w(log p - log p') / 2 - sum_k p_k log p'_k)`. The variance over the classes is weighted
    by w, the mean of p over those samples of the batch that have the same class. No gradient flows through w, nor
    through p in the sum. The authors average over the whole data set, with two weights in place of `beta`.

    Args:
        log_p: The log-probabilities of the clean inputs, shape `(batch, C)`.
        log_q: Those of the attacked inputs, `log p'`, shape `(batch, C)`.
        y: The class ids, shape `(batch,)`.
        beta: The weight, >= 0.

    Reference: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", arXiv:2305.13948.
    """
    p = ops.exp(ops.stop_gradient(log_p))
    is_same_class = ops.cast(y[:, None] == y[None, :], log_p.dtype)
    weights = ops.matmul(is_same_class, p) / ops.sum(is_same_class, axis=-1, keepdims=True)
    change = log_p - log_q
    centred = change - ops.sum(weights * change, axis=-1, keepdims=True)
    variance = ops.sum(weights * ops.square(centred), axis=-1)
    return beta * (variance / 2 - ops.sum(p * log_q, axis=-1))


def mart_penalty(log_p: Tensor, log_q: Tensor, y: Tensor, beta: float) -> Tensor:
    """Compute the penalty of MART, shape `(batch,)`.

    Formula: `beta * KL(p || p') * (1 - p_y) - log(1.0001 - max_{k != y} p'_k)`.

    Args:
        log_p: The log-probabilities of the clean inputs, shape `(batch, C)`.
        log_q: Those of the attacked inputs, `log p'`, shape `(batch, C)`.
        y: The class ids, shape `(batch,)`.
        beta: The weight of the first term, >= 0.
    """
    is_true = ops.one_hot(y, log_p.shape[-1], dtype="bool")
    true = ops.sum(ops.where(is_true, ops.exp(log_p), 0.0), axis=-1)
    largest_other = ops.max(ops.where(is_true, 0.0, ops.exp(log_q)), axis=-1)
    # 1.0001 as in the authors' code: the logarithm stays finite where `largest_other` is 1.
    return beta * _kl(log_p, log_q) * (1 - true) - ops.log(1.0001 - largest_other)


def consistency_penalty(log_p: Tensor, log_q: Tensor, y: Tensor, beta: float) -> Tensor:
    """Compute the penalty of the method `"consistency"`, shape `(batch,)`.

    Formula: `beta * (d - d')^2`, with `d = log p_y - mean_{k != y} log p_k`, and `d'` computed from `log p'` likewise.

    Args:
        log_p: The log-probabilities of the first copy, shape `(batch, C)`.
        log_q: Those of the second copy, `log p'`, shape `(batch, C)`.
        y: The class ids, shape `(batch,)`.
        beta: The weight, >= 0.
    """
    is_true = ops.one_hot(y, log_p.shape[-1], dtype=log_p.dtype)
    # The weights sum to 0, so d is the same for logits and log-probabilities.
    weights = is_true - (1 - is_true) / (log_p.shape[-1] - 1)
    return beta * ops.square(ops.sum(weights * (log_p - log_q), axis=-1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


@dataclasses.dataclass(frozen=True)
class Method:
    """Describe a method of adversarial training.

    Use it to write a training method of your own, and pass it to `AdversarialTraining` as `method=`. `METHODS` holds
    the methods with a name. `METHODS["trades"].replace(beta=3.0)` is one of them with a change.

    Formula: `L + penalty(log p, log p', y, beta)`, averaged over the batch. L is the loss given to `compile`, averaged
    over the outputs that `learns_from` names. log p and log p' are the log-probabilities of the clean and of the
    attacked inputs, y are the class ids.

    Note:

    - `loss_fn` and `penalty` run in a compiled program: write them with `keras.ops`.
    - `loss_fn` receives the logits at the current point, float32, shape `(batch, C)`, and a `CleanBatch`. It returns
      one value per sample, shape `(batch,)`. The attack increases it.
    - `penalty` receives the log-probabilities of the clean inputs and of the attacked inputs, both float32 and of shape
      `(batch, C)`, the class ids, int32, shape `(batch,)`, and `beta`. It returns one value per sample, shape
      `(batch,)`. Sample weights apply to it.

    Args:
        learns_from: The inputs that L is computed on, a tuple of `"clean"`, `"adversarial"` or both.
        loss_fn: The function that the attack increases. None for no attack: the attacked inputs then equal the clean
            ones.
        start_near_input: Whether the attack starts close to the input: it adds normal noise of standard deviation
            `0.001 * (clip_max - clip_min)`, whatever `eps` is. Otherwise it starts at a random point of the ball.
        single_step: Whether the attack takes a single step. By default its size is `1.25 * eps`; `eps` without
            clipping, and `0.1 * eps` for a slope.
        start_radius: The radius of the ball that the attack starts in, in units of `eps`, >= 0; 0 for the input itself.
        clips: Whether the attack stays in the ball and in the valid range.
        slope: Whether the clean input is replaced by the start of the attack, and L by the bound that follows from its
            slope along the attack: `L(y, z) + eps / step_size * (L(y, z') - L(y, z))`. During a warm-up, only `eps`
            there is smaller. It needs `single_step`, no clipping, and `learns_from=("clean", "adversarial")`. The
            logits of the `CleanBatch` are then those at the start.
        penalty: The function that is added to the loss, or None.
        random_copies: Whether two random points of the ball replace the clean and the attacked input. They are drawn
            uniformly and are not clipped to the valid range.
        beta: The default of the argument `beta` of `AdversarialTraining`, >= 0.

    Raises:
        ValueError: If `learns_from` is empty or names other inputs, `start_radius` is negative, or the other fields do
            not fit a slope.

    Example:

    Learn from clean and attacked inputs, attack the margin, and penalize the distance of the two predictions:

    >>> from keras import ops
    >>> from keras_drsl.training import Method, margin
    >>> def squared_distance(log_p, log_q, y, beta):
    ...     return beta * ops.sum(ops.square(ops.exp(log_p) - ops.exp(log_q)), axis=-1)
    >>> method = Method(learns_from=("clean", "adversarial"), loss_fn=margin, penalty=squared_distance, beta=0.5)
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> robust = keras_drsl.AdversarialTraining(model, eps=0.1, method=method, steps=3)
    >>> robust.compile(optimizer="sgd", loss=keras_drsl.DRSLoss())
    >>> history = robust.fit(np.random.rand(32, 8), np.arange(32) % 3, verbose=0)
    >>> sorted(history.history)
    ['attack_strength', 'clean_accuracy', 'loss']
    """

    learns_from: tuple[Field, ...] = ("adversarial",)
    loss_fn: LossFn | None = cross_entropy
    start_near_input: bool = False
    single_step: bool = False
    start_radius: float = 1.0
    clips: bool = True
    slope: bool = False
    penalty: Penalty | None = None
    random_copies: bool = False
    beta: float = 6.0

    def __post_init__(self) -> None:
        if not self.learns_from or not set(self.learns_from) <= set(Outputs._fields):
            raise ValueError(
                "`learns_from` must be a tuple of 'clean', 'adversarial' or both. "
                f"Received: learns_from={self.learns_from!r}"
            )
        check_non_negative("start_radius", self.start_radius)
        takes_one_step = self.loss_fn is not None and self.single_step and not self.clips
        if self.slope and not (takes_one_step and set(self.learns_from) == set(Outputs._fields)):
            raise ValueError(
                "`slope` must be False unless the attack takes a single step without clipping, and the method learns "
                f"from 'clean' and 'adversarial'. Received: {self!r}"
            )

    def step_share(self, steps: int) -> float:
        """Return the default size of a step, in units of `eps`.

        Args:
            steps: The number of steps.
        """
        if self.slope:
            return 0.1
        if self.single_step:
            return 1.25 if self.clips else 1.0
        return min(2.5 / steps, 1.0)

    def replace(self, **changes: Any) -> "Method":
        """Return a method with some fields changed.

        Args:
            **changes: The new values by name.
        """
        return dataclasses.replace(self, **changes)


# The losses that the attack of "pgd", "fgsm", "nfgsm" and "mart" can increase.
ATTACK_LOSSES: dict[str, LossFn] = {"cross_entropy": cross_entropy, "margin": margin, "loss": compiled_loss}
METHODS: dict[str, Method] = {
    "clean": Method(loss_fn=None),
    "fgsm": Method(single_step=True),
    "nfgsm": Method(single_step=True, start_radius=2.0, clips=False),
    "flat": Method(
        learns_from=("clean", "adversarial"),
        loss_fn=compiled_loss,
        single_step=True,
        start_radius=0.0,
        clips=False,
        slope=True,
    ),
    "pgd": Method(),
    "trades": Method(learns_from=("clean",), loss_fn=kl_divergence, start_near_input=True, penalty=trades_penalty),
    "mart": Method(penalty=mart_penalty),
    "consistency": Method(
        learns_from=("clean", "adversarial"),
        loss_fn=None,
        penalty=consistency_penalty,
        random_copies=True,
        beta=0.3,
    ),
}
