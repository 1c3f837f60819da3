"""Two models, or several of each kind, compared on the same examples."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_drsl import _escape, _files
from keras_drsl._intervals import exact_mcnemar, paired_difference, paired_mean, welch
from keras_drsl._typing import Array
from keras_drsl.evaluation.report import RobustnessReport
from keras_drsl.evaluation.report_format import to_json_values
from keras_drsl.evaluation.results import CLEAN, UPPER_BOUND
from keras_drsl.plotting import begin_axes, finish_axes
from keras_drsl.threat import describe_radius

# What must be equal in the settings of two reports, besides the data.
SETTINGS = (
    *("eps", "norm", "clip_min", "clip_max", "mask", "suite"),
    *("task", "which", "ignore_class", "attack_input", "expectation_draws", "checks"),
)


class Difference(NamedTuple):
    """Hold how two accuracies differ.

    Attributes:
        first: The accuracy of the first side, in [0, 1]; of several models their mean.
        second: That of the second side.
        over_images: The 95 % interval of `first - second` for these models, if other images had been drawn.
        over_seeds: The 95 % interval for these images, if the models had been trained again with other seeds; None
            unless both sides have two models or more.
        only_first: How many examples only the first model gets right; None for several models or positions.
        only_second: How many only the second one gets right.
        p_value: The p-value of McNemar's exact test that both accuracies are equal, or None, as `only_first`.
    """

    first: float
    second: float
    over_images: tuple[float, float]
    over_seeds: tuple[float, float] | None = None
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None

    @property
    def value(self) -> float:
        """`first - second`."""
        return self.first - self.second


class Comparison:
    """The result of `compare`.

    Print it for a summary.

    Args:
        first: The reports of the first side.
        second: The reports of the second side.
        names: What the two sides are called.

    Attributes:
        robust: The `Difference` of the robust accuracies.
        clean: The `Difference` of the clean accuracies.
    """

    def __init__(
        self, first: Sequence[RobustnessReport], second: Sequence[RobustnessReport], names: tuple[str, str]
    ) -> None:
        self.first = list(first)
        self.second = list(second)
        self.names = names
        self.robust = self._difference(-1)
        self.clean = self._difference(0)

    @property
    def trustworthy(self) -> bool:
        """False if a check of one of the reports failed."""
        return all(report.trustworthy for report in (*self.first, *self.second))

    @property
    def only_first_robust(self) -> list[int]:
        """The positions in the data set of the examples on which more models of the first side are robust."""
        return self._where_larger(1)

    @property
    def only_second_robust(self) -> list[int]:
        """The positions in the data set of the examples on which more models of the second side are robust."""
        return self._where_larger(-1)

    def __str__(self) -> str:
        report = self.first[0]
        lines = [] if self.trustworthy else ["NOT TRUSTWORTHY: a check of one of the reports failed."]
        suite = _escape.for_terminal(report.settings["suite"])
        if suite in UPPER_BOUND:
            lines.append(f"The robust accuracies are upper bounds, of suite {suite}.")
        lines += [
            f"{side:<9}{_escape.for_terminal(name)}" for side, name in zip(("first", "second"), self.names, strict=True)
        ]
        lines += ["", f"{'accuracy':<10}{'first':>9}{'second':>9}{'difference':>13}   95 % interval"]
        for name, found in (("robust", self.robust), ("clean", self.clean)):
            values = f"{name:<10}{found.first:>9.1%}{found.second:>9.1%}{100 * found.value:>+13.1f}   "
            lines.append(f"{values}{_points(found.over_images)}, over images")
            if found.over_seeds is not None:
                lines.append(f"{'':<44}{_points(found.over_seeds)}, over seeds")
        settings = report.settings
        lines += ["", f"{report.num_examples} examples, norm {settings['norm']}, {describe_radius(settings)}, {suite}"]
        found = self.robust
        if found.p_value is not None:
            lines.append(
                f"robust on one side only: {found.only_first} and {found.only_second} examples; "
                f"McNemar's exact test p = {found.p_value:.2g}"
            )
        lines.append("over images: for these models, if other images had been drawn")
        if found.over_seeds is not None:
            counts = f"{len(self.first)} and {len(self.second)} models"
            lines.append(f"over seeds: for these images, if the {counts} had been trained again")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the comparison found, as JSON takes it."""
        content = {
            "names": list(self.names),
            "num_examples": self.first[0].num_examples,
            "trustworthy": self.trustworthy,
            "settings": {name: self.first[0].settings[name] for name in SETTINGS if name in self.first[0].settings},
            "models": [[report.provenance.get("model") for report in side] for side in (self.first, self.second)],
            "robust": {"value": self.robust.value} | self.robust._asdict(),
            "clean": {"value": self.clean.value} | self.clean._asdict(),
            "only_first_robust": self.only_first_robust,
            "only_second_robust": self.only_second_robust,
        }
        values: dict[str, Any] = to_json_values(content)
        return values

    to_json = _files.to_json

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None, overwrite: bool = True) -> Any:
        """Draw the differences with their intervals.

        Args:
            path: The file of the figure, or None for no file. Its ending names the kind of figure, such as `.png`.
            ax: The Matplotlib axes to draw in; None for a figure of its own.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Returns:
            The axes.

        Raises:
            ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
            OSError: If the file cannot be written, as on a full disk.
            ImportError: Without matplotlib.
        """
        path, axes = begin_axes(path, ax, overwrite=overwrite, height=3.0)
        for row, found in enumerate((self.robust, self.clean)):
            intervals = [("over images", found.over_images, "#0072B2"), ("over seeds", found.over_seeds, "#E69F00")]
            for place, (label, interval, color) in enumerate(intervals):
                if interval is not None:
                    limits, where = [100 * limit for limit in interval], [row + 0.2 * place] * 2
                    axes.plot(limits, where, color=color, lw=3, label=label if row == 0 else None)
                    axes.plot([100 * found.value], where[:1], "o", color="black", ms=5)
            axes.annotate(f"{100 * found.value:+.1f}", (100 * found.value, row), (5, 5), textcoords="offset points")
        axes.axvline(0, color="black", lw=0.8)
        axes.set_yticks([0, 1], ["robust accuracy", "clean accuracy"])
        axes.set_ylim(1.5, -0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("first minus second (points), 95 % interval")
        names = [_escape.for_figure(name if len(name) <= 70 else name[:70] + "...") for name in self.names]
        axes.set_title(f"first: {names[0]}\nsecond: {names[1]}", fontsize=9)
        return finish_axes(axes, path, is_own=ax is None, columns=2)

    def _difference(self, column: int) -> Difference:
        """Return how the accuracies differ without an attack (`column` 0), or after everything that ran (-1)."""
        counts = _num_predictions(self.first[0])
        sides = [np.array([_num_right(report, column) for report in side]) for side in (self.first, self.second)]
        by_model = [right.sum(axis=1) / counts.sum() for right in sides]
        means = [right.mean(axis=0) for right in sides]
        first, second = (float(accuracies.mean()) for accuracies in by_model)
        over_seeds = welch(*by_model, step=1 / counts.sum()) if min(map(len, by_model)) > 1 else None
        difference = means[0] - means[1]
        if len(self.first) > 1 or len(self.second) > 1 or self.first[0].num_positions is not None:
            return Difference(first, second, paired_mean(difference, counts), over_seeds)
        only = int((difference > 0).sum()), int((difference < 0).sum())
        return Difference(first, second, paired_difference(*only, len(counts)), None, *only, exact_mcnemar(*only))

    def _where_larger(self, sign: int) -> list[int]:
        first, second = (
            np.mean([_num_right(report, -1) for report in side], axis=0) for side in (self.first, self.second)
        )
        indices: list[int] = np.array(self.first[0].per_example["index"])[sign * (first - second) > 0].tolist()
        return indices


def compare(
    first: RobustnessReport | Sequence[RobustnessReport],
    second: RobustnessReport | Sequence[RobustnessReport],
    *,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """Compare how robust two models are on the same examples.

    Use it before you say that one model is more robust than another. Two models often fail on the same examples, so the
    difference of their accuracies is known better than each accuracy: intervals that overlap say little.

    Note:

    - For one model per side, the interval is Tango's score interval for a difference of paired shares, and McNemar's
      exact test has the null hypothesis that both accuracies are equal.
    - For several models per side, as from several seeds, accuracies are means. The interval over images is for these
      models and other images. The interval over seeds, Welch's, is for these images and models that are trained again.
      A claim about a method needs both.
    - Of models of positions, accuracies are shares of positions, and the interval over images is over whole examples.

    Args:
        first: The report of a model, or those of several models of a kind.
        second: The report to compare with, or those of several models.
        names: What the two sides are called in text and figure.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: If a side is empty, holds something else than reports, or two of one model; or if the reports are of
            different examples, threat models, suites, tasks or pools, or do not say of what data.
        ImportError: Without SciPy, where both sides have several models.

    Example:

    >>> x, y = np.random.default_rng(0).random((40, 8)), np.arange(40) % 3
    >>> models = [keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]) for _ in range(2)]
    >>> options = {"eps": 0.01, "suite": "quick", "verbose": 0}
    >>> reports = [keras_drsl.evaluate_robustness(model, x, y, **options) for model in models]
    >>> low, high = keras_drsl.compare(*reports).robust.over_images
    >>> -1 <= low < high <= 1
    True

    Reference: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998).
    """
    sides = _as_reports("first", first), _as_reports("second", second)
    if isinstance(names, str) or len(names) != 2 or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"`names` must be two texts. Received: names={names!r}")
    for other in (*sides[0][1:], *sides[1]):
        _check_comparable(sides[0][0], other)
    for name, side in zip(("first", "second"), sides, strict=True):
        models = [model for report in side if (model := report.provenance.get("model")) is not None]
        if len(set(models)) < len(models):
            raise ValueError(f"`{name}` must hold reports of different models. Received: two of one model")
    return Comparison(*sides, (names[0], names[1]))


def _as_reports(name: str, side: Any) -> list[RobustnessReport]:
    reports = [side] if isinstance(side, RobustnessReport) else list(side) if isinstance(side, Sequence) else []
    if not reports or not all(isinstance(report, RobustnessReport) for report in reports):
        raise ValueError(f"`{name}` must be a RobustnessReport or a list of them. Received: {name}={side!r:.60}")
    return reports


def _check_comparable(report: RobustnessReport, other: RobustnessReport) -> None:
    """Raise `ValueError` for reports that differ in more than their models."""
    if any(some.may_stop_early for some in (report, other)):
        raise ValueError("Reports must be of whole evaluations to be compared. Received: one that could end early")
    for name in SETTINGS:
        values = [some.settings.get(name) for some in (report, other)]
        if values[0] != values[1]:
            shown = " and ".join(f"{value!r:.60}" for value in values)
            raise ValueError(f"Reports must have equal settings to be compared. Received: {name} {shown}")
    attacks = [_attacks(some) for some in (report, other)]
    if attacks[0] != attacks[1]:
        shown = " and ".join(", ".join(names) for names in attacks)
        settings = " with other settings" if list(attacks[0]) == list(attacks[1]) else ""
        raise ValueError(f"Reports must be of the same attacks to be compared. Received: {shown}{settings}")
    data = [some.provenance.get("data") for some in (report, other)]
    if None in data:
        raise ValueError("Reports must say what data they are of to be compared. Received: one that does not")
    if data[0] != data[1]:
        raise ValueError("Reports must be of the same examples to be compared. Received: two of different data")
    pools = [(some.provenance.get("pool") or {}).get("digest") for some in (report, other)]
    if pools[0] != pools[1]:
        raise ValueError(
            "Reports must be of attacks that start at the same images to be compared: of equal `x_pool`, or of one "
            "whole data set. Received: two of different pools"
        )
    indices = [some.per_example["index"] for some in (report, other)]
    if indices[0] != indices[1]:
        both = len(set(indices[0]) & set(indices[1]))
        raise ValueError(
            "Reports must be of the same examples to be compared. Received: "
            f"{len(indices[0])} and {len(indices[1])} examples, of which {both} are in both"
        )


def _attacks(report: RobustnessReport) -> dict[str, Any]:
    """Return the settings of each attack, apart from its seed."""
    return {
        attack["name"]: {name: value for name, value in attack["settings"].items() if name != "seed"}
        for attack in report.attacks
        if not attack["name"].startswith("check:")
    }


def _num_predictions(report: RobustnessReport) -> Array:
    """Return how many predictions of each example count, shape `(count,)`."""
    return np.array(report.per_example.get("positions", [1] * report.num_examples))


def _num_right(report: RobustnessReport, column: int) -> Array:
    """Return how many predictions of each example are right without an attack (`column` 0), or at the end (-1)."""
    if report.num_positions is not None:
        return np.asarray(_num_predictions(report) - [row[column] for row in report.per_example["wrong"]])
    broken_by = report.per_example["broken_by"]
    right: Array = np.array([int(name != CLEAN if column == 0 else name is None) for name in broken_by])
    return right


def _points(interval: tuple[float, float]) -> str:
    """Return an interval of a difference of shares as text, in points."""
    low, high = (100 * limit for limit in interval)
    return f"{low:+.1f} to {high:+.1f}"
