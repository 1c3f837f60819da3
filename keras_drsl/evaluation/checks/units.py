"""A check of the units of `eps`."""

import math

import numpy as np

from keras_drsl.attacks import PGD
from keras_drsl.evaluation.checks.registry import Outcome, check
from keras_drsl.evaluation.context import EvaluationContext
from keras_drsl.evaluation.results import CLEAN
from keras_drsl.threat import describe_radius


@check(suites=None)
def units(context: EvaluationContext) -> Outcome:
    """Check that `eps` has the units of the inputs: that it is not far too small."""
    threat = context.threat
    grey_levels = 255 * float((threat.radius * threat.scale / np.asarray(threat.span)).max())
    eps = describe_radius(threat.to_dict() | {"mask": None})
    if grey_levels < 0.5:
        message = f"{eps} is below half a grey level of 8-bit images: it must be in the units of the inputs"
        return Outcome("warn", grey_levels, message)
    if all(name == CLEAN for name in context.broken_by):
        return Outcome("skipped", math.nan, "no image is classified correctly")
    has_fallen = any(name not in (None, CLEAN) for name in context.broken_by)
    if context.wrong:
        has_fallen = bool((list(context.wrong.values())[-1] > context.wrong[CLEAN]).any())
    if has_fallen:
        return Outcome("pass", grey_levels, f"{eps}, in grey levels of 8-bit images; some images fall at it")
    larger = min(2 * threat.radius, context.largest_eps)
    robust = context.robust
    withstood = robust.withstood(context.make_attack(PGD, eps=larger, loss="margin", steps=20))
    if (withstood >= robust.robust_share).all():
        message = f"no image falls at {eps} or at twice that: it must be in the units of the inputs"
        return Outcome("warn", grey_levels, message)
    return Outcome("pass", grey_levels, f"{eps}, in grey levels of 8-bit images; some images fall at twice that")
