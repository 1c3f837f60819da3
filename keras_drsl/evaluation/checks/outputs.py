"""Checks of the outputs of the model on clean inputs."""

import math

import numpy as np
from keras import ops

from keras_drsl._intervals import wilson
from keras_drsl._typing import Array
from keras_drsl.evaluation.checks.registry import Outcome, check, grade
from keras_drsl.evaluation.context import MAX_EXAMPLES, EvaluationContext
from keras_drsl.evaluation.results import CLEAN
from keras_drsl.models.classifier import Classifier, compute_rounding, is_misclassified, margins

ROWS_AT_ONCE = 32  # in a call outside a program


@check(suites=None, stage="before")
def clean_accuracy(context: EvaluationContext) -> Outcome:
    """Check that the model knows its task, and numbers the classes as the labels do."""
    logits, y = context.predictions
    correct = len(y) - (int(context.wrong[CLEAN].sum()) if context.wrong else context.broken_by.count(CLEAN))
    share = correct / len(y)
    moved = _moved_classes(logits.argmax(axis=1), y)
    if moved:
        # A model may have more classes than a folder names.
        names = dict(enumerate(context.class_names or ()))
        pairs = [[names.get(number, str(number)) for number in pair] for pair in list(moved.items())[:3]]
        shown = ", ".join(f"{label} as {answer}" for label, answer in pairs)
        message = f"share classified correctly; the classes of the labels seem to be in another order: {shown}"
        message += ", ..." if len(moved) > 3 else ""
        return Outcome("warn", share, message + _missing_classes(context))
    commonest = float(np.bincount(y).max() / len(y))
    # Positions of one example resemble each other: their number says less than that of examples.
    low = share if context.wrong else wilson(correct, len(y))[0]
    if low <= commonest:
        # A model that always predicts the commonest class could do as well.
        message = "share classified correctly, no better than always predicting one class: check labels and input range"
        return Outcome("warn", share, message + _rescaling_hint(context) + _missing_classes(context))
    return Outcome("pass", share, "share classified correctly without an attack")


def _missing_classes(context: EvaluationContext) -> str:
    """Return what to do about a folder that lacks classes of the model, whose ids depend on all names."""
    count, names = context.logits.shape[-1], context.class_names
    if names is None or len(names) == count:
        return ""
    return f"; {len(names)} sub-folders for {count} classes: add an empty one for each class without images"


def _rescaling_hint(context: EvaluationContext) -> str:
    """Return what a model needs that was trained on smaller values than images of 8 bits have."""
    if np.max(context.threat.clip_max) < 128:
        return ""
    return "; a model trained on inputs in [0, 1] needs preprocessing=keras.layers.Rescaling(1 / 255)"


def _moved_classes(predictions: Array, y: Array) -> dict[int, int]:
    """Return which class is predicted for each class that has another place in the model, empty if there is no order.

    There is one if the commonest predictions of all classes differ. A class counts as moved if it has five examples or
    more, its commonest prediction is another class and holds for more than half of them, and fewer than a tenth are
    right.
    """
    commonest, moved = [], {}
    for label in np.unique(y):
        counts = np.bincount(predictions[y == label], minlength=label + 1) / (y == label).sum()
        commonest.append(int(counts.argmax()))
        if commonest[-1] != label:
            if counts.max() <= 0.5 or counts[label] >= 0.1 or (y == label).sum() < 5:
                return {}
            moved[int(label)] = commonest[-1]
    return moved if len(moved) > 1 and len(set(commonest)) == len(commonest) else {}


@check(suites=None, stage="before")
def outputs(context: EvaluationContext) -> Outcome:
    """Check that the attacks follow logits, and that these give the predictions of the model."""
    kind, logits = context.model.outputs, context.logits
    if kind == "probabilities":
        message = "no logits were found behind the probabilities of the model; their logarithms are less exact near 1"
        return Outcome("warn", math.nan, message)
    if logits.min() >= 0 and logits.max() <= 1:
        message = "all outputs lie in [0, 1]; after a sigmoid, gradients vanish where the model is confident"
        if not np.allclose(logits.sum(axis=-1), 1, atol=0.01):
            message += '. For a model with a sigmoid per label, give task="multilabel"'
        return Outcome("warn", float(logits.max()), message)
    largest = float(np.abs(logits).max())
    if kind == "softmax" and _predict_otherwise(context):
        return Outcome("fail", largest, "the logits found behind the softmax do not always give the same prediction")
    found = {"logits": "the model returns logits", "softmax": "logits were found behind the softmax of the model"}
    return Outcome("pass", largest, found[kind] + "; the largest one")


def _predict_otherwise(context: EvaluationContext) -> bool:
    """Return whether the logits behind a softmax have another largest class than the outputs, beyond rounding."""
    outputs = context.model.model.logits_in_batches(context.x, context.batch_size)
    chosen = np.take_along_axis(outputs, context.logits.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    # Logits that differ may give probabilities that are equal when they are rounded.
    return bool(np.any(chosen < outputs.max(axis=-1) * (1 - 4 * compute_rounding(context.model.model))))


def _towards_middle(context: EvaluationContext, x: Array) -> Array:
    """Return inputs whose features, where they may change, are half as far from the middle of the valid range."""
    threat = context.threat
    middle = (np.asarray(threat.clip_min) + np.asarray(threat.clip_max)) / 2
    return np.where(threat.scale > 0, (x + middle) / 2, x).astype("float32")


@check(suites=None, stage="before")
def deterministic(context: EvaluationContext) -> Outcome:
    """Check that the model gives equal answers to equal inputs, whatever it was asked before."""
    if context.model.expectation_draws > 1:
        return _stable_predictions(context)
    classifiers = dict.fromkeys([context.model.classifier, context.model.model])
    change, allowed = max(
        (_change(context, classifier) for classifier in classifiers), key=lambda pair: pair[0] / pair[1]
    )
    if change <= allowed:
        return Outcome("pass", change, "two passes over the same inputs agree")
    message = (
        "the model is random or keeps a state from call to call: give expectation_draws=20 to attack its average, or "
        "the model without a state"
    )
    return Outcome("fail", change, message)


def _stable_predictions(context: EvaluationContext) -> Outcome:
    """Check that two averages of a random model give nearly always the same prediction."""
    x, draws = context.x[:MAX_EXAMPLES], context.model.expectation_draws
    model = context.model.model
    if np.array_equal(model.logits(x[:ROWS_AT_ONCE]), model.logits(x[:ROWS_AT_ONCE])) and _is_random(context):
        message = "compiled, the model always draws the same numbers: use `keras.random` with a seed generator"
        return Outcome("fail", 0.0, message)
    # Not as a compiled program, for the same reason.
    parts = [ops.convert_to_tensor(x[start : start + ROWS_AT_ONCE]) for start in range(0, len(x), ROWS_AT_ONCE)]
    first, second = (
        np.concatenate([ops.convert_to_numpy(model(part)) for part in parts]).argmax(axis=-1) for _ in range(2)
    )
    share = float((first != second).mean())
    message = f"share of predictions that differ between two averages of {draws} draws"
    status = grade(share, warn_above=0.01, fail_above=0.05)
    return Outcome(status, share, message if status == "pass" else message + ": average over more")


def _change(context: EvaluationContext, classifier: Classifier) -> tuple[float, float]:
    """Return how much answers to equal inputs differ, and how much they may."""
    change, largest = 0.0, 1.0
    # In parts, as outside a program all intermediate values are kept while the logits are looked for.
    for start in range(0, min(MAX_EXAMPLES, len(context.x)), ROWS_AT_ONCE):
        x = context.x[start : start + ROWS_AT_ONCE]
        # Not as a compiled program, which may keep random numbers or a state from when it was compiled.
        # Twice the same, and then after another call: a state may alternate.
        first, *later = (
            ops.convert_to_numpy(classifier(ops.convert_to_tensor(inputs)))
            for inputs in (x, x, _towards_middle(context, x), x)
        )
        change = max(change, *(float(np.abs(first - again).max()) for again in (later[0], later[2])))
        largest = max(largest, float(np.abs(first).max()))
    return change, 1e-4 * largest


def _is_random(context: EvaluationContext) -> bool:
    """Return whether probabilities are averaged, and two averages differ."""
    if context.model.expectation_draws == 1:
        return False
    change, allowed = _change(context, context.model.model)
    return change > allowed


@check(suites=None, stage="before")
def independent_rows(context: EvaluationContext) -> Outcome:
    """Check that the answer for an input does not depend on the other inputs of its batch."""
    if _is_random(context):
        return Outcome("skipped", math.nan, "the answers are random, so a dependence on other inputs would not show")
    # Logarithms of probabilities near 0 would magnify their rounding.
    classifier = context.model.model if context.model.outputs == "probabilities" else context.model.classifier
    count = min(len(context.x), MAX_EXAMPLES // 2, max(context.batch_size // 2, 4))
    # Inputs that reach the limits of the range alone would hide a dependence on the largest value of the batch.
    x = np.concatenate([context.x[:count], _towards_middle(context, context.x[:count])])
    expected = classifier.logits(x)
    reverse_half = np.arange((len(x) + 1) // 2)[::-1]
    answers = [(reverse_half, classifier.logits(x[reverse_half]))]
    alone = np.unique(np.linspace(0, len(x) - 1, 8).astype(int))
    answers += [(alone[[index]], classifier.logits(x[[row]])) for index, row in enumerate(alone)]
    changes = np.concatenate([np.abs(expected[rows] - answer).ravel() for rows, answer in answers])
    spread = float((expected.max(axis=-1) - expected.min(axis=-1)).max())
    # Sums are rounded differently in batches of other sizes, and accelerators round products to 11 bits.
    unit = compute_rounding(context.model.model)
    allowed = max(2e-3, 4 * unit) * spread + 4 * unit * float(np.abs(expected).max())
    change = float(changes.max())
    if change <= allowed:
        return Outcome("pass", change, "answers for single inputs and for batches agree; the largest difference")
    message = (
        "the answer for an input depends on the other inputs of its batch, so no accuracy is that of the model: look "
        "for batch statistics at inference, such as `training=True`, and for operations across the first axis"
    )
    return Outcome("fail", change, message)


@check(suites=None, stage="before")
def logit_scale(context: EvaluationContext) -> Outcome:
    """Check that the softmax is not saturated in float32."""
    logits, y = context.predictions
    correct = ~is_misclassified(logits, y)
    if not correct.any():
        return Outcome("skipped", math.nan, "no image is classified correctly")
    gap = -margins(logits, y)[correct]
    # From a gap of about 17 on, 1 - p is 0 in float32, and so is the gradient of the cross-entropy.
    saturated = float((gap > 17).mean())
    message = f"median gap between the two largest logits; softmax saturated on {saturated:.0%} of the images"
    if saturated > 0.1:
        message += ": attacks on the cross-entropy are too weak here" + _rescaling_hint(context)
        return Outcome("warn", float(np.median(gap)), message)
    return Outcome("pass", float(np.median(gap)), message)


def _has_few_classes(context: EvaluationContext) -> bool:
    on_dlr = any(getattr(attack, "loss", None) == "dlr" for attack in context.attacks.values())
    return context.logits.shape[-1] < 4 and on_dlr


@check(suites=None, stage="before", applies=_has_few_classes)
def few_classes(context: EvaluationContext) -> Outcome:
    """Report that attacks on the difference of logits ratio attacked the margin."""
    message = "the difference of logits ratio needs four classes: attacks on it used the margin instead"
    return Outcome("pass", float(context.logits.shape[-1]), message)
