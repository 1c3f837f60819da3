"""The result of an evaluation, with its files, its text and its figure."""

import json
import os
from collections.abc import Sequence
from typing import Any

from keras_drsl import _files
from keras_drsl.evaluation import rendering
from keras_drsl.evaluation.merge import merge_results
from keras_drsl.evaluation.report_format import FORMAT, read_content, to_json_values
from keras_drsl.evaluation.results import Check, EvaluationResults


class RobustnessReport(EvaluationResults):
    """The result of `evaluate_robustness`: accuracies by attack, and checks that show whether to believe them.

    Print it for a summary with the failed checks first. All attributes are public: a report format of your own is a
    function of a report.

    Args:
        settings: The threat model and all other arguments of the evaluation.
        attacks: One dictionary per attack in the order they ran, with `name`, `settings` and `seconds`.
        checks: The outcome of each check.
        per_example: Dictionary of lists of equal length: `index`, the position of each example in the data set;
            `label`, its true class; `broken_by`, the name of the attack that first misclassified it, `"clean"` if none
            was needed, None if it withstood them all.
        provenance: Model, data, versions and device, as recorded.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        content = {
            "format": FORMAT,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "confidence_interval": list(self.confidence_interval),
            "num_examples": self.num_examples,
            "trustworthy": self.trustworthy,
            "settings": self.settings,
            "attacks": [attack | self.accuracy[attack["name"]] for attack in self.attacks],
            "checks": [vars(check) for check in self.checks],
            "provenance": self.provenance,
            "per_example": self.per_example,
        }
        values: dict[str, Any] = to_json_values(content)
        return values

    def to_json(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write everything to a file.

        Args:
            path: The file.
            overwrite: Whether to replace a file that exists.

        Raises:
            ValueError: If the file exists and `overwrite` is not set, or cannot be written.
        """
        _files.write(_files.check_new("path", path, overwrite=overwrite), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "RobustnessReport":
        """Read a file that `to_json` of this or an earlier version wrote.

        Args:
            path: The file.

        Raises:
            ValueError: If the file holds no report.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = read_content(json.load(file))
            checks = [Check(**check) for check in content["checks"]]
            report = cls(content["settings"], content["attacks"], checks, content["per_example"], content["provenance"])
            if report.num_examples < 1 or len({len(values) for values in report.per_example.values()}) != 1:
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

        Each check has its worst outcome of all shards. A check `shards` warns if a shard is missing.

        Args:
            reports: The reports, in any order.

        Raises:
            ValueError: If they are reports of different models, data, settings or attacks, or share an example.
        """
        return cls(**merge_results(reports))

    def to_markdown(self) -> str:
        """Return the report as Markdown: a summary line, a table of attacks, a table of checks with failures first."""
        return rendering.to_markdown(self)

    def __str__(self) -> str:
        return rendering.to_text(self)

    def __repr__(self) -> str:
        return (
            f"<RobustnessReport: robust {self.robust_accuracy:.1%}, clean {self.clean_accuracy:.1%}, eps "
            f"{self.settings['eps']:.4g}, {self.num_examples} examples>"
        )

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Draw the accuracy without an attack and after each attack.

        Args:
            path: The file of the figure. Its ending names the kind of figure, such as `.png`.
            overwrite: Whether to replace a file that exists.

        Raises:
            ValueError: If the file exists and `overwrite` is not set, or cannot be written.
            ImportError: Without matplotlib.
        """
        rendering.plot(self, _files.check_new("path", path, overwrite=overwrite))
