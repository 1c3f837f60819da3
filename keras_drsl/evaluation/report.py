"""What an evaluation found."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_drsl.evaluation import files

FORMAT = 1
STATUSES = ("pass", "warn", "fail")
CLEAN = "clean"  # what broke an example that is misclassified without an attack


@dataclass(frozen=True)
class Check:
    """One reason to believe an evaluation, or not to.

    Attributes:
        name: what was looked at.
        status: `"pass"`, `"warn"` or `"fail"`.
        value: the figure it was judged by.
        meaning: one sentence on what the figure says.
    """

    name: str
    status: str
    value: float
    meaning: str


class RobustnessReport:
    """What `evaluate_robustness` found: accuracies, attack by attack, and checks of whether to believe them.

    Print it for a summary with the failed checks first.

    Args:
        settings: the threat model and all other arguments of the evaluation.
        attacks: one dictionary an attack in the order they ran, with `name`, `settings` and `seconds`.
        checks: the outcome of each check.
        per_example: dictionary of lists of equal length: `index`, each example's place in the data set; `label`, its
            true class; `broken_by`, the name of the attack that first misclassified it, `"clean"` if none was needed,
            None if it withstood them all.
        provenance: model, versions and device, as recorded.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        attacks: list[dict[str, Any]],
        checks: list[Check],
        per_example: dict[str, list],
        provenance: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.attacks = attacks
        self.checks = checks
        self.per_example = per_example
        self.provenance = provenance

    @property
    def images(self) -> int:
        """How many examples were evaluated."""
        return len(self.per_example["broken_by"])

    @property
    def clean_accuracy(self) -> float:
        """The share of examples classified correctly without an attack, in [0, 1]."""
        return 1 - self._broken(CLEAN) / self.images

    @property
    def robust_accuracy(self) -> float:
        """The share of examples that withstood everything that ran, in [0, 1]."""
        return self._broken(None) / self.images

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """The 95 % interval of the robust accuracy for the examples as a sample, after Wilson."""
        return wilson(self._broken(None), self.images)

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """By attack, in the order they ran, each working on what those before it left standing.

        `cumulative` is the share of all examples that stand after it; `alone` the share that withstood it of those it
        was tried on, `tried` their number.
        """
        standing = self.images - self._broken(CLEAN)
        result = {}
        for attack in self.attacks:
            tried, broken = attack.get("tried", standing), self._broken(attack["name"])
            standing -= broken
            result[attack["name"]] = {
                "cumulative": standing / self.images,
                "alone": 1 - broken / tried if tried else math.nan,
                "tried": tried,
            }
        return result

    @property
    def trustworthy(self) -> bool:
        """False if a check failed."""
        return all(check.status != "fail" for check in self.checks)

    def _broken(self, name: str | None) -> int:
        return self.per_example["broken_by"].count(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        content = {
            "format": FORMAT,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "confidence_interval": list(self.confidence_interval),
            "images": self.images,
            "trustworthy": self.trustworthy,
            "settings": self.settings,
            "attacks": [attack | self.accuracy[attack["name"]] for attack in self.attacks],
            "checks": [vars(check) for check in self.checks],
            "provenance": self.provenance,
            "per_example": self.per_example,
        }
        return plain(content)

    def to_json(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write everything to a file.

        Raises:
            ValueError: if the file is there already and `overwrite` is not set, or cannot be written.
        """
        files.write(files.check_new("path", path, overwrite=overwrite), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "RobustnessReport":
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the file holds no report.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            checks = [
                Check(**check | {"value": math.nan if check["value"] is None else check["value"]})
                for check in content["checks"]
            ]
            derived = ("cumulative", "alone")
            attacks = [{key: one[key] for key in one if key not in derived} for one in content["attacks"]]
            report = cls(content["settings"], attacks, checks, content["per_example"], content["provenance"])
            if report.images < 1 or len({len(values) for values in report.per_example.values()}) != 1:
                raise ValueError("lists of different lengths")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`path` must be a file written by `RobustnessReport.to_json`. Received: path={str(path)!r} "
                f"({type(error).__name__}: {error})"
            ) from error
        return report

    @classmethod
    def merge(cls, reports: Sequence["RobustnessReport"]) -> "RobustnessReport":
        """Join the reports of disjoint shards of one data set.

        Of each check the worst outcome counts; one warns if a shard is missing.

        Raises:
            ValueError: if they are reports of different models, data, settings or attacks, or share an example.
        """
        if not reports:
            raise ValueError("`reports` must hold at least one report. Received: none")
        first = reports[0]
        for other in reports[1:]:
            for what in ("model", "undefended", "data"):
                if first.provenance.get(what) != other.provenance.get(what):
                    raise ValueError(f"`reports` must be of one evaluation. Received: two of different {what}")
            if _common(first) != _common(other):
                raise ValueError("`reports` must be of one evaluation. Received: two of different settings or attacks")
        joined = [
            dict(zip(report.per_example, row, strict=True))
            for report in reports
            for row in zip(*report.per_example.values(), strict=True)
        ]
        joined.sort(key=lambda row: row["index"])
        if len({row["index"] for row in joined}) < len(joined):
            raise ValueError("`reports` must be of different examples. Received: two that share some")

        # A check is among the attacks only where it broke something.
        attacks: dict[str, dict[str, Any]] = {}
        for report in reports:
            for one in report.attacks:
                known = attacks.setdefault(one["name"], one | {"seconds": 0.0, "tried": 0})
                known["seconds"] += one["seconds"]
                known["tried"] += report.accuracy[one["name"]]["tried"]
        ordered = sorted(attacks.values(), key=lambda one: one["name"].startswith("check:"))

        checks: dict[str, Check] = {}
        for check in (check for report in reports for check in report.checks):
            known_check = checks.get(check.name)
            if known_check is None or STATUSES.index(check.status) > STATUSES.index(known_check.status):
                worst = f"{check.meaning} (the worst of {len(reports)} shards)"
                checks[check.name] = Check(check.name, check.status, check.value, worst)
        shards = [shard for report in reports for shard in report.settings.get("shards", [report.settings["shard"]])]
        count = shards[0] and shards[0][1]
        missing = [f"{one}/{count}" for one in range(count or 0) if [one, count] not in shards]
        if missing:
            meaning = f"shards are missing, {', '.join(missing)}: this is a report on the others"
            checks["shards"] = Check("shards", "warn", len(missing), meaning)
        settings = _without_shard(first.settings) | {"shards": shards}
        per_example = {name: [row[name] for row in joined] for name in first.per_example}
        return cls(settings, ordered, list(checks.values()), per_example, first.provenance)

    def to_markdown(self) -> str:
        """The report as Markdown: a heading line, a table of attacks, a table of checks, failures first."""
        low, high = self.confidence_interval
        lines = [
            f"Robust accuracy **{self.robust_accuracy:.1%}** (95 % interval {low:.1%} to {high:.1%}), clean "
            f"{self.clean_accuracy:.1%}, on {self.images} examples, norm {self.settings['norm']}, "
            f"eps {self.settings['eps']:.4g}{'' if self.trustworthy else ' - **not trustworthy: a check failed**'}",
            "",
            "| attack | tried on | withstood | standing after it | seconds |",
            "|---|---|---|---|---|",
        ]
        for attack in self.attacks:
            one = self.accuracy[attack["name"]]
            lines.append(
                f"| {attack['name']} | {one['tried']} | {_percent(one['alone'])} | {one['cumulative']:.1%} | "
                f"{attack['seconds']:.1f} |"
            )
        if self.checks:
            lines += ["", "| check | outcome | figure | meaning |", "|---|---|---|---|"]
            lines += [
                f"| {check.name} | {check.status} | {check.value:.4g} | {check.meaning} |"
                for check in self._by_outcome()
            ]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        low, high = self.confidence_interval
        settings = self.settings
        lines = []
        if not self.trustworthy:
            lines.append("NOT TRUSTWORTHY: a check failed. The robust accuracy is at best an upper bound.")
        lines += [
            f"robust accuracy  {self.robust_accuracy:7.1%}   95 % interval {low:.1%} to {high:.1%}",
            f"clean accuracy   {self.clean_accuracy:7.1%}   {self.images} examples, norm {settings['norm']}, "
            f"eps {settings['eps']:.4g}, suite {settings['suite']}",
            "",
            f"{'attack':<22}{'tried on':>9}{'withstood':>11}{'standing after':>16}{'seconds':>9}",
        ]
        for attack in self.attacks:
            one = self.accuracy[attack["name"]]
            lines.append(
                f"{attack['name']:<22}{one['tried']:>9}{_percent(one['alone']):>11}{one['cumulative']:>16.1%}"
                f"{attack['seconds']:>9.1f}"
            )
        if self.checks:
            lines += ["", f"{'check':<22}{'':6}{'figure':>9}"]
        for check in self._by_outcome():
            status = check.status if check.status == "pass" else check.status.upper()
            lines.append(f"{check.name:<22}{status:<6}{check.value:>9.4g}  {check.meaning}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<RobustnessReport: robust {self.robust_accuracy:.1%}, clean {self.clean_accuracy:.1%}, eps "
            f"{self.settings['eps']:.4g}, {self.images} examples>"
        )

    def plot(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Draw the accuracy left after each attack.

        Raises:
            ValueError: if the file is there already and `overwrite` is not set, or cannot be written.
            ImportError: without matplotlib.
        """
        path = files.check_new("path", path, overwrite=overwrite)
        figure, axes = new_figure()
        names = [CLEAN, *self.accuracy]
        values = [self.clean_accuracy, *(one["cumulative"] for one in self.accuracy.values())]
        bars = axes.barh(names, np.multiply(values, 100), color=["C1", *["C0"] * len(self.accuracy)])
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.invert_yaxis()
        title = f"norm {self.settings['norm']}, eps {self.settings['eps']:.4g}, {self.images} examples"
        axes.set(xlabel="accuracy left (%)", xlim=(0, 110), title=title)
        figure.savefig(path, dpi=150)

    def _by_outcome(self) -> list[Check]:
        return sorted(self.checks, key=lambda check: -STATUSES.index(check.status))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson."""
    z = 1.959963984540054
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def new_figure() -> tuple[Any, Any]:
    """An empty figure that no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need `pip install "keras-drsl[plot]"`') from error
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    return figure, figure.subplots()


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def plain(value: Any) -> Any:
    """A value as JSON takes it: None for what is no number."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_shard(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("shard", "shards")}


def _common(report: RobustnessReport) -> tuple:
    """What the reports of all shards of one evaluation have in common."""
    shard = report.settings.get("shard")
    attacks = [(one["name"], one["settings"]) for one in report.attacks if not one["name"].startswith("check:")]
    return _without_shard(report.settings), attacks, shard and shard[1]
