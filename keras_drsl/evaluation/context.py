"""The context of a check: the model, the examples, and the findings of the attacks so far."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_drsl._data import content_keys
from keras_drsl._typing import Array
from keras_drsl.attacks import Attack
from keras_drsl.models.classifier import is_misclassified, num_predictions
from keras_drsl.models.logits import LogitsModel
from keras_drsl.threat import ThreatModel

MAX_EXAMPLES = 200  # how many examples a check looks at


class Audit(NamedTuple):
    """Record the perturbations that attacks returned.

    Attributes:
        largest: The size of the largest finite perturbation.
        outside: The number of perturbed inputs outside the threat model. Inputs with NaN count as outside.
    """

    largest: float = 0.0
    outside: int = 0

    def add(self, other: "Audit") -> "Audit":
        """Return the combined record of both."""
        return Audit(max(self.largest, other.largest), self.outside + other.outside)


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """Hold everything that a check receives. It cannot be changed.

    Attributes:
        model: The model under evaluation, `model.model`, and its logits, `model.classifier`.
        x: Inputs, float32, shape `(count, ...)`.
        y: Class ids, int32, shape `(count,)`; of a model of positions `(count, positions)`, -1 where one does not
            count.
        ids: The position of each example in the data set, shape `(count,)`.
        logits: The logits of the clean inputs, shape `(count, C)` or `(count, positions, C)`.
        broken_by: For each example the name of the attack that broke it so far, `"clean"` if it is misclassified
            without an attack, or None.
        threat: The threat model.
        seed: The seed of the evaluation.
        batch_size: How many examples to work on at once.
        attacks: The attacks of the evaluation, by name.
        undefended: A second model without a defense and its logits, or None.
        audit: A record of the perturbations that the attacks returned.
        class_names: The names of the classes by id, or None.
        are_8bit: Whether the inputs were given as 8-bit integers.
        wrong: For a model of positions: by attack, and under `"clean"`, how many positions of each example are wrong at
            the worst point so far, shape `(count,)`. Otherwise empty.
        is_partly_fixed: Whether a mask or an input that is not attacked keeps a part of what the model is given.
    """

    model: LogitsModel
    x: Array
    y: Array
    ids: Array
    logits: Array
    broken_by: tuple[str | None, ...]
    threat: ThreatModel
    seed: int
    batch_size: int
    attacks: Mapping[str, Attack]
    undefended: LogitsModel | None
    audit: Audit
    class_names: list[str] | None = None
    are_8bit: bool = False
    is_partly_fixed: bool = False
    wrong: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def gradient_free(self) -> list[str]:
        """The names of the attacks that need no gradient."""
        return [name for name, attack in self.attacks.items() if not attack.needs_gradient]

    @property
    def largest_eps(self) -> float:
        """The radius of a ball that holds every valid input."""
        return self.threat.largest_eps(self.x.shape[1:])

    def select(self, mask: Array) -> "EvaluationContext":
        """Return the context of at most 200 of the examples where a mask is True, the same ones in any order."""
        kept = np.flatnonzero(mask)
        if len(kept) > MAX_EXAMPLES:
            kept = np.sort(kept[np.argsort(content_keys(self.x[kept]), kind="stable")[:MAX_EXAMPLES]])
        broken_by = tuple(self.broken_by[index] for index in kept)
        arrays = {name: getattr(self, name)[kept] for name in ("x", "y", "ids", "logits")}
        wrong = {name: counts[kept] for name, counts in self.wrong.items()}
        return dataclasses.replace(self, **arrays, broken_by=broken_by, wrong=wrong)

    @property
    def num_predictions(self) -> Array:
        """How many predictions of each example count, shape `(count,)`: 1, or the number of positions."""
        return num_predictions(self.y)

    @property
    def predictions(self) -> tuple[Array, Array]:
        """The logits and class ids of all predictions that count, shapes `(predictions, C)` and `(predictions,)`."""
        counts = self.y >= 0
        return self.logits[counts], self.y[counts]

    @property
    def robust_share(self) -> Array:
        """The share of the predictions of each example that withstood everything so far, shape `(count,)`."""
        if self.wrong:
            return 1 - self.wrong[list(self.wrong)[-1]] / self.num_predictions
        return np.array([float(name is None) for name in self.broken_by])

    @property
    def correct(self) -> "EvaluationContext":
        """At most 200 examples that are classified correctly without an attack."""
        return self.select(~is_misclassified(self.logits, self.y))

    @property
    def robust(self) -> "EvaluationContext":
        """At most 200 examples that withstood everything so far."""
        return self.select(np.array([name is None for name in self.broken_by]))

    def make_attack(self, family: Callable[..., Attack], *, eps: float | None = None, **options: Any) -> Attack:
        """Make an attack with the seed and threat model of the evaluation; `eps` is another radius."""
        threat = self.threat if eps is None else self.threat.with_radius(eps)
        return family(threat=threat, **{"seed": self.seed} | options)

    def withstood(self, attack: Attack, model: LogitsModel | None = None) -> Array:
        """Return the share of the predictions of each example that an attack leaves right, shape `(count,)`.

        It is 0.0 or 1.0 except for a model of positions. A point outside the attack's own threat model does not count.

        Args:
            attack: The attack.
            model: The model that is attacked, by default the one under evaluation.
        """
        return self.attacked(attack, model)[0]

    def attacked(self, attack: Attack, model: LogitsModel | None = None) -> tuple[Array, Array]:
        """Return what `withstood` returns, and the points that the attack found, shape `(count, ...)`."""
        model = model or self.model
        parts, points = [np.zeros(0)], [self.x[:0]]
        for start in range(0, len(self.x), self.batch_size):
            part = slice(start, start + self.batch_size)
            x, y = self.x[part], self.y[part]
            x_adv = attack(model.classifier, x, y, batch_size=self.batch_size)
            wrong = breaks(model, x_adv, x, y, attack.threat)[0]
            parts.append(1 - wrong / num_predictions(y))
            points.append(x_adv)
        return np.concatenate(parts), np.concatenate(points)

    def accuracy_under(self, attack: Attack, model: LogitsModel | None = None) -> float:
        """Return the share of predictions that withstand an attack, 0 without examples; arguments as `withstood`."""
        withstood = self.withstood(attack, model)
        return float(np.average(withstood, weights=self.num_predictions)) if len(withstood) else 0.0


def breaks(model: LogitsModel, x_adv: Array, x: Array, y: Array, threat: ThreatModel) -> tuple[Array, Audit]:
    """Return how many predictions of each input an attack has made wrong, and a record of the perturbations.

    There is one prediction, or one for each position that counts. It is wrong if the perturbed input lies within the
    threat model and the model itself misclassifies it.

    Args:
        model: The model.
        x_adv: The inputs that the attack returned, shape `(batch, ...)`.
        x: The clean inputs.
        y: Class ids, shape `(batch,)` or `(batch, positions)`.
        threat: The threat model.
    """
    allowed = threat.contains(x_adv, x)
    sizes = threat.size(x_adv.astype("float64") - x)
    audit = Audit(float(sizes[np.isfinite(sizes)].max(initial=0.0)), int((~allowed).sum()))
    return allowed * model.count_wrong(x_adv, y, len(x_adv)), audit
