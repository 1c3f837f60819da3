"""The attack on each batch of a training."""

import dataclasses
import math
from typing import cast

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl.attacks.gradients import input_gradient, replace_nonfinite
from keras_drsl.attacks.objectives import misclassified
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import ThreatModel, project, random_delta, steepest_ascent
from keras_drsl.training.methods import AttackedBatch, CleanBatch, LossFn, Method, cross_entropy


class ReplicaSeeds(keras.random.SeedGenerator):
    """Draw different random numbers on each replica."""

    def next(self, ordered: bool = True) -> Tensor:
        """Return the next seed, as `keras.random.SeedGenerator.next` does."""
        seed = super().next(ordered)
        return seed + ops.cast(ops.stack([65536 * _backend.replica_id(), 0]), seed.dtype)


@dataclasses.dataclass(frozen=True)
class InnerAttack:
    """Attack batches within a training step.

    Args:
        method: Which loss the attack increases, and where it starts.
        threat: The ball and the valid range.
        steps: The number of steps, >= 1.
        step_size: The size of a step, in units of the input, > 0.
        seeds: Where the random starts come from.
        ignore_class: The class id of predictions that do not count, of a model with several per sample; or None.
    """

    method: Method
    threat: ThreatModel
    steps: int
    step_size: float
    seeds: ReplicaSeeds
    ignore_class: int | None = None

    def __call__(
        self, classifier: Classifier, x: Tensor, y: Tensor, eps_scale: keras.Variable, weights: Tensor | None = None
    ) -> AttackedBatch:
        """Attack a batch, or draw the random copies of the method.

        Args:
            classifier: The model at inference, which returns logits.
            x: Inputs `(batch, ...)`.
            y: Labels of any form.
            eps_scale: The factor of `eps` in this epoch, a scalar in (0, 1].
            weights: The weight of each position, of which those of 0 do not count; or None.
        """
        x = ops.cast(x, "float32")
        scale = ops.convert_to_tensor(eps_scale)
        if self.method.slope:
            return self._along_slope(classifier, x, y, scale, weights)
        batch = self.clean_batch(x, y, classifier(x), weights)
        logits = batch.logits
        clean, adversarial, loss_increase = x, x, ops.zeros((ops.shape(x)[0],))
        if self.method.random_copies:
            clean, adversarial = x + self._random_delta(x, scale), x + self._random_delta(x, scale)
        if self.method.loss_fn is not None:
            loss_fn, start = per_sample(self.method.loss_fn), self._start(x, scale)
            adversarial = ops.stop_gradient(self._search(classifier, batch, loss_fn, start, scale))
            entropy = per_sample(cross_entropy)
            loss_increase = entropy(classifier(adversarial), batch) - entropy(logits, batch)
        is_correct = per_sample(_is_correct)(logits, batch)
        return AttackedBatch(clean, adversarial, is_correct, ops.stop_gradient(loss_increase))

    def clean_batch(self, x: Tensor, y: Tensor, logits: Tensor, weights: Tensor | None = None) -> CleanBatch:
        """Return what the losses of an attack are given.

        Args:
            x: Inputs `(batch, ...)`.
            y: Labels of any form.
            logits: The logits of the inputs.
            weights: As above.
        """
        ids = as_class_ids(y, logits, self.ignore_class)
        if weights is not None:
            ids = ops.where(ops.reshape(weights, (-1, logits.shape[1])) == 0, -1, ids)
        return CleanBatch(x, ids, y, ops.stop_gradient(logits))

    def _along_slope(
        self, classifier: Classifier, x: Tensor, y: Tensor, scale: Tensor, weights: Tensor | None
    ) -> AttackedBatch:
        """Return the start and the end of the one step of a slope; the gradient there gives the logits as well."""
        start = self._start(x, scale)
        loss_fn = per_sample(cast(LossFn, self.method.loss_fn))

        def loss(logits: Tensor) -> Tensor:
            return loss_fn(logits, self.clean_batch(x, y, logits, weights))

        _, logits, gradient = input_gradient(classifier, loss, start)
        is_correct = per_sample(_is_correct)(logits, self.clean_batch(x, y, logits, weights))
        end = ops.stop_gradient(start + self.step_size * self._direction(gradient))
        return AttackedBatch(start, end, is_correct, ops.zeros((ops.shape(x)[0],)))

    def _start(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the point before the first step."""
        if self.method.start_near_input:
            spread = ops.convert_to_tensor(np.asarray(self.threat.span, dtype="float32"))
            delta = 0.001 * spread * keras.random.normal(ops.shape(x), dtype="float32", seed=self.seeds)
        elif self.method.start_radius == 0:
            return x
        else:
            delta = self.method.start_radius * self._random_delta(x, scale)
        return self._clip(x + delta, x, scale)

    def _search(
        self, classifier: Classifier, batch: CleanBatch, loss_fn: LossFn, start: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the point after the last step."""
        length = self.step_size * scale

        def step(x_adv: Tensor) -> Tensor:
            _, _, gradient = input_gradient(classifier, lambda logits: loss_fn(logits, batch), x_adv)
            return self._clip(x_adv + length * self._direction(gradient), batch.x, scale)

        return _backend.fori_loop(step, self.steps, start, classifier.variables)

    def _direction(self, gradient: Tensor) -> Tensor:
        return steepest_ascent(replace_nonfinite(gradient), self.threat.norm, self.threat.tensors.scale)

    def _clip(self, x_adv: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        if not self.method.clips:
            return x_adv
        bounds = self.threat.tensors._replace(eps=scale * self.threat.radius)
        return project(x_adv, x, bounds, self.threat.norm)

    def _random_delta(self, x: Tensor, scale: Tensor) -> Tensor:
        bounds = self.threat.tensors._replace(eps=scale * self.threat.radius)
        return random_delta(ops.shape(x), bounds, self.threat.norm, self.seeds)


def _is_correct(logits: Tensor, batch: CleanBatch) -> Tensor:
    return ops.cast(ops.logical_not(misclassified(logits, batch.y)), "float32")


def per_sample(loss_fn: LossFn) -> LossFn:
    """Return a function of logits that also takes those of several predictions per sample, `(batch, ..., C)`.

    It then calls the given function with one row per prediction, and returns the mean over those of each sample.
    """

    def mean(logits: Tensor, batch: CleanBatch) -> Tensor:
        if len(logits.shape) == 2:
            return loss_fn(logits, batch)
        if getattr(loss_fn, "takes_positions", False):
            values = loss_fn(logits, batch)
            return values if len(values.shape) == 1 else mean_of_sample(values, batch.y >= 0)
        rows = batch._replace(y=ops.reshape(ops.maximum(batch.y, 0), (-1,)), logits=to_rows(batch.logits))
        return mean_of_sample(loss_fn(to_rows(logits), rows), batch.y >= 0)

    return mean


def to_rows(values: Tensor) -> Tensor:
    """Return values of several predictions per sample, `(batch, ..., C)`, with one row per prediction."""
    return ops.reshape(values, (-1, values.shape[-1]))


def mean_of_sample(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of one value per prediction over those of each sample, shape `(batch,)`.

    Args:
        values: One value for each prediction of all samples.
        weights: How much each prediction counts, or whether it does, shape `(batch, predictions)`.
    """
    values = ops.reshape(values, (-1, weights.shape[1]))
    weights = ops.cast(weights, values.dtype)
    return ops.sum(ops.where(weights > 0, values * weights, 0.0), axis=1) / ops.maximum(ops.sum(weights, axis=1), 1e-7)


def as_class_ids(y: Tensor, logits: Tensor, ignore_class: int | None = None) -> Tensor:
    """Return labels of any form as class ids, int32, shape `(batch,)`, or `(batch, predictions)`.

    Args:
        y: Class ids or one-hot labels of each prediction.
        logits: The logits of the batch, shape `(batch, C)`, or `(batch, predictions, C)`.
        ignore_class: The class id of predictions that do not count, beside negative ids, for several predictions. Both
            become -1.
    """
    if len(logits.shape) == 3:
        predictions, num_classes = logits.shape[1:]
        if math.prod(y.shape[1:]) == predictions * num_classes:
            y = ops.argmax(ops.reshape(y, (-1, predictions, num_classes)), axis=-1)
        ids = ops.cast(ops.reshape(y, (-1, predictions)), "int32")
        ignored = ids < 0 if ignore_class is None else ops.logical_or(ids < 0, ids == ignore_class)
        return ops.where(ignored, -1, ids)
    if len(y.shape) == len(logits.shape):
        y = ops.argmax(y, axis=-1) if y.shape[-1] == logits.shape[-1] else ops.squeeze(y, axis=-1)
    return ops.cast(y, "int32")
