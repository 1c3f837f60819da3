"""Auto-PGD: projected gradient descent that adapts its step size."""

from typing import Any

import numpy as np
from keras import ops

from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.gradients import GradientAttack, loss_and_gradient
from keras_drsl.attacks.loop import is_better, run_steps, where_rows
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import Bounds, project, steepest_ascent


class APGD(GradientAttack):
    """Take gradient steps with momentum. When progress stops, return to the best point and halve the step size.

    Use it for numbers to publish, with several losses. It has no step size that could be chosen badly.

    Formula: `z = project(x_k + s * d(g_k))`, `x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))`, with

    - `g_k` and `d`: the gradient of the attack's loss and its direction, as in `PGD`;
    - `s`: the step size, 2 eps at first.

    Progress is checked after 22 % of the steps, then after spans that shrink to 6 %. At a check `s` is halved, and the
    search returns to the best point, if one of these holds:

    - the loss rose in at most three quarters of the steps since the last check;
    - `s` was not halved at the last check, and the best loss has not risen since.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`, as in `PGD`.
        targeted: Whether to aim at each non-true class in turn, as in `PGD`.
        targets: How many target classes, >= 1; all non-true classes if there are fewer.
        steps: How many steps, >= 1.
        restarts: How many random starts (per target), >= 1.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> attack = keras_drsl.attacks.APGD(eps=0.1, loss="dlr", targeted=True, steps=5)
    >>> attack.name
    'apgd_t_dlr'
    >>> attack(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", arXiv:2003.01690.
    """

    _family = "apgd"

    def __init__(
        self,
        eps: float | None = None,
        *,
        loss: str = "ce",
        targeted: bool = False,
        targets: int = 9,
        steps: int = 100,
        restarts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(eps, loss=loss, targeted=targeted, targets=targets, steps=steps, restarts=restarts, **options)

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by adaptive gradient steps; see the base class for arguments and result."""
        count = len(batch.x)
        target, start = self._targets_and_starts(batch)
        rows = {
            "x": batch.x,
            "y": batch.y,
            "target": target,
            "x_adv": start,
            "x_old": start,
            "gradient": np.zeros_like(start),
            "best": batch.x,
            "best_gradient": np.zeros_like(start),
            "best_loss": np.full(count, -np.inf, "float32"),
            "checked_loss": np.full(count, -np.inf, "float32"),
            "last_loss": np.full(count, np.inf, "float32"),
            "step_size": np.full(count, 2 * self.threat.radius, "float32"),
            "rises": np.zeros(count, "float32"),
            "halved": np.ones(count, bool),
            "wrong": np.zeros(count, "float32"),
        }
        steps_fn = classifier.compile_steps(
            _apgd_step, loss=self.loss, targeted=self.targeted, norm=self.norm, stop=batch.stop_when_broken
        )
        spans = checkpoints(self.steps)

        def arguments(step: int, left: Array) -> tuple[Any, ...]:
            # Step 0 has no gradient yet and only evaluates the start, so step 1 has no momentum.
            params = {"inertia": np.float32(0.25 if step > 1 else 0.0), "span": np.float32(spans.get(step, 0))}
            return self.threat.bounds, params

        return run_steps(steps_fn, batch, rows, self.steps + 1, arguments, count=classifier.count_gradients)


def checkpoints(steps: int) -> dict[int, int]:
    """Return after which steps progress is checked, and over how many steps."""
    span, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    spans, step = {}, span
    while step <= steps:
        spans[step] = span
        span = max(span - shrink, shortest)
        step += span
    return spans


def _apgd_step(
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
    """Take one step, and check progress where `span`, the number of steps since the last check, is not 0."""
    size = ops.reshape(rows["step_size"], (-1,) + (1,) * (len(rows["x"].shape) - 1))
    step = size * steepest_ascent(rows["gradient"], norm, bounds.scale)
    ahead = project(rows["x_adv"] + step, rows["x"], bounds, norm)
    inertia = params["inertia"]
    moved = rows["x_adv"] + (1 - inertia) * (ahead - rows["x_adv"]) + inertia * (rows["x_adv"] - rows["x_old"])
    x_adv = project(moved, rows["x"], bounds, norm)
    values, gradient, wrong = loss_and_gradient(classifier, x_adv, rows, loss=loss, targeted=targeted)

    better = is_better(rows, wrong, values, rows["best_loss"], stop=stop)
    best = where_rows(better, x_adv, rows["best"])
    best_gradient = where_rows(better, gradient, rows["best_gradient"])
    best_loss = ops.where(better, values, rows["best_loss"])
    rises = rows["rises"] + ops.cast(values > rows["last_loss"], "float32")

    is_check = params["span"] > 0
    stuck = ops.logical_and(ops.logical_not(rows["halved"]), rows["checked_loss"] >= best_loss)
    halve = ops.logical_and(is_check, ops.logical_or(rises <= 0.75 * params["span"], stuck))
    return rows | {
        "x_adv": where_rows(halve, best, x_adv),
        "x_old": rows["x_adv"],
        "gradient": where_rows(halve, best_gradient, gradient),
        "best": best,
        "best_gradient": best_gradient,
        "best_loss": best_loss,
        "checked_loss": ops.where(is_check, best_loss, rows["checked_loss"]),
        "last_loss": values,
        "step_size": ops.where(halve, rows["step_size"] / 2, rows["step_size"]),
        "rises": ops.where(is_check, 0.0, rises),
        "halved": ops.where(is_check, halve, rows["halved"]),
        "wrong": ops.where(better, wrong, rows["wrong"]),
    }
