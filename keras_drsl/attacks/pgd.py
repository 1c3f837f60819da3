"""Projected gradient descent, with its one-step form and momentum."""

import numpy as np
from keras import ops

from keras_drsl import _arguments
from keras_drsl.attacks import balls
from keras_drsl.attacks.attack import Batch, search, where_rows
from keras_drsl.attacks.classifier import Classifier
from keras_drsl.attacks.gradient import GradientAttack, ascent, rival


class PGD(GradientAttack):
    """Many gradient steps, each projected back into the ball around the input, from random starts.

    Use it for a quick look, with `loss="margin"`; for a number to publish use `APGD`, which needs no step size.

    Formula: `v <- momentum * v + g / mean|g|`, `x <- project(x + step_size * d(v))`, with g the gradient of the
    attack's loss at x and d(v) its sign (L-inf) or direction (L2); without momentum `v = g`. Of all iterates the first
    misclassified one is kept, or else the one of the largest loss.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`, see `keras_drsl.attacks.objectives`. With fewer than four classes `"dlr"`
            is the margin.
        targeted: aim at each rival class in turn, the likeliest first, rather than away from the true class.
        targets: how many rivals to aim at; all if there are no more.
        steps: how many steps, >= 1.
        step_size: the size of one, > 0; by default `2.5 * eps / steps`, at most `eps`.
        momentum: how much of its direction a step keeps, in [0, 1].
        restarts: how many random starts (for each rival), >= 1.
        random_start: start anywhere in the ball, rather than at the input.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of the starts, >= 0.

    Raises:
        ValueError: for arguments out of their range.

    Example:

    >>> from keras_drsl.attacks import PGD
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = PGD(eps=0.1, loss="margin", steps=5)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083;
    momentum: Dong et al., "Boosting Adversarial Attacks with Momentum", arXiv:1710.06081.
    """

    _family = "pgd"

    def __init__(
        self,
        eps: float,
        *,
        loss: str = "ce",
        targeted: bool = False,
        targets: int = 9,
        steps: int = 40,
        step_size: float | None = None,
        momentum: float = 0.0,
        restarts: int = 1,
        random_start: bool = True,
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        seed: int = 0,
    ) -> None:
        threat = {"norm": norm, "clip_min": clip_min, "clip_max": clip_max, "seed": seed}
        super().__init__(eps, loss=loss, targeted=targeted, targets=targets, steps=steps, restarts=restarts, **threat)
        self.step_size = _arguments.check_positive(
            "step_size", min(2.5 * self.eps / self.steps, self.eps) if step_size is None else step_size
        )
        self.momentum = _arguments.check_number(
            "momentum", momentum, "a number in [0, 1]", lambda number: 0 <= number <= 1
        )
        self.random_start = bool(random_start)

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        start = batch.x
        if self.random_start:
            start = start + balls.random_points(batch.generators(self), start.shape[1:], self.eps, self.norm)
        rows = {
            "x": batch.x,
            "y": batch.y,
            "target": rival(batch, self.restarts),
            "x_adv": start.astype("float32"),
            "velocity": np.zeros_like(batch.x),
            "best": batch.x,
            "best_loss": np.full(len(batch.x), -np.inf, "float32"),
            "broken": np.zeros(len(batch.x), bool),
        }
        stepper = classifier.stepper(pgd_step, loss=self.loss, targeted=self.targeted, norm=self.norm)
        knobs = {"step_size": np.float32(self.step_size), "momentum": np.float32(self.momentum)}
        # Without a gradient yet, the first step only looks at the start.
        return search(
            stepper, batch, rows, self.steps + 1, lambda step, alive: (self._ball(), knobs), persist=self._persist
        )


class FGSM(PGD):
    """One step of size `eps` along the gradient's sign (L-inf) or direction (L2).

    Use it for a first look only: whatever withstands it may still fall to any attack of more than one step.

    Formula: `x + eps * d(g)`, clipped to `[clip_min, clip_max]`, with g and d as in `PGD`.

    Args:
        eps: the size of the perturbation, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`, as in `PGD`.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.

    Raises:
        ValueError: for arguments out of their range.

    Example:

    >>> from keras_drsl.attacks import FGSM
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = FGSM(eps=0.1)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572.
    """

    _family = "fgsm"

    def __init__(
        self,
        eps: float,
        *,
        loss: str = "ce",
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
    ) -> None:
        super().__init__(eps, loss=loss, steps=1, random_start=False, norm=norm, clip_min=clip_min, clip_max=clip_max)


def pgd_step(
    classifier: Classifier, rows: dict, ball: dict, knobs: dict, *, loss: str, targeted: bool, norm: str | int
) -> dict:
    """One step, and what is found where it leads."""
    step = knobs["step_size"] * balls.direction(rows["velocity"], norm)
    x_adv = balls.project(rows["x_adv"] + step, rows["x"], ball, norm)
    values, gradient, wrong = ascent(classifier, x_adv, rows, loss=loss, targeted=targeted)
    axes = tuple(range(1, len(x_adv.shape)))
    scale = ops.maximum(ops.mean(ops.abs(gradient), axis=axes, keepdims=True), 1e-30)
    better = ops.logical_and(ops.logical_not(rows["broken"]), ops.logical_or(wrong, values > rows["best_loss"]))
    return rows | {
        "x_adv": x_adv,
        "velocity": knobs["momentum"] * rows["velocity"] + gradient / scale,
        "best": where_rows(better, x_adv, rows["best"]),
        "best_loss": ops.where(better, values, rows["best_loss"]),
        "broken": ops.logical_or(rows["broken"], wrong),
    }
