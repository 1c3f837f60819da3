"""Checks for gradient masking: gradients that exist, point somewhere, and lead further with more effort."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from keras import ops

from keras_drsl._typing import Array, Tensor
from keras_drsl.attacks import APGD, FGSM, PGD
from keras_drsl.attacks.gradients import input_gradient
from keras_drsl.attacks.objectives import LOSSES, objective
from keras_drsl.evaluation.checks.registry import Outcome, check, grade
from keras_drsl.evaluation.context import EvaluationContext
from keras_drsl.models.classifier import Classifier

NO_CORRECT_IMAGE = Outcome("skipped", math.nan, "no image is classified correctly")


@check(suites=None, stage="before")
def gradients(context: EvaluationContext) -> Outcome:
    """Check that the losses of the attacks have gradients."""
    context = context.correct
    if len(context.x) == 0:
        return NO_CORRECT_IMAGE
    noise = _noise(context)
    vanished = {loss: _share_without_gradient(context, loss, noise) for loss in LOSSES}
    text = ", ".join(f"{loss} {share:.0%}" for loss, share in vanished.items())
    if vanished["margin"] > 0.01:
        message = f"inputs without a gradient ({text}): gradient attacks do not work there"
        if context.model.outputs == "probabilities":
            message += "; the probabilities are saturated: give a model that returns logits"
        return Outcome(grade(vanished["margin"], warn_above=0.01, fail_above=0.1), vanished["margin"], message)
    if max(vanished.values()) > 0.05:
        message = f"inputs without a gradient ({text}): only attacks on the margin work there"
        return Outcome("warn", vanished["margin"], message)
    return Outcome("pass", vanished["margin"], f"inputs without a gradient: {text}")


def _share_without_gradient(context: EvaluationContext, loss: str, noise: Array) -> float:
    largest = _in_batches(context, context.model.classifier.compile(_largest_gradient, loss=loss), context.y)
    return float((~(largest > noise)).mean())  # NaN counts as no gradient


def _noise(context: EvaluationContext) -> Array:
    """Return the largest gradient of each example that rounding can explain.

    Probabilities sum to 1, so the gradient of their sum is 0 but for rounding. Where the softmax is saturated, that of
    the attacks' losses is no larger, and its direction means nothing. Logits have no such sum.
    """
    if context.model.outputs != "probabilities":
        return np.zeros(len(context.x), "float32")
    return 10 * _in_batches(context, context.model.model.compile(_largest_gradient_of_sum))


def _in_batches(context: EvaluationContext, program: Callable[..., Tensor], *arrays: Array) -> Array:
    parts = [slice(start, start + context.batch_size) for start in range(0, len(context.x), context.batch_size)]
    return np.concatenate(
        [ops.convert_to_numpy(program(context.x[part], *(array[part] for array in arrays))) for part in parts]
    )


def _largest_gradient_of_sum(classifier: Classifier, x: Tensor) -> Tensor:
    """Return the largest element of the gradient of the sum of each row's outputs."""
    gradient = input_gradient(classifier, _sum_of_row, x)[2]
    return ops.max(ops.abs(gradient), axis=tuple(range(1, len(gradient.shape))))


def _sum_of_row(outputs: Tensor) -> Tensor:
    return ops.sum(outputs, axis=tuple(range(1, len(outputs.shape))))


def _largest_gradient(classifier: Classifier, x: Tensor, y: Tensor, *, loss: str) -> Tensor:
    """Return the largest element of the gradient of each row, NaN where any element is NaN."""
    _, _, gradient = input_gradient(classifier, lambda logits: objective(loss, logits, y, None, targeted=False), x)
    axes = tuple(range(1, len(gradient.shape)))
    # A maximum may ignore NaN; a sum does not.
    return ops.max(ops.abs(gradient), axis=axes) + 0.0 * ops.sum(gradient, axis=axes)


@check(suites=["fast", "standard"])
def many_steps_beat_one(context: EvaluationContext) -> Outcome:
    """Check that many small steps break at least as many images as one large step."""
    context = context.correct
    if len(context.x) == 0:
        return NO_CORRECT_IMAGE
    # The mean cross-entropy of positions says little about how many are wrong.
    loss = "margin" if context.wrong else "ce"
    attacks = [context.make_attack(FGSM, loss=loss), context.make_attack(PGD, loss=loss, steps=20)]
    one_step, many_steps = (context.withstood(attack) for attack in attacks)
    gain = float(np.average(one_step - many_steps, weights=context.num_predictions))
    # How many positions fall also depends on the random start.
    slack = 2 * float(np.std(one_step - many_steps)) / math.sqrt(len(one_step)) if context.wrong else 0.0
    status = grade(-gain - slack, warn_above=0.005, fail_above=0.02)
    message = "share of images that PGD breaks beyond FGSM; if it is negative, the gradient is unreliable"
    return Outcome(status, gain, message)


@check(suites=["fast", "standard"])
def losses_agree(context: EvaluationContext) -> Outcome:
    """Check that attacks on different losses break about equally many images."""
    context = context.correct
    if len(context.x) == 0:
        return NO_CORRECT_IMAGE
    reached = {loss: context.accuracy_under(context.make_attack(PGD, loss=loss, steps=20)) for loss in LOSSES}
    gap = max(reached.values()) - min(reached.values())
    text = ", ".join(f"{loss} {value:.1%}" for loss, value in reached.items())
    message = f"accuracy after PGD-20 on {len(context.x)} images: {text}"
    if gap > 0.05 + 1e-9:
        return Outcome("warn", gap, message + "; attacks on the weaker losses overstate the robustness")
    return Outcome("pass", gap, message)


@check(suites=["fast", "standard"])
def larger_eps(context: EvaluationContext) -> Outcome:
    """Check that a larger ball does not leave more images robust."""
    context = context.correct
    if len(context.x) == 0:
        return NO_CORRECT_IMAGE
    radii = sorted({min(factor * context.threat.radius, context.largest_eps) for factor in (0.5, 1, 2)})
    attacks = [context.make_attack(PGD, eps=eps, loss="margin", steps=20) for eps in radii]
    reached = [context.accuracy_under(attack) for attack in attacks]
    rise = max((later - sooner for sooner, later in pairwise(reached)), default=0.0)
    status = grade(rise, warn_above=0.005, fail_above=0.02)
    text = ", ".join(f"{accuracy:.1%} at {eps:.3g}" for eps, accuracy in zip(radii, reached, strict=True))
    return Outcome(status, rise, f"largest rise of the accuracy with eps under PGD-20: {text}")


@check(suites=["fast", "standard"])
def unbounded(context: EvaluationContext) -> Outcome:
    """Check that an attack without bounds breaks every image."""
    context = context.correct
    if len(context.x) == 0:
        return NO_CORRECT_IMAGE
    # The strongest kinds of the suite: far from the data, either loss can be flat where the other one is not.
    withstood = np.ones(len(context.x))
    for loss in ("margin", "dlr"):
        attack = context.make_attack(APGD, eps=context.largest_eps, loss=loss, targeted=True, targets=3)
        robust = withstood > 0
        withstood[robust] = np.minimum(withstood[robust], context.select(robust).withstood(attack))
    left = float(np.average(withstood, weights=context.num_predictions))
    status = grade(left, warn_above=0.0, fail_above=0.02)
    message = "accuracy when any valid input is allowed; above 0, the attack cannot follow the gradient"
    if left and context.y.ndim == 1:
        classes, counts = np.unique(context.y[withstood > 0], return_counts=True)
        listed = ", ".join(
            f"{class_id} ({count} of {(context.y == class_id).sum()})"
            for class_id, count in zip(classes, counts, strict=True)
        )
        message += f". Classes of the images that are left: {listed}"
    if left and context.is_partly_fixed:
        return Outcome("warn", left, message + ". Or what may not change is enough to tell the classes")
    return Outcome(status, left, message)
