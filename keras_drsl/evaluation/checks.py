"""Reasons to believe a robust accuracy, or not to: what a careful reader would try next.

Each check returns its outcome, a figure, and one sentence. Those that attack within the threat model also say which
examples they broke: these count as broken from then on.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_drsl.attacks import APGD, FGSM, PGD, Attack, Classifier, Noise, Square, Transfer, balls
from keras_drsl.attacks.classifier import is_wrong, margins
from keras_drsl.attacks.gradient import slope
from keras_drsl.attacks.objectives import LOSSES, objective
from keras_drsl.evaluation.head import Head
from keras_drsl.evaluation.report import Check, wilson

IMAGES = 200  # how many examples a check looks at

# Attacks that see no gradient of the model.
BLACK_BOX = (Square, Noise, Transfer)


class Case(NamedTuple):
    """What the checks are about.

    Attributes:
        head: the model under evaluation and its logits.
        x: inputs, shape `(count, ...)`.
        y: class ids, shape `(count,)`.
        ids: the place of each example in the data set.
        logits: of the clean inputs, shape `(count, C)`.
        broken_by: for each example the attack that broke it, or None.
        threat: `eps`, `norm`, `clip_min`, `clip_max`.
        seed: of the evaluation.
        batch_size: how many examples to work on at once.
        audit: what was seen of the attacks' results: the largest `size` of a perturbation, how many were `outside`.
        attacks: those that run, by name.
        twin: a second model without a defence and its logits, or None.
    """

    head: Head
    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    broken_by: list[str | None]
    threat: dict[str, Any]
    seed: int
    batch_size: int
    audit: dict[str, float]
    attacks: dict[str, Attack]
    twin: Head | None

    @property
    def black_box(self) -> list[str]:
        """Names of the attacks without gradients."""
        return [name for name, attack in self.attacks.items() if isinstance(attack, BLACK_BOX)]

    def some(self, which: np.ndarray) -> "Case":
        """The first `IMAGES` of the examples that a condition holds for."""
        kept = np.flatnonzero(which)[:IMAGES]
        return self._replace(
            x=self.x[kept],
            y=self.y[kept],
            ids=self.ids[kept],
            logits=self.logits[kept],
            broken_by=[self.broken_by[place] for place in kept],
        )

    @property
    def correct(self) -> "Case":
        """Examples that need an attack to be misclassified."""
        return self.some(~is_wrong(self.logits, self.y))

    @property
    def standing(self) -> "Case":
        """Examples that withstood everything so far."""
        return self.some(np.array([one is None for one in self.broken_by]))

    def withstand(self, attack: Attack, head: Head | None = None) -> np.ndarray:
        """Which examples an attack does not break, shape `(count,)`; the attack's own ball counts."""
        head, threat = head or self.head, {name: getattr(attack, name) for name in self.threat}
        withstood = [np.zeros(0, bool)]
        for start in range(0, len(self.x), self.batch_size):
            part = slice(start, start + self.batch_size)
            x, y = self.x[part], self.y[part]
            x_adv = attack(head.classifier, x, y, ids=self.ids[part], batch_size=self.batch_size)
            withstood.append(~breaks(head, x_adv, x, y, threat, {}))
        return np.concatenate(withstood)

    def accuracy(self, attack: Attack, head: Head | None = None) -> float:
        """The share of examples that withstand an attack; 0 if there are none."""
        withstood = self.withstand(attack, head)
        return float(withstood.mean()) if len(withstood) else 0.0

    def attack(self, family: Callable, **knobs: Any) -> Attack:
        """An attack within the threat model, or of another `eps`."""
        attack = family(**self.threat | knobs)
        attack.seed = self.seed
        return attack


class Outcome(NamedTuple):
    """A check, and the examples it broke."""

    check: Check
    broken: list[int]


Rule = Callable[[Case], Outcome]


def outputs(case: Case) -> Outcome:
    """Whether what the attacks follow are logits, and the model's own."""
    if case.head.kind == "probabilities":
        meaning = "no logits were found behind the model's probabilities: their logarithms lose what is near 0 or 1"
        return _outcome("outputs", "warn", math.nan, meaning)
    if case.logits.min() >= 0 and case.logits.max() <= 1:
        meaning = "all outputs lie in [0, 1]: after a sigmoid, gradients vanish where the model is sure"
        return _outcome("outputs", "warn", float(case.logits.max()), meaning)
    found = {"logits": "the model returns logits", "softmax": "logits were found behind the model's softmax"}
    if np.any(is_wrong(case.logits, case.y) != case.head.is_wrong(case.x, case.y)):
        meaning = "the logits found behind the model's softmax do not always give its answer"
        return _outcome("outputs", "fail", float(np.abs(case.logits).max()), meaning)
    return _outcome("outputs", "pass", float(np.abs(case.logits).max()), found[case.head.kind] + "; the largest one")


def clean_accuracy(case: Case) -> Outcome:
    """Whether the model knows its task at all."""
    right = int((~is_wrong(case.logits, case.y)).sum())
    commonest = float(np.bincount(case.y).max() / len(case.y))
    # A model that always says the same could do as well.
    if wilson(right, len(case.y))[0] <= commonest:
        meaning = (
            "share classified correctly, no better than the commonest class: wrong labels, or inputs scaled wrongly?"
        )
        return _outcome("clean_accuracy", "warn", right / len(case.y), meaning)
    return _outcome("clean_accuracy", "pass", right / len(case.y), "share classified correctly without an attack")


def few_classes(case: Case) -> Outcome:
    """Says that attacks on the difference of logits ratio cannot be what they are called."""
    meaning = "the difference of logits ratio needs four classes: attacks on it followed the margin instead"
    return _outcome("few_classes", "pass", float(case.logits.shape[1]), meaning)


def deterministic(case: Case) -> Outcome:
    """Whether the model gives the same answer twice."""
    x = ops.convert_to_tensor(case.x[: min(IMAGES, case.batch_size)])
    # Not as a compiled program: on JAX that would draw the same random numbers each time.
    first, second = (ops.convert_to_numpy(case.head.classifier(x)) for _ in range(2))
    change = float(np.abs(first - second).max())
    same = change <= 1e-4 * max(1.0, float(np.abs(first).max()))
    meaning = "two passes over the same inputs agree" if same else "the model is random: attack its average instead"
    return _outcome("deterministic", "pass" if same else "fail", change, meaning)


def perturbations(case: Case) -> Outcome:
    """Whether the attacks stayed within the threat model."""
    ok = not case.audit.get("outside", 0)
    meaning = (
        "the largest perturbation, in units of eps, lies in the ball, and all values in the range"
        if ok
        else "an attack left the ball or the valid range: what it broke did not count"
    )
    return _outcome(
        "perturbations", "pass" if ok else "fail", case.audit.get("size", 0.0) / case.threat["eps"], meaning
    )


def gradients(case: Case) -> Outcome:
    """Whether the attacks' losses have gradients to follow."""
    case = case.correct
    if len(case.x) == 0:
        return _nothing("gradients")
    vanished = {}
    for loss in LOSSES:
        program = case.head.classifier.program(_largest_gradient, loss=loss)
        parts = [slice(start, start + case.batch_size) for start in range(0, len(case.x), case.batch_size)]
        rows = [{"x": case.x[part], "y": case.y[part], "target": case.y[part]} for part in parts]
        largest = np.concatenate([ops.convert_to_numpy(program(one)) for one in rows])
        vanished[loss] = float((~(largest > 0)).mean())  # NaN counts
    text = ", ".join(f"{loss} {share:.0%}" for loss, share in vanished.items())
    if vanished["margin"] > 0.01:
        status = "fail" if vanished["margin"] > 0.1 else "warn"
        meaning = f"inputs without a gradient ({text}): gradient attacks see nothing there"
    elif max(vanished.values()) > 0.05:
        status, meaning = "warn", f"inputs without a gradient ({text}): only the margin's attacks count there"
    else:
        status, meaning = "pass", f"inputs without a gradient: {text}"
    return _outcome("gradients", status, vanished["margin"], meaning)


def logit_scale(case: Case) -> Outcome:
    """Whether the softmax is saturated in float32."""
    correct = ~is_wrong(case.logits, case.y)
    if not correct.any():
        return _nothing("logit_scale")
    gap = -margins(case.logits, case.y)[correct]
    # From a gap of about 17 on, 1 - p is 0 in float32, and with it the cross-entropy's gradient on the true class.
    saturated = float((gap > 17).mean())
    meaning = f"median gap between the two largest logits; softmax saturated on {saturated:.0%}"
    if saturated > 0.1:
        return _outcome("logit_scale", "warn", float(np.median(gap)), meaning + ": believe no attack on cross-entropy")
    return _outcome("logit_scale", "pass", float(np.median(gap)), meaning)


def steps_beat_one(case: Case) -> Outcome:
    """Whether many steps find at least what a single one does."""
    case = case.correct
    single = case.accuracy(case.attack(FGSM))
    gain = single - case.accuracy(case.attack(PGD, steps=20))
    status = "pass" if gain >= -0.005 else "warn" if gain >= -0.02 else "fail"
    meaning = "share of images that PGD on the cross-entropy breaks beyond FGSM; negative: the gradient misleads"
    return _outcome("steps_beat_one", status, gain, meaning)


def losses_agree(case: Case) -> Outcome:
    """Whether attacks on different losses find the same."""
    case = case.correct
    reached = {loss: case.accuracy(case.attack(PGD, loss=loss, steps=20)) for loss in LOSSES}
    gap = max(reached.values()) - min(reached.values())
    text = ", ".join(f"{loss} {value:.1%}" for loss, value in reached.items())
    meaning = f"PGD-20 leaves {text} of {len(case.x)} images"
    if gap > 0.05 + 1e-9:
        return _outcome("losses_agree", "warn", gap, meaning + ": a weak choice of loss flatters this model")
    return _outcome("losses_agree", "pass", gap, meaning)


def budget(case: Case) -> Outcome:
    """Whether a larger ball breaks more."""
    case = case.correct
    largest = _largest_eps(case)
    radii = sorted({min(factor * case.threat["eps"], largest) for factor in (0.5, 1, 2)})
    reached = [case.accuracy(case.attack(PGD, eps=eps, loss="margin", steps=20)) for eps in radii]
    rise = max((later - sooner for sooner, later in pairwise(reached)), default=0.0)
    status = "pass" if rise <= 0.005 else "warn" if rise <= 0.02 else "fail"
    text = ", ".join(f"{accuracy:.1%} at {eps:.3g}" for eps, accuracy in zip(radii, reached, strict=True))
    return _outcome("budget", status, rise, f"largest rise of the accuracy with eps under PGD-20: {text}")


def unbounded(case: Case) -> Outcome:
    """Whether an attack without bounds breaks everything."""
    case = case.correct
    # Of the suite's strongest kind: a lone PGD stalls on models that the suite breaks.
    attack = case.attack(APGD, eps=_largest_eps(case), loss="margin", targeted=True, targets=3)
    left = case.accuracy(attack)
    status = "pass" if left == 0 else "warn" if left <= 0.02 else "fail"
    meaning = "accuracy left when any valid input is allowed; above 0, the attack cannot follow the gradient"
    return _outcome("unbounded", status, left, meaning)


def converged(case: Case) -> Outcome:
    """Whether more steps would have broken more."""
    attack = case.attack(APGD, loss="margin", targeted=True, targets=3, steps=200)
    return _more(case, "converged", attack, "twice the steps against the three likeliest rivals")


def restarts(case: Case) -> Outcome:
    """Whether more random starts would have broken more."""
    attack = case.attack(APGD, loss="margin", targeted=True, targets=3)
    attack.seed = case.seed + 1
    return _more(case, "restarts", attack, "other starts against the three likeliest rivals")


def noise(case: Case) -> Outcome:
    """Whether chance finds what the attacks did not."""
    return _more(case, "noise", case.attack(Noise, points=20), "20 random points of the ball")


def black_box(case: Case) -> Outcome:
    """Whether attacks without gradients break what those with gradients could not."""
    only = sum(one in case.black_box for one in case.broken_by) / len(case.broken_by)
    status = "pass" if only <= 0.005 else "warn" if only <= 0.02 else "fail"
    meaning = (
        f"share of all images that fell only to {' and '.join(case.black_box)}: gradient attacks should have found them"
    )
    return _outcome("black_box", status, only, meaning)


def control(case: Case) -> Outcome:
    """Whether the attacks break a linear model that is known to be breakable."""
    eps = min(case.threat["eps"], (case.threat["clip_max"] - case.threat["clip_min"]) / 4)
    weights, x, y = breakable(case.x.shape[1:], case.threat | {"eps": eps}, case.seed)

    def linear(x: Any) -> Any:
        centre = (case.threat["clip_min"] + case.threat["clip_max"]) / 2
        return ops.matmul(ops.reshape(x, (-1, len(weights))) - centre, weights)

    classifier = Classifier(linear)
    attack = case.attack(APGD, eps=eps, loss="margin", targeted=True)
    left = float((~is_wrong(classifier.logits(attack(classifier, x, y)), y)).mean())
    meaning = "accuracy left of a linear model on points known to fall at 90 % of eps"
    return _outcome("control", "pass" if left == 0 else "fail", left, meaning)


def twin(case: Case) -> Outcome:
    """Whether the attacks break a model without a defence."""
    assert case.twin is not None
    right = ~case.twin.is_wrong(case.x, case.y)
    if right.mean() < 0.5:
        meaning = "clean accuracy of the undefended model: too low to tell anything from its fall"
        return _outcome("twin", "warn", float(right.mean()), meaning)
    left = case.some(right).accuracy(case.attack(APGD, loss="margin"), case.twin)
    meaning = "accuracy left of the undefended model, of what it gets right; well above 0, eps is too small to tell"
    return _outcome("twin", "pass" if left <= 0.05 else "warn", left, meaning)


def transfer(case: Case) -> Outcome:
    """Whether attacks made on a model without a defence break more."""
    assert case.twin is not None
    attack = Transfer(case.twin.classifier, case.attack(APGD, loss="margin"))
    return _more(case, "transfer", attack, "attacks made on the undefended model")


# What needs no attack to be known, and what does.
BEFORE = (clean_accuracy, outputs, deterministic, gradients, logit_scale)
AFTER = {
    "quick": (perturbations, noise),
    "cleverhans": (perturbations, noise),
    "standard": (
        *(perturbations, steps_beat_one, losses_agree, budget, unbounded, converged, restarts, noise, control),
    ),
}


def choose(suite: str, case: Case) -> tuple[list[Rule], list[Rule]]:
    """The checks that apply, before and after the attacks, in the order they run."""
    before: list[Rule] = list(BEFORE)
    after: list[Rule] = list(AFTER[suite])
    on_dlr = any(getattr(attack, "loss", None) == "dlr" for attack in case.attacks.values())
    if case.logits.shape[1] < 4 and on_dlr:
        before.append(few_classes)
    if case.black_box and len(case.black_box) < len(case.attacks):
        after.append(black_box)
    if case.twin is not None:
        after += [twin, transfer]
    return before, after


def run(check: Rule, case: Case) -> Outcome:
    """The outcome of a check; one that ends in an error has failed, and loses nothing."""
    try:
        return check(case)
    except Exception as error:
        return _outcome(check.__name__, "fail", math.nan, f"the check itself failed: {type(error).__name__}: {error}")


def breaks(
    head: Head, x_adv: np.ndarray, x: np.ndarray, y: np.ndarray, threat: dict[str, Any], audit: dict[str, float]
) -> np.ndarray:
    """Which inputs an attack has broken: within the threat model, and misclassified by the model itself.

    Args:
        head: the model.
        x_adv: what the attack returned, shape `(batch, ...)`.
        x: the clean inputs.
        y: class ids, shape `(batch,)`.
        threat: `eps`, `norm`, `clip_min`, `clip_max`.
        audit: where to note what was seen.
    """
    slack = 1e-6 * (threat["clip_max"] - threat["clip_min"])
    axes = tuple(range(1, x.ndim))
    sizes = balls.size(x_adv.astype("float64") - x, threat["norm"])
    finite = np.isfinite(x_adv).all(axis=axes)
    with np.errstate(invalid="ignore"):
        within = (
            finite
            & (sizes <= threat["eps"] * (1 + 1e-5) + slack)
            & (x_adv.min(axis=axes) >= threat["clip_min"] - slack)
            & (x_adv.max(axis=axes) <= threat["clip_max"] + slack)
        )
    audit["size"] = max(audit.get("size", 0.0), float(sizes[finite].max(initial=0.0)))
    audit["outside"] = audit.get("outside", 0) + int((~within).sum())
    return within & head.is_wrong(x_adv, y)


def breakable(shape: tuple[int, ...], threat: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A linear model of three classes, centred in the range, and inputs and labels it is known to lose within `eps`.

    Returns:
        Weights `(features, 3)`, inputs `(32, *shape)`, class ids `(32,)`. The smallest perturbation that breaks an
        input has 90 % of the size `eps`, or less where the range has no room for such an input.
    """
    generator = np.random.default_rng(seed)
    features = math.prod(shape)
    weights = generator.standard_normal((features, 3))
    offsets = generator.uniform(-1, 1, (32, features))
    offsets /= np.abs(offsets).max(axis=1, keepdims=True)
    y = (offsets @ weights).argmax(axis=1)
    needed = np.full(32, np.inf)
    for rival in range(3):
        slope = (weights[:, y] - weights[:, [rival]]).T
        dual = np.abs(slope).sum(axis=1) if threat["norm"] == "inf" else np.sqrt((slope**2).sum(axis=1))
        with np.errstate(invalid="ignore"):
            distance = (offsets * slope).sum(axis=1) / dual
        needed = np.where(y == rival, needed, np.minimum(needed, distance))
    room = (threat["clip_max"] - threat["clip_min"]) / 2 - threat["eps"]
    scale = np.minimum(0.9 * threat["eps"] / np.maximum(needed, 1e-12), room)
    x = (threat["clip_min"] + threat["clip_max"]) / 2 + offsets * scale[:, None]
    return weights.astype("float32"), x.reshape(32, *shape).astype("float32"), y.astype("int32")


def _largest_gradient(classifier: Classifier, rows: dict, *, loss: str) -> Any:
    """The largest element of the gradient that an attack follows, one a row; NaN where any is."""

    def drive(logits: Any) -> Any:
        return objective(loss, logits, rows["y"], rows["target"], targeted=False)

    _, _, gradient = slope(classifier, drive, rows["x"])
    axes = tuple(range(1, len(gradient.shape)))
    # A maximum may pass over NaN; a sum does not.
    return ops.max(ops.abs(gradient), axis=axes) + 0.0 * ops.sum(gradient, axis=axes)


def _largest_eps(case: Case) -> float:
    """The radius of a ball that holds every valid input."""
    span = case.threat["clip_max"] - case.threat["clip_min"]
    return span if case.threat["norm"] == "inf" else span * math.sqrt(math.prod(case.x.shape[1:]))


def _more(case: Case, name: str, attack: Attack, what: str) -> Outcome:
    """A check that attacks what still stands."""
    standing = case.standing
    if len(standing.x) == 0:
        return Outcome(Check(name, "pass", 0.0, "nothing was left standing to try it on"), [])
    withstood = standing.withstand(attack)
    share = float(1 - withstood.mean())
    status = "pass" if share <= 0.01 + 1e-9 else "warn" if share <= 0.05 + 1e-9 else "fail"
    meaning = f"share of {len(withstood)} standing images that fall to {what}"
    return Outcome(Check(name, status, share, meaning), standing.ids[~withstood].tolist())


def _outcome(name: str, status: str, value: float, meaning: str) -> Outcome:
    return Outcome(Check(name, status, value, meaning), [])


def _nothing(name: str) -> Outcome:
    return _outcome(name, "pass", math.nan, "no image is classified correctly: nothing to look at")
