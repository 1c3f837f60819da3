"""What attacks that follow a gradient share."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _arguments, _backend
from keras_drsl.attacks.attack import Attack, Batch, misclassified
from keras_drsl.attacks.classifier import Classifier
from keras_drsl.attacks.objectives import LOSSES, objective


class GradientAttack(Attack):
    """An attack that drives up a loss, away from the true class or towards each rival in turn.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        loss: `"ce"`, `"margin"` or `"dlr"`.
        targeted: aim at each rival class in turn.
        targets: how many rivals to aim at.
        steps: how many steps.
        restarts: how many starts (for each rival).
        **threat: `norm`, `clip_min`, `clip_max` and `seed`, as for `Attack`.

    Raises:
        ValueError: for arguments out of their range.
    """

    _family = ""

    def __init__(
        self, eps: float, *, loss: str, targeted: bool, targets: int, steps: int, restarts: int, **threat: Any
    ) -> None:
        super().__init__(eps, **threat)
        self.loss = _arguments.check_choice("loss", loss, LOSSES)
        self.targeted = bool(targeted)
        self.targets = _arguments.check_integer("targets", targets, at_least=1)
        self.steps = _arguments.check_integer("steps", steps, at_least=1)
        self.restarts = _arguments.check_integer("restarts", restarts, at_least=1)

    @property
    def name(self) -> str:
        """What reports call the attack."""
        return f"{self._family}_t_{self.loss}" if self.targeted else f"{self._family}_{self.loss}"

    def runs(self, classes: int) -> int:
        """How many runs an example that withstands them all goes through."""
        return self.restarts * (min(self.targets, classes - 1) if self.targeted else 1)


def rival(batch: Batch, restarts: int) -> np.ndarray:
    """The rival class a row's run is for, the one of the largest logit first, shape `(batch,)`."""
    others = np.where(np.arange(batch.logits.shape[1]) == batch.y[:, None], -np.inf, batch.logits)
    order = np.argsort(-others, axis=1, kind="stable")
    # Untargeted attacks may have more runs than there are rivals, and look at none.
    place = np.minimum(batch.runs // restarts, order.shape[1] - 1)
    return np.take_along_axis(order, place[:, None], axis=1)[:, 0].astype("int32")


def ascent(classifier: Classifier, x_adv: Any, rows: dict, *, loss: str, targeted: bool) -> tuple[Any, Any, Any]:
    """The attack's loss at a point, a gradient to follow, and whether the point is misclassified."""

    def drive(logits: Any) -> Any:
        return objective(loss, logits, rows["y"], rows["target"], targeted=targeted)

    values, logits, gradient = slope(classifier, drive, x_adv)
    return values, finite(gradient), misclassified(logits, rows["y"])


def slope(classifier: Classifier, drive: Callable, x: Any) -> tuple[Any, Any, Any]:
    """What drives an attack, one value a row, the logits, and the gradient of each value, of whatever length.

    The gradient is brought to length 1 at the logits: on its way back through a model of half precision the small one
    of a confident prediction would vanish. Its direction is all that attacks follow.
    """

    def along(x: Any) -> tuple[Any, Any]:
        logits = classifier(x)
        values, _, pulls = _backend.input_gradient(lambda z: (drive(z), ()), ops.stop_gradient(logits))
        largest = ops.max(ops.abs(pulls), axis=-1, keepdims=True)
        return ops.sum(logits * ops.stop_gradient(pulls / ops.maximum(largest, 1e-30)), axis=-1), (values, logits)

    _, (values, logits), gradient = _backend.input_gradient(along, x)
    return values, logits, gradient


def finite(gradient: Any) -> Any:
    """A gradient that has a direction: 0 for NaN, and large numbers for infinite ones."""
    return ops.clip(ops.where(ops.isnan(gradient), 0.0, gradient), -1e30, 1e30)
