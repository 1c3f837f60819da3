"""Random points of the ball: the least that an attack must beat."""

from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _validation
from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.attacks.loop import is_better, run_steps, where_rows
from keras_drsl.attacks.objectives import objective, share_wrong
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import Bounds, project


class Noise(Attack):
    """Try random points of the ball around the input, uniformly distributed.

    Use it to detect gradient masking. Gradient attacks should break every image that noise breaks.

    Formula: `x + u`, clipped to `[clip_min, clip_max]`, with `u` uniform in the ball of radius `eps`. The first
    misclassified point is returned, or else the point with the largest margin of another class over the true class.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        points: How many points to try, >= 1.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> keras_drsl.attacks.Noise(eps=0.1, points=5)(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)
    """

    needs_gradient = False

    def __init__(self, eps: float | None = None, *, points: int = 100, **options: Any) -> None:
        super().__init__(eps, **options)
        self.points = _validation.check_integer("points", points, at_least=1)

    @property
    def num_evaluations(self) -> int:
        """How many times one search evaluates the model per example."""
        return self.points

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by random points; see the base class for arguments and result."""
        generators = batch.generators(self)

        def arguments(step: int, left: Array) -> tuple[Any, ...]:
            at = [generators[row] for row in left]
            return self.threat.bounds, self.threat.sample(at, batch.x.shape[1:])

        steps_fn = classifier.compile_steps(_noise_step, norm=self.norm, stop=batch.stop_when_broken)
        return run_steps(
            steps_fn, batch, gradient_free_rows(batch), self.points, arguments, count=classifier.count_queries
        )


def gradient_free_rows(batch: Batch) -> dict[str, Array]:
    """Return the rows that a search without gradients starts with."""
    count = len(batch.x)
    margin = np.full(count, -np.inf, "float32")
    return {"x": batch.x, "y": batch.y, "best": batch.x, "margin": margin, "wrong": np.zeros(count, "float32")}


def keep_better(classifier: Classifier, rows: dict[str, Tensor], x_adv: Tensor, *, stop: bool) -> dict[str, Tensor]:
    """Return the rows with `x_adv` as the best point where its margin is the largest so far."""
    logits = classifier(x_adv)
    margin = objective("margin", logits, rows["y"], rows["y"], targeted=False)
    wrong = share_wrong(logits, rows["y"])
    better = is_better(rows, wrong, margin, rows["margin"], stop=stop)
    return rows | {
        "best": where_rows(better, x_adv, rows["best"]),
        "margin": ops.where(better, margin, rows["margin"]),
        "wrong": ops.where(better, wrong, rows["wrong"]),
    }


def _noise_step(
    classifier: Classifier, rows: dict[str, Tensor], bounds: Bounds, delta: Tensor, *, norm: Norm, stop: bool
) -> dict[str, Tensor]:
    """Evaluate one more point of the ball."""
    return keep_better(classifier, rows, project(rows["x"] + delta, rows["x"], bounds, norm), stop=stop)
