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
    """Check that `eps` and the range have the units of the inputs: that neither is far too small or too large."""
    threat = context.threat
    grey_levels = 255 * float((threat.radius * threat.scale / np.asarray(threat.span)).max())
    eps = describe_radius(threat.to_dict() | {"mask": None})
    if grey_levels < 0.5:
        message = f"{eps} is below half a grey level of 8-bit images: it must be in the units of the inputs"
        return Outcome("warn", grey_levels, message)
    used = _used_share(context)
    if used < 0.02:
        message = f"the inputs take up {used:.1%} of the valid range: {eps} must be in the units of the inputs"
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
        message = (
            f"no image falls at {eps} or at twice that: either all of them withstand that much, or eps is too small "
            "for the units of the inputs"
        )
        return Outcome("warn", grey_levels, message)
    return Outcome("pass", grey_levels, f"{eps}, in grey levels of 8-bit images; some images fall at twice that")


def _used_share(context: EvaluationContext) -> float:
    """Return which share of the valid range lies between the smallest and the largest value of the inputs."""
    threat = context.threat
    may_change = np.broadcast_to(threat.scale > 0, context.x.shape[1:])
    smallest, largest = math.inf, -math.inf
    for start in range(0, len(context.x), 1024):  # no second copy of a large data set
        x = context.x[start : start + 1024]
        places = ((x - np.asarray(threat.clip_min)) / np.asarray(threat.span))[:, may_change]
        smallest, largest = min(smallest, float(places.min())), max(largest, float(places.max()))
    return largest - smallest
