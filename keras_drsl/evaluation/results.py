"""The figures of an evaluation: what a report holds, without its files and its text."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from keras_drsl._intervals import confidence_sequence, of_ratio, wilson
from keras_drsl._typing import Array, Status

CLEAN = "clean"  # what broke an example that is misclassified without an attack
LEFT_OUT = "left out"  # what stands there for an example that an early end left out, until the report is made
BY_SEVERITY: tuple[Status, ...] = ("fail", "warn", "pass", "skipped")  # the outcomes of checks, the worst first

DISTANCES = "minimal distances"  # what a curve of `minimal_distances` has for a suite
# Suites of few or weak attacks, or without checks: stronger ones may break more.
UPPER_BOUND = ("quick", "cleverhans", DISTANCES)


@dataclass(frozen=True)
class Check:
    """One piece of evidence for or against an evaluation.

    Attributes:
        name: The name of the check.
        status: `"pass"`, `"warn"`, `"fail"`, or `"skipped"` if there was nothing to test.
        value: The figure that the status was decided by.
        message: One sentence that says what the figure means.
    """

    name: str
    status: Status
    value: float
    message: str


class ClassResult(NamedTuple):
    """Hold the accuracies on the examples of one class.

    Attributes:
        num_examples: The number of examples.
        clean_accuracy: The share that is classified correctly without an attack.
        robust_accuracy: The share that withstood everything.
        confidence_interval: The 95 % confidence interval of the robust accuracy, as in `RobustnessReport`.
    """

    num_examples: int
    clean_accuracy: float
    robust_accuracy: float
    confidence_interval: tuple[float, float]


def in_report(broken_by: list[str | None]) -> list[str | None]:
    """Return what broke the examples of a state, without those that an early end left out."""
    return [name for name in broken_by if name != LEFT_OUT]


class EvaluationResults:
    """The accuracies, the verdict on each example, and the checks of an evaluation.

    Args:
        settings: The threat model and all other arguments of the evaluation.
        attacks: One dictionary per attack in the order they ran, with `name`, `settings` and `seconds`; `gradients`
            and `queries`, on how many inputs it evaluated the model with and without a gradient; and `compile_seconds`,
            the part of the time in which programs were compiled.
        checks: The outcome of each check.
        per_example: Dictionary of lists of equal length: `index`, the position of each example in the data set;
            `label`, its true class; `broken_by`, the name of the attack that first misclassified it, `"clean"` if none
            was needed, None if it withstood them all. For 8-bit inputs also `broken_rounded`: whether what broke the
            example still did with its values rounded to integers. For a model of several labels, `label` is a list of 0
            and 1, and `broken_by_label` has what broke each label; `broken_by` is then what broke the first of them.
            For a model of positions there is no `label`. `positions` is how many count, and `wrong` lists how many of
            them are wrong at the worst point: without an attack, after each attack, and after the checks.
        provenance: Model, data, versions and device, as recorded.
        kept: The kept examples, as in `RobustnessReport`, or None.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        attacks: list[dict[str, Any]],
        checks: list[Check],
        per_example: dict[str, list[Any]],
        provenance: dict[str, Any],
        kept: Mapping[str, Array] | None = None,
    ) -> None:
        self.settings = settings
        self.attacks = attacks
        self.checks = checks
        self.per_example = per_example
        self.provenance = provenance
        self.kept = kept

    @property
    def num_examples(self) -> int:
        """The number of examples that were evaluated."""
        return len(self.per_example["broken_by"])

    @property
    def class_counts(self) -> dict[int, int]:
        """The number of examples of each class that has any, by class id; of each label, for a model of several."""
        labels = self.per_example.get("label", [])
        if "broken_by_label" in self.per_example:
            return {number: sum(column) for number, column in enumerate(zip(*labels, strict=True))}
        return dict(sorted(Counter(labels).items()))

    @property
    def robust_accuracy_by_label(self) -> dict[int, float] | None:
        """The share of examples on which each label stayed right, by label; None for a model of classes."""
        rows = self.per_example.get("broken_by_label")
        if rows is None:
            return None
        return {number: column.count(None) / len(rows) for number, column in enumerate(zip(*rows, strict=True))}

    @property
    def by_class(self) -> dict[int, ClassResult]:
        """The accuracies on the examples of each class that has any, by class id; empty for labels and positions."""
        if self.robust_accuracy_by_label is not None or self.num_positions is not None:
            return {}
        pairs = list(zip(self.per_example["label"], self.per_example["broken_by"], strict=True))
        robust = Counter(label for label, name in pairs if name is None)
        wrong = Counter(label for label, name in pairs if name == CLEAN)
        return {
            label: ClassResult(
                count, 1 - wrong[label] / count, robust[label] / count, self._interval(robust[label], count)
            )
            for label, count in self.class_counts.items()
        }

    @property
    def clean_accuracy(self) -> float:
        """The share of examples, or of positions, that are classified correctly without an attack, in [0, 1]."""
        if self.num_positions is not None:
            return self._right_after(0)
        return 1 - self._count_broken_by(CLEAN) / self.num_examples

    @property
    def robust_accuracy(self) -> float:
        """The share of examples, or of positions, that withstood everything that ran, in [0, 1]."""
        if self.num_positions is not None:
            return self._right_after(-1)
        return self._count_broken_by(None) / self.num_examples

    @property
    def robust_accuracy_8bit(self) -> float | None:
        """The share of examples that no perturbed image of integer values broke, in [0, 1]; None for other inputs.

        It is an upper bound: attacks search among all real values, and what they find is rounded. An image that a check
        broke is not tried.
        """
        rounded = self.per_example.get("broken_rounded")
        return None if rounded is None else rounded.count(False) / self.num_examples

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the robust accuracy, by Wilson's method.

        Of an evaluation that may end early, it is that of a confidence sequence, which is wider. Of a model of
        positions it is that of a ratio of sums over examples: positions of one example resemble each other.
        """
        if self.num_positions is not None:
            return of_ratio([row[-1] for row in self.per_example["wrong"]], self.per_example["positions"])
        return self._interval(self._count_broken_by(None), self.num_examples)

    def _interval(self, successes: int, count: int) -> tuple[float, float]:
        return confidence_sequence(successes, count) if self.may_stop_early else wilson(successes, count)

    @property
    def may_stop_early(self) -> bool:
        """Whether the evaluation had a `precision` or `at_least` that could end it early."""
        return "num_given" in self.settings

    @property
    def stopped_early(self) -> bool:
        """Whether the evaluation ended before all examples were attacked: the report is on those that were."""
        return self.may_stop_early and self.num_examples < self.settings["num_given"]

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """The accuracies by attack, in the order the attacks ran, each on the examples that withstood those before.

        `cumulative` is the share of all examples that are robust after the attack. `alone` is the share of the examples
        it was tried on that withstood it; `tried` is their number. Of a model of positions, both are shares of
        positions, and `tried` is the number of examples with a position that was right.
        """
        if self.num_positions is not None:
            return self._accuracy_of_positions()
        robust = self.num_examples - self._count_broken_by(CLEAN)
        result = {}
        for attack in self.attacks:
            tried, broken = attack.get("tried", robust), self._count_broken_by(attack["name"])
            robust -= broken
            result[attack["name"]] = {
                "cumulative": robust / self.num_examples,
                "alone": 1 - broken / tried if tried else math.nan,
                "tried": tried,
            }
        return result

    @property
    def num_gradients(self) -> int | None:
        """On how many inputs the attacks computed a gradient; None if it was not counted.

        Steps, restarts and targets count one by one, and so do the calls of a random model that are averaged. Those of
        `Transfer` are of its second model. What checks compute does not count.
        """
        total: int | None = self._sum_of("gradients")
        return total

    @property
    def num_queries(self) -> int | None:
        """On how many inputs the attacks evaluated the model without a gradient; None if it was not counted.

        What checks compute does not count.
        """
        total: int | None = self._sum_of("queries")
        return total

    @property
    def compile_seconds(self) -> float | None:
        """How much of the time of the attacks TensorFlow traced programs or JAX compiled them; None if not measured.

        Programs that a check needed first do not count, nor do those that a model keeps from an earlier evaluation. On
        PyTorch, nothing is compiled.
        """
        total: float | None = self._sum_of("compile_seconds")
        return total

    @property
    def trustworthy(self) -> bool:
        """False if a check failed."""
        return all(check.status != "fail" for check in self.checks)

    @property
    def num_positions(self) -> int | None:
        """How many positions of all examples count, for a model of positions; otherwise None."""
        return sum(self.per_example["positions"]) if "positions" in self.per_example else None

    def _sum_of(self, key: str) -> Any | None:
        records = [attack for attack in self.attacks if not attack["name"].startswith("check:")]
        return sum(record[key] for record in records) if all(key in record for record in records) else None

    def _right_after(self, column: int) -> float:
        assert self.num_positions is not None
        wrong: int = sum(row[column] for row in self.per_example["wrong"])
        return 1 - wrong / self.num_positions

    def _accuracy_of_positions(self) -> dict[str, dict[str, float]]:
        result = {}
        for column, attack in enumerate(self.attacks, 1):
            before, after = self._right_after(column - 1), self._right_after(column)
            pairs = zip(self.per_example["wrong"], self.per_example["positions"], strict=True)
            tried = sum(row[column - 1] < count for row, count in pairs)
            alone = after / before if before else math.nan
            result[attack["name"]] = {"cumulative": after, "alone": alone, "tried": tried}
        return result

    def _count_broken_by(self, name: str | None) -> int:
        return self.per_example["broken_by"].count(name)

    @property
    def broken_by_row(self) -> list[str | None]:
        """What broke each row of a state, which has one per label of an example."""
        by_label = self.per_example.get("broken_by_label", [self.per_example["broken_by"]])
        return list(itertools.chain(*by_label))

    @property
    def x(self) -> Array:
        """The clean inputs of the kept examples."""
        return self._kept_array("x")

    @property
    def x_adv(self) -> Array:
        """The worst point that was found for each example."""
        return self._kept_array("x_adv")

    @property
    def prediction(self) -> Array:
        """The classes that the model predicts there."""
        return self._kept_array("prediction")

    @property
    def confidence(self) -> Array:
        """The probabilities of these classes there."""
        return self._kept_array("confidence")

    @property
    def distance(self) -> Array:
        """How far each point is from its input."""
        return self._kept_array("distance")

    @property
    def read_as(self) -> Array:
        """How often the worst point of an example of each class is read as each class, shape `(C, C)`.

        Rows are true classes, columns predictions at `x_adv`. Robust examples are on the diagonal,
        but for a random model, which answers otherwise when it is asked again.

        Raises:
            ValueError: If the report has no examples, or is of a model of labels or positions.
        """
        prediction = self._kept_array("prediction")
        if not self.by_class:
            raise ValueError("`report.read_as` needs one class per example. Received: a model of labels or positions")
        labels = np.array(self.per_example["label"])
        count = int(max(labels.max(), prediction.max())) + 1
        counts = np.bincount(labels * count + prediction, minlength=count * count)
        return np.asarray(counts.reshape(count, count))

    def _kept_array(self, name: str) -> Array:
        return self._kept_arrays(name)[name]

    def _kept_arrays(self, name: str) -> Mapping[str, Array]:
        """Return the kept examples, or raise `ValueError` that an attribute or a method needs them."""
        if self.kept is None:
            raise ValueError(
                f"`report.{name}` needs the examples: evaluate with `keep_examples=True` or `--keep FILE.npz`, or read "
                "such a file by `RobustnessReport.from_npz`. A JSON file holds no examples"
            )
        return self.kept
