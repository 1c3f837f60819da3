"""Which images of a report to show, and how."""

from typing import NamedTuple

import numpy as np

from keras_drsl._typing import Array
from keras_drsl.evaluation.results import CLEAN, EvaluationResults


class MisleadingImage(NamedTuple):
    """One image that misleads a model.

    Attributes:
        label: Its true class.
        prediction: The class that the model reads in the changed image.
        confidence: The probability of that class there.
        distance: The size of the change.
        images: The image, the change made ten times as strong on grey, and the changed image; shape
            `(height, width, channels)`, values in [0, 1].
    """

    label: int
    prediction: int
    confidence: float
    distance: float
    images: tuple[Array, ...]


def choose(report: EvaluationResults, count: int) -> list[MisleadingImage]:
    """Return misleading images, one per class in turn, those classes first that are the least robust.

    There are none if the report has no kept examples, or they are no images of one class each.

    Args:
        report: The report.
        count: How many at most.
    """
    if report.kept is None or not report.by_class:
        return []
    x, x_adv, prediction = report.x, report.x_adv, report.prediction  # each is read once
    confidence, distance = report.confidence, report.distance
    if _as_image(x[0]) is None:
        return []
    labels, by_class = np.array(report.per_example["label"]), report.by_class
    broken = np.array([name not in (None, CLEAN) for name in report.per_example["broken_by"]])
    broken &= prediction != labels  # a random model may answer rightly when it is asked again
    order = sorted(by_class, key=lambda class_id: by_class[class_id].robust_accuracy)
    of_class = [np.flatnonzero(broken & (labels == class_id)).tolist() for class_id in order]
    rounds = max(map(len, of_class), default=0)
    rows = [rows[turn] for turn in range(rounds) for rows in of_class if turn < len(rows)][:count]
    low, high = (np.asarray(report.settings.get(name, value)) for name, value in (("clip_min", 0.0), ("clip_max", 1.0)))
    found = []
    for row in rows:
        clean, changed = ((values[row] - low) / (high - low) for values in (x, x_adv))
        images = [_as_image(np.clip(values, 0, 1)) for values in (clean, 0.5 + 10 * (changed - clean), changed)]
        found.append(
            MisleadingImage(
                int(labels[row]),
                int(prediction[row]),
                float(confidence[row]),
                float(distance[row]),
                tuple(image for image in images if image is not None),
            )
        )
    return found


def _as_image(values: Array) -> Array | None:
    """Return an input as an image `(height, width, channels)`, or None if it is none."""
    if values.ndim != 3:
        return None
    if values.shape[-1] in (1, 3):
        return values
    return np.moveaxis(values, 0, -1) if values.shape[0] in (1, 3) else None
