"""The result of an evaluation, with its files, its text and its figure."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_drsl import _escape, _files
from keras_drsl.evaluation import html, kept, rendering
from keras_drsl.evaluation.merge import merge_results
from keras_drsl.evaluation.report_format import read_results, to_content
from keras_drsl.evaluation.results import EvaluationResults
from keras_drsl.threat import describe_radius


class RobustnessReport(EvaluationResults):
    """The result of `evaluate_robustness`: accuracies by attack, and checks that show whether to believe them.

    Print it for a summary with the failed checks first. All attributes are public: a report format of your own is a
    function of a report.

    Args:
        settings: The threat model and all other arguments of the evaluation.
        attacks: One dictionary per attack in the order they ran, with `name`, `settings` and `seconds`; `gradients`
            and `queries`, on how many inputs it evaluated the model with and without a gradient; and `compile_seconds`,
            the part of the time in which programs were compiled.
        checks: The outcome of each check.
        per_example: Dictionary of lists of equal length: `index`, the position of each example in the data set;
            `label`, its true class; `broken_by`, the name of the attack that first misclassified it, `"clean"` if none
            was needed, None if it withstood them all. For 8-bit inputs also `broken_rounded`: whether what broke the
            example still did with its values rounded to integers.
        provenance: Model, data, versions and device, as recorded.
        kept: The kept examples, by the names of the attributes below, or None.

    Attributes:
        x: The clean inputs; shape `(count, ...)`, float32. Of several inputs, the one that is attacked.
        x_adv: The worst point that was found for each example: a misleading one where the example is broken, otherwise
            the attempt with the smallest margin. The input itself where it is misclassified without an attack.
        prediction: The classes that the model predicts at `x_adv`, shape `(count,)`; one per position or label for a
            model of several.
        confidence: The probabilities of these classes there.
        distance: The size of `x_adv - x` in the norm, shape `(count,)`. With one `eps` per feature it is measured in
            units of the largest one.
    """

    def to_dataframe(self) -> Any:
        """Return the verdict on each example as a pandas `DataFrame`, one row per example.

        Columns are those of `per_example`; for a report with kept examples also `prediction_adv` and `distance`.

        Raises:
            ImportError: Without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("`to_dataframe` needs `pip install pandas`") from error
        columns: dict[str, Any] = dict(self.per_example)
        if self.kept is not None:
            columns |= {"prediction_adv": list(self.prediction), "distance": self.distance}
        return pandas.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return to_content(self)

    to_json = _files.to_json

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "RobustnessReport":
        """Read a file that `to_json` of this or an earlier version wrote.

        Args:
            path: The file.

        Raises:
            ValueError: If the file holds no report, or one that breaks a rule or contradicts itself: another type, an
                attack twice, lists of different lengths, an example outside its shard, an accuracy that does not follow
                from the examples.
        """
        return _files.parse(path, "RobustnessReport.to_json", lambda text: cls(**vars(read_results(text))))

    def to_npz(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Write everything and the kept examples to a file, which NumPy can read as well.

        The file holds the arrays `x`, `x_adv`, `prediction`, `confidence` and `distance`, and `report.json`.

        Args:
            path: The file.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Raises:
            ValueError: If the report has no examples, the file exists and `overwrite` is False, or its folder cannot be
                written to.
            OSError: If the file cannot be written, as on a full disk.
        """
        arrays = self._kept_arrays("to_npz")
        with _files.replace(_files.check_new("path", path, overwrite=overwrite)) as file:
            kept.write(file, self._to_text(), arrays)
        if not isinstance(arrays, dict):
            self.kept = kept.KeptFile(Path(path))  # those that it was read from may change

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> "RobustnessReport":
        """Read a file that `to_npz` wrote. Each array is read when it is asked for.

        Args:
            path: The file.

        Raises:
            ValueError: If the file is damaged, holds something else, or contradicts itself.
        """
        try:
            text, arrays = kept.read(Path(path))
            results = read_results(text)
            kept.check_fit(arrays, results.num_examples)
            results.kept = arrays
        except Exception as error:
            raise ValueError(
                f"`path` must be a file written by `RobustnessReport.to_npz`. Received: path={str(path)!r} "
                f"({_escape.error_line(error)})"
            ) from error
        return cls(**vars(results))

    def _to_text(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def merge(cls, reports: Sequence["RobustnessReport"]) -> "RobustnessReport":
        """Join the reports of disjoint shards of one data set.

        Merged reports can be merged again, and the result does not depend on order and levels. Each check has its worst
        outcome of all shards. A check `shards` warns if a shard is missing. Times are added up, to a microsecond. So
        are gradients and queries. They are left out if one of the reports lacks them, and so are kept examples. Where
        the shards ran on different versions or devices, `provenance` lists all of them.

        Args:
            reports: The reports, in any order.

        Raises:
            ValueError: If they are reports of different models, data, settings or attacks, or share an example or a
                shard.
        """
        return cls(
            **merge_results(reports),
            kept=kept.merge([(report.per_example["index"], report.kept) for report in reports]),
        )

    def to_text(self, *, verbose: bool = False) -> str:
        """Return the report as text of 80 columns: verdict, accuracies, and the checks that did not pass.

        `print(report)` shows this text.

        Args:
            verbose: Whether to show the gradients and queries of the attacks, and figure and message of every check.
        """
        return rendering.to_text(self, verbose=verbose)

    def to_markdown(self) -> str:
        """Return the report as Markdown: a summary line, a table of attacks, a table of checks with failures first."""
        return rendering.to_markdown(self)

    def to_model_card(self, *, name: str, dataset: str) -> str:
        """Return a section for a model card, with metadata in the form of Hugging Face's `model-index`.

        Args:
            name: The name of the model.
            dataset: The name of the data set.

        Raises:
            ValueError: If an argument is no text or empty.
        """
        for argument, value in (("name", name), ("dataset", dataset)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"`{argument}` must be a text. Received: {argument}={value!r}")
        return rendering.to_model_card(self, name, dataset)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        curve: html.Curve | None = None,
        distances: html.Distances | None = None,
        comparison: html.Comparison | Sequence[html.Comparison] | None = None,
        overwrite: bool = True,
    ) -> None:
        """Write a page for readers: verdict, trust, misleading images, classes, and how all was measured.

        The page is one file. It needs no network and no script, follows light and dark settings, and prints on A4.

        Args:
            path: The file.
            title: The name of the model; None for the first characters of its fingerprint.
            curve: A curve to show, or None.
            distances: What `keras_drsl.minimal_distances` found, or None.
            comparison: What `keras_drsl.compare` returned, several in a list, or None.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Raises:
            ValueError: If the file exists and `overwrite` is False, its folder cannot be written to, or `comparison`
                holds something else.
            OSError: If the file cannot be written, as on a full disk.
            ImportError: Without Jinja, or without Pillow where there are images.
        """
        path = _files.check_new("path", path, overwrite=overwrite)
        given: Any = [] if comparison is None else comparison
        comparisons = list(given) if isinstance(given, list | tuple) else [given]
        if not all(isinstance(item, html.Comparison) for item in comparisons):
            raise ValueError(f"`comparison` must be what `compare` returns. Received: comparison={comparison!r:.60}")
        _files.write(path, html.render(self, title=title, curve=curve, distances=distances, comparisons=comparisons))

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows: the page without images and settings; None without Jinja, for the text."""
        try:
            return html.render(self, page=False)
        except ImportError:
            return None

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return (
            f"<RobustnessReport: robust {self.robust_accuracy:.1%}, clean {self.clean_accuracy:.1%}, "
            f"{describe_radius(self.settings)}, {self.num_examples} examples>"
        )

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None, overwrite: bool = True) -> Any:
        """Draw the accuracy without an attack and after each attack.

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
        path = None if path is None else _files.check_new("path", path, overwrite=overwrite)
        return rendering.plot(self, path, ax)
