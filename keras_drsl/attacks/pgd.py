"""Projected gradient descent, with its one-step form and momentum."""

from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _validation
from keras_drsl._typing import Array, Norm, Numbers, Tensor
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.gradients import GradientAttack, loss_and_gradient
from keras_drsl.attacks.loop import is_better, run_steps, where_rows
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import Bounds, ThreatModel, project, steepest_ascent


class PGD(GradientAttack):
    """Take many gradient steps, each projected into the ball around the input, from random starts.

    Use it for a quick look, with `loss="margin"`. For a number to publish use `APGD`, which needs no step size.

    Formula: `v <- momentum * v + g / mean|g|`, `x <- project(x + step_size * d(v))`, with

    - `g`: the gradient of the attack's loss at `x`;
    - `d(v)`: the sign of `v` (L-inf), `v` at length 1 (L2), or the sign on the largest twentieth of `v` over their
      number (L1);
    - `v = g` without momentum.

    The first misclassified iterate is returned, or else the iterate of the largest loss.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`; see `keras_drsl.attacks.objectives`. With fewer than four classes, `"dlr"`
            is the margin.
        targeted: Whether to aim at each non-true class in turn, beginning with the one of the largest logit. If False,
            the attack moves away from the true class.
        targets: How many target classes, >= 1; all non-true classes if there are fewer.
        steps: How many steps, >= 1.
        step_size: The size of a step, > 0; by default `2.5 * eps / steps`, at most `eps`.
        momentum: The share of its direction that a step keeps, in [0, 1].
        restarts: How many random starts (per target), >= 1.
        random_start: Whether to start anywhere in the ball. Otherwise the start is the input.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x = np.full((4, 8), 0.5)
    >>> x_adv = keras_drsl.attacks.PGD(eps=0.1, loss="margin", steps=5)(model, x, y=np.arange(4))
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083.
    Momentum: Dong et al., "Boosting Adversarial Attacks with Momentum", arXiv:1710.06081.
    """

    _family = "pgd"

    def __init__(
        self,
        eps: Numbers | None = None,
        *,
        loss: str = "ce",
        targeted: bool = False,
        targets: int = 9,
        steps: int = 40,
        step_size: float | None = None,
        momentum: float = 0.0,
        restarts: int = 1,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(eps, loss=loss, targeted=targeted, targets=targets, steps=steps, restarts=restarts, **options)
        self.step_size = _validation.check_positive(
            "step_size", min(2.5 / self.steps, 1.0) * self.threat.radius if step_size is None else step_size
        )
        self.momentum = _validation.check_number(
            "momentum", momentum, "a number in [0, 1]", lambda number: 0 <= number <= 1
        )
        self.random_start = bool(random_start)

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by gradient steps; see the base class for arguments and result."""
        target, start = self._targets_and_starts(batch, random_start=self.random_start)
        rows = {
            "x": batch.x,
            "y": batch.y,
            "target": target,
            "x_adv": start,
            "velocity": np.zeros_like(batch.x),
            "best": batch.x,
            "best_loss": np.full(len(batch.x), -np.inf, "float32"),
            "wrong": np.zeros(len(batch.x), "float32"),
        }
        steps_fn = classifier.compile_steps(
            _pgd_step, loss=self.loss, targeted=self.targeted, norm=self.norm, stop=batch.stop_when_broken
        )
        params = {"step_size": np.float32(self.step_size), "momentum": np.float32(self.momentum)}
        return run_steps(
            steps_fn,
            batch,
            rows,
            # One step more than asked for: the first has no gradient yet and only evaluates the start.
            self.steps + 1,
            lambda step, left: (self.threat.bounds, params),
            count=classifier.count_gradients,
        )


class FGSM(PGD):
    """Take one step of size `eps` along the gradient's sign (L-inf), direction (L2) or largest elements (L1).

    Use it for a first look only. A model that withstands it may fall to any attack of several steps.

    Formula: `x + eps * d(g)`, clipped to `[clip_min, clip_max]`, with `g` and `d` as in `PGD`.

    Args:
        eps: The size of the perturbation, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`, as in `PGD`.
        norm: `"inf"` (the default), 2 or 1.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        threat: A `keras_drsl.ThreatModel` in place of `eps`, `norm`, `clip_min`, `clip_max` and `mask`.
        seed: Accepted as by all attacks; nothing is random here.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x_adv = keras_drsl.attacks.FGSM(eps=8, clip_max=255)(model, np.full((4, 8), 128.0), np.arange(4))
    >>> bool(np.isin(np.abs(x_adv - 128.0), [0.0, 8.0]).all())  # 0 where the model was wrong without an attack
    True

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572.
    """

    _family = "fgsm"

    def __init__(
        self,
        eps: Numbers | None = None,
        *,
        loss: str = "ce",
        norm: Norm | None = None,
        clip_min: Numbers | None = None,
        clip_max: Numbers | None = None,
        mask: Any = None,
        threat: ThreatModel | None = None,
        seed: int = 0,
    ) -> None:
        threat = ThreatModel.from_arguments(eps, norm, clip_min, clip_max, threat, mask)
        super().__init__(loss=loss, steps=1, random_start=False, threat=threat, seed=seed)


def _pgd_step(
    classifier: Classifier,
    rows: dict[str, Tensor],
    bounds: Bounds,
    params: dict[str, Tensor],
    *,
    loss: str,
    targeted: bool,
    norm: Norm,
    stop: bool,
) -> dict[str, Tensor]:
    """Take one step and evaluate the point that it leads to."""
    step = params["step_size"] * steepest_ascent(rows["velocity"], norm, bounds.scale)
    x_adv = project(rows["x_adv"] + step, rows["x"], bounds, norm)
    values, gradient, wrong = loss_and_gradient(classifier, x_adv, rows, loss=loss, targeted=targeted)
    axes = tuple(range(1, len(x_adv.shape)))
    scale = ops.maximum(ops.mean(ops.abs(gradient), axis=axes, keepdims=True), 1e-30)
    better = is_better(rows, wrong, values, rows["best_loss"], stop=stop)
    return rows | {
        "x_adv": x_adv,
        "velocity": params["momentum"] * rows["velocity"] + gradient / scale,
        "best": where_rows(better, x_adv, rows["best"]),
        "best_loss": ops.where(better, values, rows["best_loss"]),
        "wrong": ops.where(better, wrong, rows["wrong"]),
    }
