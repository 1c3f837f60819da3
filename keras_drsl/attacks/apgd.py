"""Auto-PGD: projected gradient descent that finds its own step size."""

import numpy as np
from keras import ops

from keras_drsl.attacks import balls
from keras_drsl.attacks.attack import Batch, search, where_rows
from keras_drsl.attacks.classifier import Classifier
from keras_drsl.attacks.gradient import GradientAttack, ascent, rival


class APGD(GradientAttack):
    """Gradient steps with momentum whose size is halved, from the best point so far, where progress ends.

    Use it for numbers to publish, with several losses: no step size to choose, so none to choose badly.

    Formula: `z = project(x_k + s * d(g_k))`, `x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))`, with g
    and d as in `PGD` and s = 2 eps at first. After 22 % of the steps, and then after ever shorter spans down to 6 %,
    s is halved and the best point returned to if the loss rose in no more than three quarters of the span's steps, or
    if s was not halved the last time and the best loss has not risen since.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`, see `keras_drsl.attacks.objectives`. With fewer than four classes `"dlr"`
            is the margin.
        targeted: aim at each rival class in turn, the likeliest first, rather than away from the true class.
        targets: how many rivals to aim at; all if there are no more.
        steps: how many steps, >= 1.
        restarts: how many random starts (for each rival), >= 1.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of the starts, >= 0.

    Raises:
        ValueError: for arguments out of their range.

    Example:

    >>> from keras_drsl.attacks import APGD
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = APGD(eps=0.1, loss="dlr", targeted=True, steps=5)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", arXiv:2003.01690.
    """

    _family = "apgd"

    def __init__(
        self,
        eps: float,
        *,
        loss: str = "ce",
        targeted: bool = False,
        targets: int = 9,
        steps: int = 100,
        restarts: int = 1,
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        seed: int = 0,
    ) -> None:
        threat = {"norm": norm, "clip_min": clip_min, "clip_max": clip_max, "seed": seed}
        super().__init__(eps, loss=loss, targeted=targeted, targets=targets, steps=steps, restarts=restarts, **threat)

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        count = len(batch.x)
        start = batch.x + balls.random_points(batch.generators(self), batch.x.shape[1:], self.eps, self.norm)
        start = start.astype("float32")
        rows = {
            "x": batch.x,
            "y": batch.y,
            "target": rival(batch, self.restarts),
            "x_adv": start,
            "x_old": start,
            "gradient": np.zeros_like(start),
            "best": batch.x,
            "best_gradient": np.zeros_like(start),
            "best_loss": np.full(count, -np.inf, "float32"),
            "checked_loss": np.full(count, -np.inf, "float32"),
            "last_loss": np.full(count, np.inf, "float32"),
            "step_size": np.full(count, 2 * self.eps, "float32"),
            "rises": np.zeros(count, "float32"),
            "halved": np.ones(count, bool),
            "broken": np.zeros(count, bool),
        }
        stepper = classifier.stepper(apgd_step, loss=self.loss, targeted=self.targeted, norm=self.norm)
        spans = checkpoints(self.steps)

        def arguments(step: int, alive: np.ndarray) -> tuple:
            # Without a gradient yet, step 0 only looks at the start.
            knobs = {"inertia": np.float32(0.25 if step > 1 else 0.0), "span": np.float32(spans.get(step, 0))}
            return self._ball(), knobs

        return search(stepper, batch, rows, self.steps + 1, arguments, persist=self._persist)


def checkpoints(steps: int) -> dict[int, int]:
    """After which steps progress is checked, and over how many of them."""
    span, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    spans, step = {}, span
    while step <= steps:
        spans[step] = span
        span = max(span - shrink, shortest)
        step += span
    return spans


def apgd_step(
    classifier: Classifier, rows: dict, ball: dict, knobs: dict, *, loss: str, targeted: bool, norm: str | int
) -> dict:
    """One step, and the check of progress where `span`, the steps since the last one, is not 0."""
    size = ops.reshape(rows["step_size"], (-1,) + (1,) * (len(rows["x"].shape) - 1))
    ahead = balls.project(rows["x_adv"] + size * balls.direction(rows["gradient"], norm), rows["x"], ball, norm)
    inertia = knobs["inertia"]
    moved = rows["x_adv"] + (1 - inertia) * (ahead - rows["x_adv"]) + inertia * (rows["x_adv"] - rows["x_old"])
    x_adv = balls.project(moved, rows["x"], ball, norm)
    values, gradient, wrong = ascent(classifier, x_adv, rows, loss=loss, targeted=targeted)

    searching = ops.logical_not(rows["broken"])
    better = ops.logical_and(searching, ops.logical_or(wrong, values > rows["best_loss"]))
    best = where_rows(better, x_adv, rows["best"])
    best_gradient = where_rows(better, gradient, rows["best_gradient"])
    best_loss = ops.where(better, values, rows["best_loss"])
    rises = rows["rises"] + ops.cast(values > rows["last_loss"], "float32")

    checked = knobs["span"] > 0
    stuck = ops.logical_and(ops.logical_not(rows["halved"]), rows["checked_loss"] >= best_loss)
    halve = ops.logical_and(checked, ops.logical_or(rises <= 0.75 * knobs["span"], stuck))
    return rows | {
        "x_adv": where_rows(halve, best, x_adv),
        "x_old": rows["x_adv"],
        "gradient": where_rows(halve, best_gradient, gradient),
        "best": best,
        "best_gradient": best_gradient,
        "best_loss": best_loss,
        "checked_loss": ops.where(checked, best_loss, rows["checked_loss"]),
        "last_loss": values,
        "step_size": ops.where(halve, rows["step_size"] / 2, rows["step_size"]),
        "rises": ops.where(checked, 0.0, rises),
        "halved": ops.where(checked, halve, rows["halved"]),
        "broken": ops.logical_or(rows["broken"], wrong),
    }
