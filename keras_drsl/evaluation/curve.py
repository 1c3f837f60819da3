"""Robust accuracy against the size of the attack."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_drsl.evaluation import files
from keras_drsl.evaluation.evaluate import check_threat, evaluate_robustness
from keras_drsl.evaluation.examples import read_examples
from keras_drsl.evaluation.report import CLEAN, new_figure, wilson


class RobustnessCurve:
    """What `robustness_curve` found.

    Args:
        eps: the radii, rising.
        breaking_eps: for each example the smallest of the radii at which it was broken, 0 if it is misclassified
            without an attack, infinite if it withstood them all.
        settings: what the evaluation at each radius was given.
    """

    def __init__(self, eps: Sequence[float], breaking_eps: Any, settings: dict[str, Any]) -> None:
        self.eps = list(eps)
        self.breaking_eps = np.asarray(breaking_eps, dtype="float64")
        self.settings = settings

    @property
    def accuracy(self) -> list[float]:
        """The robust accuracy at each radius, in [0, 1], never rising; at radius 0 the clean accuracy."""
        return [float((self.breaking_eps > eps).mean()) for eps in self.eps]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        breaking = [None if math.isinf(eps) else eps for eps in self.breaking_eps.tolist()]
        return {"settings": self.settings, "eps": self.eps, "accuracy": self.accuracy, "breaking_eps": breaking}

    def to_json(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write everything to a file.

        Raises:
            ValueError: if the file is there already and `overwrite` is not set, or cannot be written.
        """
        files.write(files.check_new("path", path, overwrite=overwrite), json.dumps(self.to_dict(), indent=1) + "\n")

    def plot(
        self,
        path: str | os.PathLike,
        *,
        label: str | None = None,
        others: Mapping[str, "RobustnessCurve"] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Draw the curve with its 95 % intervals.

        Args:
            path: the figure's file.
            label: what the legend calls the curve.
            others: more curves to draw beside it, by label.
            overwrite: replace a file that is there.

        Raises:
            ValueError: if the file is there already and `overwrite` is not set, or cannot be written.
            ImportError: without matplotlib.
        """
        path = files.check_new("path", path, overwrite=overwrite)
        figure, axes = new_figure()
        curves: list[tuple[str | None, RobustnessCurve]] = [(label, self), *(others or {}).items()]
        for name, curve in curves:
            count = len(curve.breaking_eps)
            bounds = np.array([wilson(round(share * count), count) for share in curve.accuracy])
            (line,) = axes.plot(curve.eps, np.multiply(curve.accuracy, 100), "o-", label=name)
            axes.fill_between(curve.eps, 100 * bounds[:, 0], 100 * bounds[:, 1], color=line.get_color(), alpha=0.2)
        axes.set(xlabel=f"eps (norm {self.settings['norm']})", ylabel="robust accuracy (%)", ylim=(0, 101))
        axes.grid(alpha=0.3)
        if label is not None or others:
            axes.legend()
        figure.savefig(path, dpi=150)


def robustness_curve(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    eps: Sequence[float],
    norm: str | int = "inf",
    suite: str = "standard",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    max_samples: int | None = None,
    verbose: int = 1,
    **knobs: Any,
) -> RobustnessCurve:
    """Robust accuracy against the size of the attack.

    Each radius is evaluated on what the smaller ones left standing, so the accuracy never rises.

    Args:
        model: as for `evaluate_robustness`.
        x_or_dataset: as for `evaluate_robustness`.
        y: as for `evaluate_robustness`.
        eps: the radii, each 0 or more; 0 is the clean accuracy.
        norm: `"inf"` or 2.
        suite: as for `evaluate_robustness`.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        max_samples: how many examples to evaluate, the first ones; None for all.
        verbose: 0 for silence, 1 for progress bars.
        **knobs: `from_logits`, `batch_size`, `seed` of `evaluate_robustness`.

    Returns:
        A `RobustnessCurve`.

    Raises:
        ValueError: as `evaluate_robustness`, before any radius is evaluated.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> x, y = np.random.default_rng(0).random((20, 8)), np.arange(20) % 3
    >>> curve = keras_drsl.robustness_curve(model, x, y, eps=[0, 0.1, 0.2], suite="quick", verbose=0)
    >>> curve.accuracy[0] >= curve.accuracy[1] >= curve.accuracy[2]
    True
    """
    unknown = set(knobs) - {"from_logits", "batch_size", "seed", "attacks"}
    if unknown:
        raise ValueError(f"`robustness_curve` does not take {', '.join(sorted(map(repr, unknown)))}")
    radii = [0.0 if one == 0 else check_threat(one, norm, clip_min, clip_max)["eps"] for one in eps]
    if not radii or radii != sorted(set(radii)):
        raise ValueError(f"`eps` must hold radii, each larger than the one before. Received: eps={list(eps)}")
    examples = read_examples(x_or_dataset, y, max_samples=max_samples, shard=None)
    breaking = np.full(len(examples.x), np.inf)
    threat: dict[str, Any] = {"norm": norm, "clip_min": clip_min, "clip_max": clip_max}
    for radius in [one for one in radii if one > 0] or [float(np.finfo("float32").tiny)]:
        standing = np.flatnonzero(np.isinf(breaking))
        if len(standing) == 0:
            break
        if verbose:
            print(f"eps {radius:.4g}")
        report = evaluate_robustness(
            model,
            examples.x[standing],
            examples.y[standing],
            eps=radius,
            suite=suite,
            verbose=verbose,
            **threat,
            **knobs,
        )
        for place, cause in zip(standing, report.per_example["broken_by"], strict=True):
            if cause is not None:
                breaking[place] = 0.0 if cause == CLEAN else radius
    settings = {"norm": "inf" if norm == math.inf else norm, "suite": suite, "clip_min": clip_min, "clip_max": clip_max}
    return RobustnessCurve(radii, breaking, settings | {"seed": knobs.get("seed", 0), "examples": len(breaking)})
