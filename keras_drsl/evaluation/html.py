"""A report as an HTML page: verdict, trust, images, classes and how they were measured."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keras_drsl import _escape, _page
from keras_drsl._intervals import wilson
from keras_drsl._typing import Array
from keras_drsl.evaluation import gallery
from keras_drsl.evaluation.rendering import ADVICE, attack_label, by_severity, count_checks, waterfall
from keras_drsl.evaluation.results import UPPER_BOUND, Check, EvaluationResults
from keras_drsl.plotting import norm_label

MAX_IMAGES = 12
MAX_MATRIX = 20  # classes of a matrix that a page can show
BIBTEX = """\
@misc{keras-drsl,
  title = {keras-drsl: classifiers that withstand attack, for Keras},
  note = {Version %s},
}
@inproceedings{croce2020reliable,
  title = {Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks},
  author = {Francesco Croce and Matthias Hein},
  booktitle = {ICML},
  year = {2020},
}"""


class Curve(Protocol):
    """What a page shows of a `keras_drsl.RobustnessCurve`."""

    eps: list[float]
    settings: dict[str, Any]

    @property
    def accuracy(self) -> list[float]:
        """The robust accuracy at each radius."""

    @property
    def confidence_intervals(self) -> list[tuple[float, float]]:
        """Their intervals."""


class Distances(Protocol):
    """What a page shows of `keras_drsl.MinimalDistances`."""

    settings: dict[str, Any]

    @property
    def median(self) -> float:
        """The median distance."""

    @property
    def median_interval(self) -> tuple[float, float]:
        """Its interval."""


@runtime_checkable
class Comparison(Protocol):
    """What a page shows of what `keras_drsl.compare` returns."""

    names: tuple[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything that it found."""


def render(
    report: EvaluationResults,
    *,
    title: str | None = None,
    curve: Curve | None = None,
    distances: Distances | None = None,
    comparisons: Sequence[Comparison] = (),
    page: bool = True,
) -> str:
    """Return a report as HTML.

    Args:
        report: The report.
        title: The name of the model; None for the first characters of its fingerprint.
        curve: A curve to show, or None.
        distances: The smallest perturbations of the examples, or None.
        comparisons: Comparisons with other models to show.
        page: Whether to return a whole page, or the part that a notebook shows.

    Raises:
        ImportError: Without Jinja, or without Pillow where there are images.
    """
    # Once, as it may be read from a file.
    counts = report.read_as if page and report.kept is not None and report.by_class else None
    fingerprint = str(report.provenance.get("model", "unknown"))[:12]
    values = {
        "page": page,
        "report": report,
        "title": _escape.for_terminal(title or f"model {fingerprint}"),
        "verdict": _verdict(report),
        "upper_bound": report.settings["suite"] in UPPER_BOUND,
        "accuracies": _accuracies(report),
        "trust": _trust(report),
        "problems": [_describe(check) for check in by_severity(report) if check.status in ("fail", "warn")],
        "checks": [_describe(check) for check in by_severity(report)],
        "waterfall": _waterfall(report),
        "may_hold_images": bool(report.by_class),
        "gallery": _gallery(report) if page else [],
        "classes": _classes(report, counts) if page else [],
        "confused": "" if counts is None else _most_confused(report, counts),
        "read_as": None if counts is None else _read_as(report, counts),
        "curve": None if curve is None else _chart(curve, report),
        "distances": "" if distances is None else _distances(distances),
        "comparisons": _comparisons(comparisons),
        "methods": _methods(report),
        "settings": _page.settings(report.settings, report.provenance),
        "bibtex": BIBTEX % report.provenance.get("versions", {}).get("keras-drsl", "unknown"),
    }
    return _page.render("evaluation/report.html", values)


def _verdict(report: EvaluationResults) -> str:
    things = "positions" if report.num_positions is not None else "examples"
    count = report.num_positions or report.num_examples
    return (
        f"Of {count:,} test {things}, the model gets {100 * report.clean_accuracy:.1f} % right, and still "
        f"{100 * report.robust_accuracy:.1f} % if {_threat(report)}."
    )


def _threat(report: EvaluationResults) -> str:
    """Return what an attacker may do, in plain words and in the units of the inputs."""
    settings = report.settings
    low, high = np.min(settings.get("clip_min", 0.0)), np.max(settings.get("clip_max", 1.0))
    least, most = np.min(settings["eps"]), np.max(settings["eps"])
    size = f"{most:.4g}" if least == most else f"{least:.4g} to {most:.4g}, by feature,"
    of_range = f"on a scale from {low:g} to {high:g}"
    masked = ", except for those that are fixed" if settings.get("mask") is not None else ""
    if settings["norm"] == "inf":
        return f"an attacker changes every input value{masked} by at most {size} {of_range}"
    if settings["norm"] == 1:
        return f"an attacker makes changes{masked} that add up to at most {size} (L1) {of_range}"
    return f"an attacker makes a change{masked} of a length (L2) of at most {size} {of_range}"


def _accuracies(report: EvaluationResults) -> list[dict[str, Any]]:
    figures = [
        {"share": report.robust_accuracy, "label": "robust accuracy", "interval": report.confidence_interval},
    ]
    if report.num_positions is None:
        right = round(report.clean_accuracy * report.num_examples)
        interval = wilson(right, report.num_examples)
        figures.insert(0, {"share": report.clean_accuracy, "label": "right without an attack", "interval": interval})
    return figures


def _trust(report: EvaluationResults) -> str:
    if not report.checks:
        return "No check ran, so nothing speaks for or against these numbers."
    others = any(check.status in ("fail", "warn") for check in report.checks)
    return count_checks(report) + (". The others, and what to do:" if others else ". What they test is listed below.")


def _describe(check: Check) -> dict[str, str]:
    return {
        "status": check.status,
        "title": _escape.for_terminal(check.name.replace("_", " ")),
        "figure": "" if math.isnan(check.value) else f"{check.value:.4g}",
        "message": _escape.for_terminal(check.message[:1].upper() + check.message[1:]),
        "advice": ADVICE.get(check.name, ""),
    }


def _waterfall(report: EvaluationResults) -> list[dict[str, Any]]:
    stages = waterfall(report)
    return [
        {"label": _escape.for_terminal(label), "before": before, "after": after}
        for (_, before), (label, after) in zip([stages[0], *stages], stages, strict=False)
    ]


def _name(report: EvaluationResults, class_id: int) -> str:
    """Return the name of a class, or its id."""
    names = report.provenance.get("classes") or []
    return _escape.for_terminal(names[class_id]) if class_id < len(names) else str(class_id)


def _classes(report: EvaluationResults, counts: Array | None) -> list[dict[str, Any]]:
    rows = []
    for class_id, found in report.by_class.items():
        others = "" if counts is None else _most_often(report, counts, class_id)
        rows.append({"name": _name(report, class_id), "found": found, "read_as": others})
    return rows


def _most_often(report: EvaluationResults, counts: Array, class_id: int) -> str:
    """Return as which other class the examples of a class are read most often."""
    row = counts[class_id].copy()
    row[class_id] = 0
    return f"{_name(report, int(row.argmax()))} ({row.max()})" if row.any() else "none"


def _most_confused(report: EvaluationResults, counts: Array) -> str:
    """Return which class is read as which other one most often, as a sentence; empty where there is none."""
    others = counts * (1 - np.eye(len(counts), dtype=int))
    true, other = (int(index) for index in np.unravel_index(others.argmax(), others.shape))
    if not others[true, other]:
        return ""
    count, total = others[true, other], report.by_class[true].num_examples
    return f"Most confused: {_name(report, true)}, read as {_name(report, other)} in {count} of {total} examples."


def _read_as(report: EvaluationResults, counts: Array) -> dict[str, Any] | None:
    """Return the table of true and read classes, or None where it is too large."""
    if len(counts) > MAX_MATRIX:
        return None
    names = [_name(report, class_id) for class_id in range(len(counts))]
    rows = []
    for class_id in report.by_class:
        row = counts[class_id]
        cells = [
            {"count": int(count), "share": count / row.sum(), "same": other == class_id}
            for other, count in enumerate(row)
        ]
        rows.append({"name": names[class_id], "cells": cells})
    return {"names": names, "rows": rows}


def _gallery(report: EvaluationResults) -> list[dict[str, Any]]:
    """Return misleading images as a page shows them."""
    return [
        {
            **dict(zip(("x", "change", "x_adv"), map(_png, item.images), strict=True)),
            "label": _name(report, item.label),
            "prediction": _name(report, item.prediction),
            "confidence": item.confidence,
            "distance": f"{item.distance:.3g} ({norm_label(report.settings['norm'])})",
        }
        for item in gallery.choose(report, MAX_IMAGES)
    ]


def _png(image: Array) -> str:
    """Return an image of values in [0, 1] as a PNG file in base 64."""
    _page.check_installed("PIL.Image")
    from PIL import Image

    pixels = np.rint(255 * image).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _chart(curve: Curve, report: EvaluationResults) -> dict[str, Any]:
    """Return what a page shows of a curve."""
    eps = float(np.max(report.settings["eps"]))
    drawing = _page.chart(curve.eps, curve.accuracy, curve.confidence_intervals, ticks=curve.eps, dots=True, marked=eps)
    return drawing | {"suite": "" if curve.settings["suite"] == report.settings["suite"] else _suite_of(curve)}


def _distances(distances: Distances) -> str:
    """Return the median distance as a sentence."""
    norm = norm_label(distances.settings["norm"])
    if math.isinf(distances.median):
        return "For more than half of the examples, no perturbation was found that misleads the model."
    low, high = distances.median_interval
    return (
        f"Half of the examples are misread after a change of at most {distances.median:.3g} ({norm}; 95 % interval of "
        f"this median {low:.3g} to {high:.3g})."
    )


def _comparisons(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return how two models compare, one row per comparison and accuracy."""
    rows = []
    for comparison in comparisons:
        found = comparison.to_dict()
        names = [_escape.for_terminal(name) for name in found["names"]]
        for kind, label in (("robust", "robust"), ("clean", "without an attack")):
            one_sided = [found[kind][side] for side in ("only_first", "only_second")]
            rows.append(
                {
                    "names": names,
                    "label": label,
                    "trustworthy": found["trustworthy"],
                    "one_sided": "" if None in one_sided else " and ".join(map(str, one_sided)),
                    **{name: found[kind][name] for name in ("first", "second", "value", "over_images", "over_seeds")},
                }
            )
    return rows


def _suite_of(curve: Curve) -> str:
    """Return as a sentence how a curve was measured that need not meet its report at the same radius."""
    name = _escape.for_terminal(str(curve.settings["suite"]))
    above = "Its accuracies are upper bounds: at the evaluated eps" if name in UPPER_BOUND else "At the evaluated eps"
    return f"The curve was measured with the suite {name}. {above} it may lie above the accuracy of this report."


def _methods(report: EvaluationResults) -> str:
    settings, attacks = report.settings, [name for name in report.accuracy if not name.startswith("check:")]
    listed = ", ".join(_escape.for_terminal(attack_label(name)) for name in attacks) or "none"
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    return (
        f"We attacked {report.num_examples} examples with the suite {_escape.for_terminal(settings['suite'])} of "
        f"keras-drsl{seed}: {listed}. An example counts as robust if the model classifies it correctly after all "
        "attacks and checks, and as broken if one perturbed input within the threat model is misclassified. Intervals "
        "are Wilson's, at 95 %."
    )
