"""Random points of the ball: the least an attack must beat."""

from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _arguments
from keras_drsl.attacks import balls
from keras_drsl.attacks.attack import Attack, Batch, misclassified, search, where_rows
from keras_drsl.attacks.classifier import Classifier
from keras_drsl.attacks.objectives import objective


class Noise(Attack):
    """Random points of the ball around the input, uniformly distributed.

    Use it as a witness against gradient attacks: what only noise breaks, they should have broken.

    Formula: `x + u`, clipped to `[clip_min, clip_max]`, u uniform in the ball of radius `eps`. Of all points the first
    misclassified one is kept, or else the one of the largest margin of a rival over the true class.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        points: how many to try, >= 1.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of the points, >= 0.

    Raises:
        ValueError: for arguments out of their range.

    Example:

    >>> from keras_drsl.attacks import Noise
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = Noise(eps=0.1, points=5)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True
    """

    def __init__(
        self,
        eps: float,
        *,
        points: int = 100,
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=seed)
        self.points = _arguments.check_integer("points", points, at_least=1)

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        generators = batch.generators(self)

        def arguments(step: int, alive: np.ndarray) -> tuple:
            at = [generators[one] for one in alive]
            return self._ball(), balls.random_points(at, batch.x.shape[1:], self.eps, self.norm)

        stepper = classifier.stepper(try_points, norm=self.norm)
        return search(stepper, batch, start_of(batch), self.points, arguments, persist=self._persist)


def start_of(batch: Batch) -> dict[str, np.ndarray]:
    """The rows of a search that needs no gradient."""
    count = len(batch.x)
    margin = np.full(count, -np.inf, "float32")
    return {"x": batch.x, "y": batch.y, "best": batch.x, "margin": margin, "broken": np.zeros(count, bool)}


def keep_better(classifier: Classifier, rows: dict, x_adv: Any) -> dict:
    """The rows with `x_adv` as the best point where its margin is the largest so far."""
    logits = classifier(x_adv)
    margin = objective("margin", logits, rows["y"], rows["y"], targeted=False)
    wrong = misclassified(logits, rows["y"])
    better = ops.logical_and(ops.logical_not(rows["broken"]), ops.logical_or(wrong, margin > rows["margin"]))
    return rows | {
        "best": where_rows(better, x_adv, rows["best"]),
        "margin": ops.where(better, margin, rows["margin"]),
        "broken": ops.logical_or(rows["broken"], wrong),
    }


def try_points(classifier: Classifier, rows: dict, ball: dict, delta: Any, *, norm: str | int) -> dict:
    """Look at one more point of the ball."""
    return keep_better(classifier, rows, balls.project(rows["x"] + delta, rows["x"], ball, norm))
