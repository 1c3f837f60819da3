"""Checks whether more effort breaks more images."""

import math

import numpy as np

from keras_drsl.attacks import APGD, Attack, Noise
from keras_drsl.evaluation.checks.registry import Outcome, check, grade
from keras_drsl.evaluation.context import EvaluationContext


def attack_robust_images(context: EvaluationContext, attack: Attack, description: str) -> Outcome:
    """Attack the images that are still robust, and report those that fall."""
    robust = context.robust
    if len(robust.x) == 0:
        return Outcome("skipped", math.nan, "no robust image was left to attack")
    withstood, x_adv = robust.attacked(attack)
    fallen = withstood < robust.robust_share
    lost = np.maximum(robust.robust_share - withstood, 0)
    share = float(np.average(lost, weights=robust.num_predictions))
    status = grade(share, warn_above=0.01 + 1e-9, fail_above=0.05 + 1e-9)
    message = f"share of {len(withstood)} robust images that fall to {description}"
    if robust.wrong:
        message = f"share of the positions of {len(withstood)} images that are robust and fall to {description}"
    wrong = np.rint((1 - withstood) * robust.num_predictions).astype(int)
    found = dict(zip(robust.ids[fallen].tolist(), wrong[fallen].tolist(), strict=True))
    points = dict(zip(found, x_adv[fallen], strict=True))
    return Outcome(status, share, message, list(found), found, points)


@check(suites=["fast", "standard"])
def converged(context: EvaluationContext) -> Outcome:
    """Check that more steps break no more images."""
    attack = context.make_attack(APGD, loss="margin", targeted=True, targets=3, steps=200)
    return attack_robust_images(context, attack, "twice the steps against the three largest non-true logits")


@check(suites=["fast", "standard"])
def restarts(context: EvaluationContext) -> Outcome:
    """Check that more random starts break no more images."""
    attack = context.make_attack(APGD, loss="margin", targeted=True, targets=3, seed=context.seed + 1)
    return attack_robust_images(context, attack, "other starts against the three largest non-true logits")


@check(suites=["quick", "cleverhans", "fast", "standard"])
def noise(context: EvaluationContext) -> Outcome:
    """Check that random points break no more images."""
    return attack_robust_images(context, context.make_attack(Noise, points=20), "20 random points of the ball")
