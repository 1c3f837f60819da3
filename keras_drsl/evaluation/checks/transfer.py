"""Checks whether attacks that do not use the model's gradient break images that gradient attacks did not."""

from keras_drsl.attacks import APGD, Transfer
from keras_drsl.evaluation.checks.registry import Outcome, check, grade
from keras_drsl.evaluation.checks.search import attack_robust_images
from keras_drsl.evaluation.context import EvaluationContext


def _has_both_kinds(context: EvaluationContext) -> bool:
    return 0 < len(context.gradient_free) < len(context.attacks)


def _has_undefended(context: EvaluationContext) -> bool:
    return context.undefended is not None


@check(suites=None, applies=_has_both_kinds)
def black_box(context: EvaluationContext) -> Outcome:
    """Check that attacks without gradients break no image that gradient attacks did not."""
    names = context.gradient_free
    only = sum(name in names for name in context.broken_by) / len(context.broken_by)
    if context.wrong:
        before = [name for name in context.wrong if name not in (*names, "checks")][-1]
        after = [name for name in context.wrong if name != "checks"][-1]
        only = float((context.wrong[after] - context.wrong[before]).sum() / context.num_predictions.sum())
    status = grade(only, warn_above=0.005, fail_above=0.02)
    units = "positions" if context.wrong else "images"
    message = f"share of all {units} that fell only to {' and '.join(names)}; gradient attacks should have broken them"
    return Outcome(status, only, message)


@check(suites=None, applies=_has_undefended)
def undefended(context: EvaluationContext) -> Outcome:
    """Check that the attack breaks a model without a defense."""
    model = context.undefended
    assert model is not None
    right = 1 - model.count_wrong(context.x, context.y, context.batch_size) / context.num_predictions
    correct = right > 0
    if right.mean() < 0.5:
        message = "clean accuracy of the undefended model; too low for the check"
        return Outcome("warn", float(right.mean()), message)
    left = context.select(correct).accuracy_under(context.make_attack(APGD, loss="margin"), model)
    message = (
        "robust accuracy of the undefended model on its correct images; if it is well above 0, eps is too small for "
        "this check"
    )
    return Outcome("pass" if left <= 0.05 else "warn", left, message)


@check(suites=None, applies=_has_undefended)
def transfer(context: EvaluationContext) -> Outcome:
    """Check that attacks made on a model without a defense break no more images."""
    assert context.undefended is not None
    attack = Transfer(context.undefended.classifier, context.make_attack(APGD, loss="margin"))
    return attack_robust_images(context, attack, "attacks made on the undefended model")
