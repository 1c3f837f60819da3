"""Checks of the attacks themselves."""

import math

import numpy as np
from keras import ops

from keras_drsl._typing import Array, Tensor
from keras_drsl.attacks import APGD
from keras_drsl.evaluation.checks.registry import Outcome, check
from keras_drsl.evaluation.context import EvaluationContext
from keras_drsl.models.classifier import Classifier, is_misclassified
from keras_drsl.threat import DUAL, ThreatModel, lengths


@check(suites=["quick", "cleverhans", "fast", "standard"])
def perturbations(context: EvaluationContext) -> Outcome:
    """Check that the attacks stayed within the threat model."""
    share = context.audit.largest / context.threat.radius
    if context.audit.outside:
        return Outcome("fail", share, "an attack left the ball or the valid range: such images did not count as broken")
    return Outcome("pass", share, "largest perturbation in units of eps; all lie in the ball and in the valid range")


@check(suites=["fast", "standard"])
def attack_self_test(context: EvaluationContext) -> Outcome:
    """Check that the attack breaks a linear model whose worst perturbations are known."""
    low, high = float(np.min(context.threat.clip_min)), float(np.max(context.threat.clip_max))
    threat = ThreatModel(min(context.threat.radius, (high - low) / 4), context.threat.norm, low, high)
    weights, x, y = breakable_model(context.x.shape[1:], threat, context.seed)

    def linear(x: Tensor) -> Tensor:
        return ops.matmul(ops.reshape(x, (-1, len(weights))) - (low + high) / 2, weights)

    classifier = Classifier(linear)
    attack = APGD(threat=threat, seed=context.seed, loss="margin", targeted=True)
    left = float((~is_misclassified(classifier.logits(attack(classifier, x, y)), y)).mean())
    message = "accuracy of a linear model on points that are known to fall at 90 % of eps"
    return Outcome("pass" if left == 0 else "fail", left, message)


def breakable_model(shape: tuple[int, ...], threat: ThreatModel, seed: int) -> tuple[Array, Array, Array]:
    """Return a linear model of three classes with inputs that it is known to lose within `eps`.

    The model is centred in the valid range. The smallest perturbation that breaks an input has 90 % of the size `eps`,
    or less where the range has no room for such an input.

    Args:
        shape: The shape of an input.
        threat: The threat model.
        seed: The seed of the model and the inputs.

    Returns:
        Weights `(features, 3)`, inputs `(32, *shape)`, class ids `(32,)`.
    """
    generator = np.random.default_rng(seed)
    features = math.prod(shape)
    weights = generator.standard_normal((features, 3))
    offsets = generator.uniform(-1, 1, (32, features))
    offsets /= np.abs(offsets).max(axis=1, keepdims=True)
    y = (offsets @ weights).argmax(axis=1)
    needed = np.full(32, np.inf)
    for other in range(3):
        # The distance to the boundary with another class is the margin over the dual norm of its gradient.
        gradient = (weights[:, y] - weights[:, [other]]).T
        dual_norm = lengths(np.abs(gradient), DUAL[threat.norm])
        with np.errstate(invalid="ignore"):
            distance = (offsets * gradient).sum(axis=1) / dual_norm
        needed = np.where(y == other, needed, np.minimum(needed, distance))
    room = threat.span / 2 - threat.eps
    scale = np.minimum(0.9 * threat.eps / np.maximum(needed, 1e-12), room)
    x = (threat.clip_min + threat.clip_max) / 2 + offsets * scale[:, None]
    return weights.astype("float32"), x.reshape(32, *shape).astype("float32"), y.astype("int32")
