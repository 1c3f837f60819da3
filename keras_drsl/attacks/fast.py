"""The attacks of suite "fast", which spend gradients and queries only where they may still change a verdict."""

from typing import Any

import numpy as np

from keras_drsl import _validation
from keras_drsl._typing import Array
from keras_drsl.attacks.apgd import APGD
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.attacks.gradients import rank_targets
from keras_drsl.attacks.square import Square
from keras_drsl.models.classifier import Classifier, is_misclassified, severity

TARGETS = 9
AHEAD = 1.1  # how much more than gradients a random search must raise the margin to go on
# The searches of `FastAPGD`: options of APGD. They were chosen on validation images of digits and MNIST.
STAGES: tuple[dict[str, Any], ...] = (
    {"loss": "margin", "steps": 20},
    {"loss": "ce", "steps": 50},
    {"loss": "margin", "targeted": True, "targets": TARGETS, "steps": 25},
    {"loss": "margin", "targeted": True, "targets": 3, "steps": 50},
    {"loss": "margin", "targeted": True, "targets": 3, "steps": 100},
)
NEAR = 0.05  # the share of its clean margin that an example may have left for the last search


class FastAPGD(Attack):
    """Run a few short searches on every example, and go on only where the margin came near 0.

    Use it through `suite="fast"`, where APGD with all its steps takes too long. `"standard"` is the referee: it
    searches all examples to the end.

    Searches, each on the examples that are left:

    1. APGD on the margin, 20 steps.
    2. APGD on the cross-entropy, 50 steps.
    3. Targeted APGD on the margin, 9 classes, 25 steps. The nearest classes on the model's linearization come first.
    4. The same with 50 steps for the first 3 classes, and once more from the nearest image of each, where there is a
       pool.

    5. The same with 100 steps, where at most a twentieth of the clean margin is left.

    An example leaves as soon as it is misclassified, or when more than `patience` of its clean margin is left after a
    search.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        patience: The share of its clean margin, in (0, 1], that an example may have left to be searched further.
        **options: `norm`, `clip_min`, `clip_max`, `mask`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> keras_drsl.attacks.FastAPGD(eps=0.1)(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)

    Reference: Croce and Hein, arXiv:2003.01690 (APGD); Melamed et al., "MALT Powers Up Adversarial Attacks",
    arXiv:2407.02240 (the order of the classes); Kim et al., "Margin consistency", arXiv:2406.18451 (the margin tells
    which examples are brittle).
    """

    def __init__(self, eps: float | None = None, *, patience: float = 0.35, **options: Any) -> None:
        super().__init__(eps, **options)
        self.patience = _validation.check_number(
            "patience", patience, "a number in (0, 1]", lambda number: 0 < number <= 1
        )

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return "fast_apgd"

    @property
    def uses_pool(self) -> bool:
        """Whether a search may start at the images of a pool."""
        return True

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the model per example; a gradient counts as three."""
        return 3 * 300

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search in stages; see the base class for arguments and result."""
        best, reached = batch.x.copy(), severity(batch.logits, batch.y)
        clean, left, targets = np.abs(reached), np.arange(len(batch.x)), None
        shares = (1.0, *[self.patience] * (len(STAGES) - 2), min(NEAR, self.patience))
        for stage, share in zip(STAGES, shares, strict=True):
            left = left[-reached[left] <= share * clean[left]]
            if len(left) == 0:
                break
            rows = batch.take(left)
            if "targeted" in stage:
                if targets is None:
                    targets = np.zeros((len(batch.x), min(TARGETS, batch.logits.shape[-1] - 1)), "int32")
                    targets[left] = rank_targets(classifier, rows, self.threat, targets.shape[1])
                # Starts at images of a pool are for the longest searches only.
                rows = rows._replace(targets=targets[left], pool=batch.pool if stage in STAGES[-2:] else None)
            attack = APGD(threat=self.threat, seed=self.seed, **stage)
            points = attack.run_all(classifier, rows, len(batch.x))
            logits = classifier.logits(points)
            margin, broken = severity(logits, rows.y), is_misclassified(logits, rows.y) & batch.stop_when_broken
            better = broken | (margin > reached[left])
            best[left[better]], reached[left[better]] = points[better], margin[better]
            left = left[~broken]
        return best


class FastSquare(Attack):
    """Run Square with a tenth of its queries, and with all of them where that reached more than gradients do.

    Use it through `suite="fast"`. On a model with useful gradients, a short random search should not come further than
    20 steps along them. Where it does, or where the gradient leads nowhere, Square runs to its end.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        queries: How many points Square tries where it runs to its end, >= 10.
        **options: `norm`, `clip_min`, `clip_max`, `mask`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> keras_drsl.attacks.FastSquare(eps=0.1, queries=20)(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)

    Reference: Andriushchenko et al., arXiv:1912.00049 (Square).
    """

    needs_gradient = False

    def __init__(self, eps: float | None = None, *, queries: int = 5000, **options: Any) -> None:
        super().__init__(eps, **options)
        self.queries = _validation.check_integer("queries", queries, at_least=10)

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return "fast_square"

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the model per example."""
        return self.queries // 10 + 60

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by random squares; see the base class for arguments and result."""
        shared: dict[str, Any] = {"threat": self.threat, "seed": self.seed}
        best = Square(queries=self.queries // 10, **shared).run_all(classifier, batch, len(batch.x))
        logits = classifier.logits(best)
        clean, reached = severity(batch.logits, batch.y), severity(logits, batch.y)
        left = np.flatnonzero(~(is_misclassified(logits, batch.y) & batch.stop_when_broken))
        if len(left):
            rows = batch.take(left)
            along = APGD(loss="margin", steps=20, **shared).run_all(classifier, rows, len(batch.x))
            by_gradient = severity(classifier.logits(along), rows.y) - clean[left]
            # Where not even the gradient raises the margin, it says nothing.
            left = left[(by_gradient <= 0) | (reached[left] - clean[left] > AHEAD * by_gradient)]
        if len(left):
            rows = batch.take(left)
            points = Square(queries=self.queries, **shared).run_all(classifier, rows, len(batch.x))
            further = severity(classifier.logits(points), rows.y) > reached[left]
            best[left[further]] = points[further]
        return best
