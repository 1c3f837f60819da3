"""The result of `certify` and `certify_interval`, with its files, its text and its figure."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_drsl import _escape, _files, _page, _schema, _validation
from keras_drsl._data import join_rows
from keras_drsl._intervals import wilson
from keras_drsl._typing import Array
from keras_drsl.plotting import begin_axes, draw_shares, finish_axes, norm_label

FORMAT = "keras-drsl certificates 1"
POINTS = 200  # of a curve
COLUMNS = {
    "index": _schema.list_of(_schema.integer(at_least=0)),
    "label": _schema.list_of(_schema.integer(at_least=0)),
    "prediction": _schema.list_of(_schema.optional(_schema.integer(at_least=-1))),
    "radius": _schema.list_of(_schema.NOT_NEGATIVE),
}
SETTINGS = {
    "method": _schema.Rule("'smoothing' or 'interval'", lambda value: value in ("smoothing", "interval")),
    "norm": _schema.Rule("2 or 'inf'", lambda value: value in (2, "inf") and not isinstance(value, bool)),
}
SETTINGS_OF_DRAWS = {
    "sigma": _schema.NOT_NEGATIVE,
    "alpha": _schema.SHARE,
    "radius": _schema.optional(_schema.NOT_NEGATIVE),
    "draws": _schema.integer(at_least=1),
    "selection_draws": _schema.integer(at_least=1),
}
COLUMNS_OF_DRAWS = {name: _schema.list_of(_schema.integer(at_least=0)) for name in ("hits", "draws")}


class CertificateReport:
    """The result of `certify` or `certify_interval`: for each example, a radius within which it is proven to be right.

    Print it for a summary.

    Args:
        settings: All arguments.
        per_example: Dictionary of lists of equal length: `index`, the position of each example in the data set;
            `label`, its true class; `prediction`, the class of the vote, None where it abstains, as too few draws
            return it, and -1 where no output was a number; `radius`. For `certify` also `hits`, how many draws returned
            that class, and `draws`, how many there were.
        provenance: Model, data, versions and device.
    """

    def __init__(self, settings: dict[str, Any], per_example: dict[str, list[Any]], provenance: dict[str, Any]) -> None:
        self.settings = settings
        self.per_example = per_example
        self.provenance = provenance

    @property
    def radii(self) -> Array:
        """The certified radius of each example, 0 where the vote abstains or is wrong; shape `(count,)`."""
        return np.array(self.per_example["radius"], "float64")

    @property
    def abstentions(self) -> int:
        """On how many examples the vote abstains: too few draws return its class."""
        return sum(prediction is None for prediction in self.per_example["prediction"])

    @property
    def draws_used(self) -> float:
        """Which share of all possible draws `certify` made; 1 without draws. The rest was saved by ending early."""
        if not self._has_draws:
            return 1.0
        most = self.settings["draws"] + self.settings["selection_draws"]
        return float(sum(self.per_example["draws"]) / (most * len(self.radii)))

    @property
    def _has_draws(self) -> bool:
        return bool(self.settings["method"] == "smoothing")

    def accuracy(self, radius: float = 0.0) -> float:
        """Return the certified accuracy: the share of examples whose vote is right and certified for a radius.

        Args:
            radius: The radius, >= 0. At 0, every example counts that has a certificate.
        """
        radius = _validation.check_non_negative("radius", radius)
        return float(((self.radii > 0) & (self.radii >= radius)).mean())

    def confidence_interval(self, radius: float = 0.0) -> tuple[float, float]:
        """Return the 95 % confidence interval of the certified accuracy, over the examples, by Wilson's method.

        Args:
            radius: The radius, >= 0.
        """
        count = len(self.radii)
        return wilson(round(self.accuracy(radius) * count), count)

    def __str__(self) -> str:
        settings, count = self.settings, len(self.radii)
        how = "interval bounds"
        if self._has_draws:
            how = f"smoothing, sigma {settings['sigma']:g}, {settings['draws']} draws, alpha {settings['alpha']:g}"
        lines = [
            f"{count} examples, {norm_label(settings['norm'])} radii by {how}",
            f"{'radius':>10}{'certified':>11}   95 % interval",
        ]
        for radius in self._radii_to_name:
            low, high = self.confidence_interval(radius)
            lines.append(f"{radius:>10.4g}{self.accuracy(radius):>11.1%}   {low:.1%} to {high:.1%}")
        return "\n".join(lines + ([self._about_draws] if self._has_draws else []))

    @property
    def _radii_to_name(self) -> list[float]:
        """The radii that a summary names."""
        decided, largest = self.settings.get("radius"), float(self.radii.max())
        return [decided] if decided else [0.0, *(largest * part / 4 for part in (1, 2, 3, 4) if largest)]

    @property
    def _about_draws(self) -> str:
        pairs = zip(self.per_example["prediction"], self.per_example["label"], strict=True)
        wrong = sum(prediction not in (None, label) for prediction, label in pairs)
        return f"{self.abstentions} abstain, {wrong} wrong; {self.draws_used:.0%} of all draws were needed"

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        label: str | None = None,
        others: Mapping[str, "CertificateReport"] | None = None,
        ax: Any = None,
        overwrite: bool = True,
    ) -> Any:
        """Draw the certified accuracy by radius, with its 95 % intervals.

        Args:
            path: The file of the figure, or None for no file. Its ending names the kind of figure, such as `.png`.
            label: The name of the curve in the legend.
            others: More reports to draw beside it, by label.
            ax: The Matplotlib axes to draw in; None for a figure of its own.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Returns:
            The axes.

        Raises:
            ValueError: If the reports have different norms, the file exists and `overwrite` is False, or its folder
                cannot be written to.
            OSError: If the file cannot be written, as on a full disk.
            ImportError: Without matplotlib.
        """
        curves: list[tuple[str | None, CertificateReport]] = [(label, self), *(others or {}).items()]
        norms = {report.settings["norm"] for _, report in curves}
        if len(norms) > 1:
            raise ValueError(f"`others` must have radii in one norm. Received: {sorted(map(str, norms))}")
        path, axes = begin_axes(path, ax, overwrite=overwrite)
        largest = max(float(report.radii.max()) for _, report in curves) or 1.0
        radii = np.linspace(0, largest, POINTS)
        for name, report in curves:
            shares = [report.accuracy(radius) for radius in radii]
            draw_shares(axes, radii, shares, [report.confidence_interval(radius) for radius in radii], name)
        axes.set(xlabel=f"radius ({norm_label(norms.pop())})", ylabel="certified accuracy (%)", ylim=(0, 101))
        return finish_axes(axes, path, is_own=ax is None, columns=2 if label is not None or others else 0)

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None, overwrite: bool = True) -> None:
        """Write a page for readers: certified accuracy by radius, and how it was measured.

        The page is one file. It needs no network and no script, follows light and dark settings, and prints on A4.

        Args:
            path: The file.
            title: The name of the model; None for the first characters of its fingerprint.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Raises:
            ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
            OSError: If the file cannot be written, as on a full disk.
            ImportError: Without Jinja.
        """
        path = _files.check_new("path", path, overwrite=overwrite)
        settings, count, largest = self.settings, len(self.radii), float(self.radii.max())
        norm = norm_label(settings["norm"])
        rows: list[dict[str, Any]] = [
            {"radius": radius, "share": self.accuracy(radius), "interval": self.confidence_interval(radius)}
            for radius in self._radii_to_name
        ]
        # Within the middle one of several.
        shown = rows[:1] if len(rows) == 1 else [rows[0], rows[len(rows) // 2]]
        last = shown[-1]
        labels = [f"proven right within {row['radius']:.4g}" if row["radius"] else "right" for row in shown]
        curve = None
        if len(rows) > 1:
            radii = np.linspace(0, largest, POINTS).tolist()
            shares = [self.accuracy(radius) for radius in radii]
            intervals = [self.confidence_interval(radius) for radius in radii]
            ticks = [row["radius"] for row in rows]
            curve = _page.chart(radii, shares, intervals, ticks=ticks, dots=False)
        what = "the vote of the model under normal noise" if self._has_draws else "the model"
        verdict = (
            f"Of {count:,} test examples, {what} is proven right on {100 * last['share']:.1f} %, whatever change of a "
            f"size ({norm}) of at most {last['radius']:.4g} an attacker makes."
        )
        if not largest and not last["radius"]:
            verdict = f"Of {count:,} test examples, {what} is proven right on none."
        values = {
            "title": _escape.for_terminal(title or f"model {str(self.provenance.get('model', 'unknown'))[:12]}"),
            "verdict": verdict,
            "shares": [row | {"label": label} for row, label in zip(shown, labels, strict=True)],
            "rows": rows,
            "norm": norm,
            "curve": curve,
            "draws": self._about_draws + "." if self._has_draws else "",
            "methods": self._methods(),
            "settings": _page.settings(settings, self.provenance),
        }
        _files.write(path, _page.render("certificates/report.html", values))

    def _methods(self) -> str:
        """Return how the radii were computed, as sentences."""
        settings, end = self.settings, "Intervals over examples are Wilson's, at 95 %."
        if not self._has_draws:
            return f"The radii follow from bounds of all outputs over a box, computed layer by layer. {end}"
        return (
            f"Randomized smoothing (arXiv:1902.02918): the radii follow from a bound of Clopper and Pearson on "
            f"{settings['draws']:,} draws of normal noise of standard deviation {settings['sigma']:g}. Each is wrong "
            f"with a probability of at most {settings['alpha']:g}. {end}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "certified_accuracy": self.accuracy(),
            "abstentions": self.abstentions,
            "per_example": self.per_example,
            "provenance": self.provenance,
        }

    to_json = _files.to_json

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "CertificateReport":
        """Read a file that `to_json` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: If the file holds no certificates, or contradicts itself.
        """
        return _files.parse(path, "CertificateReport.to_json", lambda text: cls._from_content(json.loads(text)))

    @classmethod
    def _from_content(cls, content: Any) -> "CertificateReport":
        rules = {"settings": _schema.DICT, "per_example": _schema.DICT, "provenance": _schema.DICT}
        _schema.check_fields("report", content, rules, may_hold_more=True)
        if content.get("format") != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}. Received: {content.get('format')!r}")
        has_draws = content["settings"].get("method") == "smoothing"
        _schema.check_fields("settings", content["settings"], SETTINGS, may_hold_more=True)
        if has_draws:
            _schema.check_fields("settings", content["settings"], SETTINGS_OF_DRAWS, may_hold_more=True)
        columns = COLUMNS | (COLUMNS_OF_DRAWS if has_draws else {})
        _schema.check_fields("per_example", content["per_example"], columns)
        lengths = {len(values) for values in content["per_example"].values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"`per_example` must hold lists of one length, not empty. Received: {sorted(lengths)}")
        report = cls(*(content[name] for name in rules))
        _check_agreement(report, content)
        return report

    @classmethod
    def merge(cls, reports: Sequence["CertificateReport"]) -> "CertificateReport":
        """Join the reports of disjoint shards of one data set.

        Args:
            reports: The reports, in any order.

        Returns:
            A report on all their examples, equal to that of one run on them.

        Raises:
            ValueError: If there are none, or they are of different runs or share examples.
        """
        kinds = [type(report).__name__ for report in reports if not isinstance(report, cls)]
        if not reports or kinds:
            raise ValueError(f"`reports` must hold reports, at least one. Received: {', '.join(kinds) or 'none'}")
        facts = [_without_shard(report) for report in reports]
        if any(other != facts[0] for other in facts):
            raise ValueError("`reports` must be of one run. Received: two of different settings, models or data")
        per_example = join_rows([report.per_example for report in reports])
        return cls(reports[0].settings | {"shard": None}, per_example, reports[0].provenance)


def _without_shard(report: CertificateReport) -> Any:
    settings = {name: value for name, value in report.settings.items() if name not in ("shard", "batch_size")}
    return settings, {name: report.provenance[name] for name in ("model", "data")}


def _check_agreement(report: CertificateReport, content: dict[str, Any]) -> None:
    """Raise `ValueError` for a report whose numbers contradict each other."""
    columns = report.per_example
    if len(set(columns["index"])) < len(columns["index"]):
        raise ValueError("`per_example.index` must hold each example once")
    for label, prediction, radius in zip(columns["label"], columns["prediction"], columns["radius"], strict=True):
        if radius > 0 and prediction != label:
            raise ValueError(f"`radius` must be 0 where the vote abstains or is wrong. Received: {radius}")
    for name, value in (("certified_accuracy", report.accuracy()), ("abstentions", report.abstentions)):
        if content.get(name) != value:
            raise ValueError(f"`{name}` must follow from the examples: {value}. Received: {content.get(name)!r}")
