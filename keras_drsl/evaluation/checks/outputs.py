"""Checks of the outputs of the model on clean inputs."""

import math

import numpy as np
from keras import ops

from keras_drsl.evaluation.checks.registry import Outcome, check
from keras_drsl.evaluation.context import MAX_EXAMPLES, EvaluationContext
from keras_drsl.evaluation.intervals import wilson
from keras_drsl.models.classifier import is_misclassified, margins


@check(suites=None, stage="before")
def clean_accuracy(context: EvaluationContext) -> Outcome:
    """Check that the model knows its task."""
    correct = int((~is_misclassified(context.logits, context.y)).sum())
    share = correct / len(context.y)
    commonest = float(np.bincount(context.y).max() / len(context.y))
    if wilson(correct, len(context.y))[0] <= commonest:
        # A model that always predicts the commonest class could do as well.
        message = "share classified correctly, no better than always predicting one class: check labels and input range"
        return Outcome("warn", share, message)
    return Outcome("pass", share, "share classified correctly without an attack")


@check(suites=None, stage="before")
def outputs(context: EvaluationContext) -> Outcome:
    """Check that the attacks follow logits, and that these give the predictions of the model."""
    kind, logits = context.model.outputs, context.logits
    if kind == "probabilities":
        message = "no logits were found behind the probabilities of the model; their logarithms are less exact near 1"
        return Outcome("warn", math.nan, message)
    if logits.min() >= 0 and logits.max() <= 1:
        message = "all outputs lie in [0, 1]; after a sigmoid, gradients vanish where the model is confident"
        return Outcome("warn", float(logits.max()), message)
    largest = float(np.abs(logits).max())
    misclassified = context.model.misclassifies(context.x, context.y, context.batch_size)
    if np.any(is_misclassified(logits, context.y) != misclassified):
        return Outcome("fail", largest, "the logits found behind the softmax do not always give the same prediction")
    found = {"logits": "the model returns logits", "softmax": "logits were found behind the softmax of the model"}
    return Outcome("pass", largest, found[kind] + "; the largest one")


@check(suites=None, stage="before")
def deterministic(context: EvaluationContext) -> Outcome:
    """Check that the model gives equal answers to equal inputs."""
    x = ops.convert_to_tensor(context.x[: min(MAX_EXAMPLES, context.batch_size)])
    # Not as a compiled program: on JAX that would draw equal random numbers in each call.
    first, second = (ops.convert_to_numpy(context.model.classifier(x)) for _ in range(2))
    change = float(np.abs(first - second).max())
    if change <= 1e-4 * max(1.0, float(np.abs(first).max())):
        return Outcome("pass", change, "two passes over the same inputs agree")
    return Outcome("fail", change, "the model is random: attack its average instead")


@check(suites=None, stage="before")
def logit_scale(context: EvaluationContext) -> Outcome:
    """Check that the softmax is not saturated in float32."""
    correct = ~is_misclassified(context.logits, context.y)
    if not correct.any():
        return Outcome("skipped", math.nan, "no image is classified correctly")
    gap = -margins(context.logits, context.y)[correct]
    # From a gap of about 17 on, 1 - p is 0 in float32, and so is the gradient of the cross-entropy.
    saturated = float((gap > 17).mean())
    message = f"median gap between the two largest logits; softmax saturated on {saturated:.0%} of the images"
    if saturated > 0.1:
        message += ": attacks on the cross-entropy are too weak here"
        return Outcome("warn", float(np.median(gap)), message)
    return Outcome("pass", float(np.median(gap)), message)


def _has_few_classes(context: EvaluationContext) -> bool:
    on_dlr = any(getattr(attack, "loss", None) == "dlr" for attack in context.attacks.values())
    return context.logits.shape[1] < 4 and on_dlr


@check(suites=None, stage="before", applies=_has_few_classes)
def few_classes(context: EvaluationContext) -> Outcome:
    """Report that attacks on the difference of logits ratio attacked the margin."""
    message = "the difference of logits ratio needs four classes: attacks on it used the margin instead"
    return Outcome("pass", float(context.logits.shape[1]), message)
