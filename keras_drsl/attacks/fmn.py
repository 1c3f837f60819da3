"""FMN: a search for the smallest perturbation that misleads a model, in place of one within a given radius."""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.gradients import loss_and_gradient
from keras_drsl.attacks.loop import run_steps, where_rows
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import DUAL, Bounds, ThreatModel, as_column, measure, project, steepest_ascent, unscale

STEP_SIZE, LAST_STEP_SIZE = 1.0, 0.01  # in units of the valid range
SHRINKAGE, LAST_SHRINKAGE = 0.05, 0.001  # the share by which the radius changes in a step


def find_small_perturbations(classifier: Classifier, batch: Batch, threat: ThreatModel, steps: int) -> Array:
    """Search for the nearest misclassified point of each row, away from the true class.

    Formula: `z = x_k + a g / |g|_2`, `x_{k+1} = project(z)` on the ball of radius `r`, with `g` the gradient of the
    margin. The radius shrinks by a share where `x_k` is misclassified, to less than that of the best point so far, and
    grows by it where it is not. Before the first misclassified point, it is the distance to the boundary of the model's
    linearization. Step size and share fall along a cosine.

    Args:
        classifier: The model.
        batch: The rows, which are classified correctly.
        threat: The norm, the range and the radii of features; of the largest radius only its unit counts.
        steps: How many steps, >= 1.

    Returns:
        The nearest misclassified point that was found for each row, or the input where none was.

    Reference: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints",
    arXiv:2102.12827.
    """
    count = len(batch.x)
    rows = {
        "x": batch.x,
        "y": batch.y,
        "target": batch.y,
        "x_adv": batch.x,
        "radius": np.full(count, np.inf, "float32"),
        "best": batch.x,
        "best_size": np.full(count, np.inf, "float32"),
        "wrong": np.zeros(count, "float32"),
    }
    steps_fn = classifier.compile_steps(_fmn_step, norm=threat.norm)
    span = float(np.max(threat.span))

    def arguments(step: int, left: Array) -> tuple[Any, ...]:
        share = (1 + math.cos(math.pi * step / steps)) / 2
        params = {
            "step_size": np.float32(span * (LAST_STEP_SIZE + (STEP_SIZE - LAST_STEP_SIZE) * share)),
            "shrinkage": np.float32(LAST_SHRINKAGE + (SHRINKAGE - LAST_SHRINKAGE) * share),
        }
        return threat.bounds, params

    # No row leaves with its first misclassified point.
    whole = batch._replace(stop_when_broken=False)
    return run_steps(steps_fn, whole, rows, steps + 1, arguments, count=classifier.count_gradients)


def _fmn_step(
    classifier: Classifier, rows: dict[str, Tensor], bounds: Bounds, params: dict[str, Tensor], *, norm: Norm
) -> dict[str, Tensor]:
    """Evaluate a point, change the radius, and take a step."""
    x, x_adv = rows["x"], rows["x_adv"]
    values, gradient, wrong = loss_and_gradient(classifier, x_adv, rows, loss="margin", targeted=False)
    gradient = bounds.scale * gradient
    delta = unscale(x_adv - x, bounds)
    size, dual_size = (ops.reshape(measure(*pair), (-1,)) for pair in ((delta, norm), (gradient, DUAL[norm])))
    is_wrong = wrong >= 1
    better = ops.logical_and(is_wrong, size < rows["best_size"])
    best_size = ops.where(better, size, rows["best_size"])
    to_boundary = size + ops.abs(values) / ops.maximum(dual_size, 1e-12)
    smaller = ops.minimum(rows["radius"] * (1 - params["shrinkage"]), best_size)
    larger = ops.where(best_size < float("inf"), rows["radius"] * (1 + params["shrinkage"]), to_boundary)
    radius = ops.where(is_wrong, smaller, larger)
    direction = unscale(steepest_ascent(gradient, 2), bounds)
    moved = x + bounds.scale * (delta + params["step_size"] * direction)
    of_rows = bounds._replace(eps=as_column(radius, x))
    return rows | {
        "x_adv": project(moved, x, of_rows, norm),
        "radius": radius,
        "best": where_rows(better, x_adv, rows["best"]),
        "best_size": best_size,
        "wrong": ops.where(better, wrong, rows["wrong"]),
    }
