"""The parts that attacks along a gradient share."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _backend, _validation
from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.attacks.objectives import ATTACK_LOSSES, objective, share_wrong
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import DUAL, ThreatModel, as_column, measure

CANDIDATES = 2  # how many classes are compared for each one that is returned


class GradientAttack(Attack):
    """An attack that increases a loss, away from the true class or towards each target class in turn.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        loss: `"ce"`, `"margin"`, `"dlr"` or `"js"`; see `keras_drsl.attacks.objectives`.
        targeted: Whether to aim at each target class in turn, beginning with the one of the largest logit.
        targets: How many target classes, >= 1; all non-true classes if there are fewer.
        steps: How many steps, >= 1.
        restarts: How many starts (per target), >= 1.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `Attack`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    _family = ""

    def __init__(
        self,
        eps: float | None = None,
        *,
        loss: str,
        targeted: bool,
        targets: int,
        steps: int,
        restarts: int,
        **options: Any,
    ) -> None:
        super().__init__(eps, **options)
        self.loss = _validation.check_choice("loss", loss, ATTACK_LOSSES)
        self.targeted = bool(targeted)
        self.targets = _validation.check_integer("targets", targets, at_least=1)
        self.steps = _validation.check_integer("steps", steps, at_least=1)
        self.restarts = _validation.check_integer("restarts", restarts, at_least=1)

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return f"{self._family}_t_{self.loss}" if self.targeted else f"{self._family}_{self.loss}"

    def num_runs(self, num_classes: int) -> int:
        """Return the number of searches per example. An example leaves after the first search that breaks it."""
        return self.restarts * (min(self.targets, num_classes - 1) if self.targeted else 1)

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the model per example; a gradient counts as three."""
        return 3 * (self.steps + 1)

    def num_pool_runs(self, num_classes: int) -> int:
        """Return one search per target class for a targeted attack on the margin, otherwise 0."""
        return min(self.targets, num_classes - 1) if self.targeted and self.loss == "margin" else 0

    def _targets_and_starts(self, batch: Batch, *, random_start: bool = True) -> tuple[Array, Array]:
        """Return the target class of each row and the point where its search starts."""
        num_runs = self.num_runs(batch.logits.shape[-1])
        from_pool = batch.restart >= num_runs
        rank = np.where(from_pool, batch.restart - num_runs, batch.restart // self.restarts)
        target = target_class(batch, rank)
        start = batch.x.copy()
        if batch.start is not None:
            start = ops.convert_to_numpy(self.threat.project(batch.start, batch.x, batch.radius))
        elif random_start:
            drawn = self.threat.sample(batch.generators(self), start.shape[1:])
            start += drawn if batch.radius is None else drawn * as_column(batch.radius / self.threat.radius, drawn)
        if batch.pool is not None:
            images, found = batch.pool.nearest(batch.x[from_pool], target[from_pool])
            rows = np.flatnonzero(from_pool)[found]
            radius = None if batch.radius is None else batch.radius[rows]
            start[rows] = ops.convert_to_numpy(self.threat.project(images[found], batch.x[rows], radius))
        return target, start


def target_class(batch: Batch, rank: Array) -> Array:
    """Return the target class of each row, shape `(batch,)`.

    Args:
        batch: The rows to attack.
        rank: Which target of each row, shape `(batch,)`; 0 for the non-true class of the largest logit.
    """
    if batch.targets is not None:
        return np.asarray(batch.targets[np.arange(len(rank)), np.minimum(rank, batch.targets.shape[1] - 1)])
    if batch.logits.ndim == 3:
        # Of positions, the class of the largest mean logit where it is not the true one.
        is_other = (np.arange(batch.logits.shape[2]) != batch.y[..., None]) & (batch.y >= 0)[..., None]
        count = is_other.sum(axis=1)
        total = np.where(is_other, batch.logits, 0.0).sum(axis=1)
        others = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
    else:
        others = np.where(np.arange(batch.logits.shape[1]) == batch.y[:, None], -np.inf, batch.logits)
    order = np.argsort(-others, axis=1, kind="stable")
    # Untargeted attacks ignore the target and may have more restarts than there are classes.
    rank = np.minimum(rank, order.shape[1] - 1)
    return np.take_along_axis(order, rank[:, None], axis=1)[:, 0].astype("int32")


def rank_targets(classifier: Classifier, batch: Batch, threat: ThreatModel, count: int) -> Array:
    """Return the nearest classes where the model is linear, the nearest first, int32, shape `(batch, count)`.

    Formula: `(z_y - z_t) / ||grad (z_y - z_t)||`, with the dual norm of the threat model.

    Args:
        classifier: The model.
        batch: The rows to attack.
        threat: The threat model.
        count: How many classes are returned. Twice as many, those of the largest logits, are compared.

    Reference: Melamed et al., "MALT Powers Up Adversarial Attacks", arXiv:2407.02240.
    """
    num_rows, num_classes = len(batch.x), batch.logits.shape[-1]
    candidates = min(CANDIDATES * count, num_classes - 1)
    classes = np.stack([target_class(batch, np.full(num_rows, rank)) for rank in range(candidates)])
    padded = np.minimum(np.arange(_backend.bucket_size(num_rows)), num_rows - 1)
    distance = classifier.compile(_linear_distance, norm=threat.norm)
    x, y, scale = batch.x[padded], batch.y[padded], threat.bounds.scale
    distances = [ops.convert_to_numpy(distance(x, y, target[padded], scale))[:num_rows] for target in classes]
    classifier.count_gradients(candidates * num_rows)
    order = np.argsort(np.stack(distances), axis=0, kind="stable")[:count]
    nearest: Array = np.take_along_axis(classes, order, axis=0).T
    return nearest


def _linear_distance(
    classifier: Classifier, x: Tensor, y: Tensor, target: Tensor, scale: Tensor, *, norm: Norm
) -> Tensor:
    """Return how far the boundary to a class is on the model's linearization, shape `(batch,)`."""

    def loss_fn(logits: Tensor) -> Tensor:
        return objective("margin", logits, y, target, targeted=True)

    values, _, gradient = input_gradient(classifier, loss_fn, x)
    size = ops.reshape(measure(scale * replace_nonfinite(gradient), DUAL[norm]), (-1,))
    return -values / ops.maximum(size, 1e-12)


def loss_and_gradient(
    classifier: Classifier, x_adv: Tensor, rows: dict[str, Tensor], *, loss: str, targeted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of an attack at a point, a gradient to follow, and the share of predictions that are wrong."""

    def loss_fn(logits: Tensor) -> Tensor:
        return objective(loss, logits, rows["y"], rows["target"], targeted=targeted)

    values, logits, gradient = input_gradient(classifier, loss_fn, x_adv)
    return values, replace_nonfinite(gradient), share_wrong(logits, rows["y"])


def input_gradient(
    classifier: Classifier, loss_fn: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each row, the logits, and the direction of the gradient of each loss with respect to `x`.

    The gradient is scaled to a largest element of 1 at the logits. The gradient of a confident prediction is small, and
    on its way back through a half-precision model it would underflow. Attacks follow its direction only.
    """

    def loss_along_gradient(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = classifier(x)
        values, _, gradient = _backend.value_and_gradient(lambda z: (loss_fn(z), ()), ops.stop_gradient(logits))
        axes = tuple(range(1, len(logits.shape)))
        largest = ops.max(ops.abs(gradient), axis=axes, keepdims=True)
        scaled = ops.stop_gradient(gradient / ops.maximum(largest, 1e-30))
        return ops.sum(logits * scaled, axis=axes), (values, logits)

    _, (values, logits), gradient = _backend.value_and_gradient(loss_along_gradient, x)
    return values, logits, gradient


def replace_nonfinite(gradient: Tensor) -> Tensor:
    """Replace NaN by 0 and infinite elements by large ones, so that the gradient has a direction."""
    return ops.clip(ops.where(ops.isnan(gradient), 0.0, gradient), -1e30, 1e30)
