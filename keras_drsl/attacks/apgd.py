"""Auto-PGD: projected gradient descent that adapts its step size."""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.gradients import GradientAttack, loss_and_gradient
from keras_drsl.attacks.loop import is_better, run_steps, where_rows
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import Bounds, as_column, farthest, project, room_along, sparse_sign, steepest_ascent

# In L1, the search begins in larger balls: their radii over eps, and their shares of the steps.
STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


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

    Formula (L1): `x_{k+1} = project(x_k + s * d(g_k))`, with `d` the sign of the gradient on few features. They are as
    many as the best point has changed, over 1.5; at first a fifth. At a check after 4 % of the steps, `s` goes back to
    eps, and the search to the best point, where that point has become sparser; otherwise `s` shrinks to two thirds, at
    least eps / 10. The first 60 % of the steps are taken in balls of 3 eps and 2 eps. The last point is the one of the
    ball and the range that gains the most along the gradient at the best point.

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
    parameter-free attacks", arXiv:2003.01690; in L1: "Mind the box: l1-APGD for sparse adversarial attacks on image
    classifiers", arXiv:2103.01208.
    """

    _family = "apgd"
    _takes_radii = True

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
        if self.norm == 1:
            return self._run_sparse(classifier, batch, target, start)
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
            "radius": as_column(self._radii(batch), start),
            "step_size": 2 * self._radii(batch),
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

    def _radii(self, batch: Batch) -> Array:
        """Return the radius of each row, float32, shape `(batch,)`."""
        radii = np.full(len(batch.x), self.threat.radius) if batch.radius is None else batch.radius
        return radii.astype("float32")

    def _run_sparse(self, classifier: Classifier, batch: Batch, target: Array, start: Array) -> Array:
        """Search in L1, in balls that shrink to that of the threat model."""
        count, num_features = len(batch.x), math.prod(batch.x.shape[1:])
        span = max(int(0.04 * self.steps), 1)
        best = start
        for factor, share in STAGES:
            is_last = factor == 1
            stop = batch.stop_when_broken and is_last
            steps, radii = math.ceil(share * self.steps), np.float32(factor) * self._radii(batch)
            changed = (best != batch.x).reshape(count, -1).sum(axis=1).astype("float32")
            is_first = factor == STAGES[0][0]
            rows = {
                "x": batch.x,
                "y": batch.y,
                "target": target,
                "x_adv": best,
                "gradient": np.zeros_like(best),
                "best": batch.x,
                "best_gradient": np.zeros_like(best),
                "best_loss": np.full(count, -np.inf, "float32"),
                "radius": as_column(radii, start),
                "step_size": radii,
                "share": np.full(count, 0.2, "float32") if is_first else changed / num_features / np.float32(1.5),
                "changed": np.full(count, num_features, "float32") if is_first else changed,
                "wrong": np.zeros(count, "float32"),
            }
            steps_fn = classifier.compile_steps(_sparse_step, loss=self.loss, targeted=self.targeted, stop=stop)

            def arguments(step: int, left: Array, *, last: int | None = steps if is_last else None) -> tuple[Any, ...]:
                params = {"is_check": np.bool_(step > 0 and step % span == 0), "is_last": np.bool_(step == last)}
                return self.threat.bounds, params

            best = run_steps(
                steps_fn,
                batch._replace(stop_when_broken=stop),
                rows,
                steps + 1,
                arguments,
                count=classifier.count_gradients,
            )
        return best


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
    bounds = bounds._replace(eps=rows["radius"])
    step = as_column(rows["step_size"], rows["x"]) * steepest_ascent(rows["gradient"], norm, bounds.scale)
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


def _sparse_step(
    classifier: Classifier,
    rows: dict[str, Tensor],
    bounds: Bounds,
    params: dict[str, Tensor],
    *,
    loss: str,
    targeted: bool,
    stop: bool,
) -> dict[str, Tensor]:
    """Take one step in L1, and check at some of them how many features the best point has changed."""
    bounds, x = bounds._replace(eps=rows["radius"]), rows["x"]
    num_features = math.prod(x.shape[1:])
    # What has no room does not move.
    gradient = bounds.scale * ops.where(room_along(rows["gradient"], rows["x_adv"], bounds) > 0, rows["gradient"], 0.0)
    ordered = ops.sort(ops.reshape(ops.abs(gradient), (-1, num_features)), axis=1)
    place = ops.cast(ops.round((1.0 - rows["share"]) * num_features), "int32")
    least = ops.take_along_axis(ordered, ops.clip(place, 0, num_features - 1)[:, None], axis=1)[:, 0]
    step = as_column(rows["step_size"], x) * sparse_sign(gradient, least)
    x_adv = ops.cond(
        params["is_last"],
        lambda: farthest(rows["best_gradient"], x, bounds),
        lambda: project(rows["x_adv"] + bounds.scale * step, x, bounds, 1),
    )
    values, gradient, wrong = loss_and_gradient(classifier, x_adv, rows, loss=loss, targeted=targeted)

    better = is_better(rows, wrong, values, rows["best_loss"], stop=stop)
    best = where_rows(better, x_adv, rows["best"])
    best_gradient = where_rows(better, gradient, rows["best_gradient"])
    is_check = params["is_check"]
    changed = ops.sum(ops.cast(best != x, "float32"), axis=tuple(range(1, len(x.shape))))
    is_sparser = ops.logical_and(is_check, changed < 0.95 * rows["changed"])
    eps = ops.reshape(bounds.eps, (-1,))
    smaller = ops.where(is_check, ops.maximum(rows["step_size"] / 1.5, eps / 10), rows["step_size"])
    return rows | {
        "x_adv": where_rows(is_sparser, best, x_adv),
        "gradient": where_rows(is_sparser, best_gradient, gradient),
        "best": best,
        "best_gradient": best_gradient,
        "best_loss": ops.where(better, values, rows["best_loss"]),
        "step_size": ops.where(is_sparser, eps, smaller),
        "share": ops.where(is_check, changed / num_features / 1.5, rows["share"]),
        "changed": ops.where(is_check, changed, rows["changed"]),
        "wrong": ops.where(better, wrong, rows["wrong"]),
    }
