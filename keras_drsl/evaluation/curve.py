"""Robust accuracy against the size of the attack."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_drsl.attacks.classifier import class_ids
from keras_drsl.evaluation import files
from keras_drsl.evaluation.evaluate import check_inputs, check_model, check_threat, evaluate_examples, make_plan
from keras_drsl.evaluation.examples import Examples, read_examples
from keras_drsl.evaluation.head import find_logits, unchanged
from keras_drsl.evaluation.report import Check, new_figure, plain, wilson


class RobustnessCurve:
    """What `robustness_curve` found.

    Args:
        eps: the radii, rising.
        breaking_eps: for each example the smallest of the radii at which it was broken, 0 if it is misclassified
            without an attack, infinite if it withstood them all.
        settings: what the evaluation at each radius was given.
        checks: by radius, the outcome of each check there.
    """

    def __init__(
        self, eps: Sequence[float], breaking_eps: Any, settings: dict[str, Any], checks: dict[float, list[Check]]
    ) -> None:
        self.eps = list(eps)
        self.breaking_eps = np.asarray(breaking_eps, dtype="float64")
        self.settings = settings
        self.checks = checks

    @property
    def trustworthy(self) -> bool:
        """False if a check failed at any radius."""
        return all(check.status != "fail" for checks in self.checks.values() for check in checks)

    @property
    def accuracy(self) -> list[float]:
        """The robust accuracy at each radius, in [0, 1], never rising; at radius 0 the clean accuracy."""
        return [float((self.breaking_eps > eps).mean()) for eps in self.eps]

    def __str__(self) -> str:
        lines = (
            [] if self.trustworthy else ["NOT TRUSTWORTHY: a check failed. The accuracies are at best upper bounds."]
        )
        count = len(self.breaking_eps)
        lines.append(f"{'eps':>10}{'robust':>9}   95 % interval, {count} examples, norm {self.settings['norm']}")
        for eps, share in zip(self.eps, self.accuracy, strict=True):
            low, high = wilson(round(share * count), count)
            lines.append(f"{eps:>10.4g}{share:>9.1%}   {low:.1%} to {high:.1%}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        content = {
            "settings": self.settings,
            "eps": self.eps,
            "accuracy": self.accuracy,
            "trustworthy": self.trustworthy,
            "checks": [{"eps": eps, **vars(one)} for eps, checks in self.checks.items() for one in checks],
            "breaking_eps": self.breaking_eps.tolist(),
        }
        return plain(content)

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
        doubt = "" if all(curve.trustworthy for _, curve in curves) else ", NOT TRUSTWORTHY: a check failed"
        if self.settings["suite"] == "quick":
            doubt = ", an upper bound" + doubt
        axes.set_title(f"suite {self.settings['suite']}, {self.settings['examples']} examples{doubt}", fontsize=10)
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
    attacks: Iterable[Any] | None = None,
    from_logits: bool | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    batch_size: int = 256,
    max_samples: int | None = None,
    seed: int = 0,
    verbose: int = 1,
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
        attacks: names of attacks, in place of the suite's.
        from_logits: as for `evaluate_robustness`.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        batch_size: how many examples are attacked together.
        max_samples: how many examples to evaluate, the first ones; None for all.
        seed: the seed of all randomness, >= 0.
        verbose: 0 for silence, 1 for a line a radius.

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
    check_model("model", model)
    threat = {"norm": norm, "clip_min": clip_min, "clip_max": clip_max}
    if isinstance(eps, str) or not isinstance(eps, Iterable):
        raise ValueError(f"`eps` must hold several radii. Received: eps={eps!r}")
    threats = [None if one == 0 else check_threat(one, **threat) for one in eps]
    radii = [0.0 if one is None else one["eps"] for one in threats]
    if not radii or radii != sorted(set(radii)):
        raise ValueError(f"`eps` must hold radii, each larger than the one before. Received: eps={list(eps)}")
    examples = read_examples(x_or_dataset, y, max_samples=max_samples, shard=None)
    plans = []
    for one in threats:
        # Radius 0 is known from any other.
        known = one or check_threat(1e-6 * (clip_max - clip_min), **threat)
        check_inputs(examples.x, known)
        plans.append(
            make_plan(suite, attacks, known, seed=seed, batch_size=batch_size, max_samples=max_samples, shard=None)
        )

    breaking, checks = np.full(len(examples.x), np.inf), {}
    with unchanged(model):
        head = find_logits(model, examples.x[:32], from_logits)
        labels = class_ids(examples.y, len(examples.x), head.classifier.logits(examples.x[:1]).shape[1])
        for start in range(0, len(examples.x), batch_size):
            part = slice(start, start + batch_size)
            breaking[part][head.is_wrong(examples.x[part], labels[part])] = 0.0
        for radius, plan in zip(radii, plans, strict=True):
            standing = np.isinf(breaking)
            if radius == 0 or not standing.any():
                continue
            left = Examples(examples.x[standing], labels[standing], examples.ids[standing], examples.digest)
            report = evaluate_examples(head, None, left, plan, state_path=None, verbose=0)
            broken = [one is not None for one in report.per_example["broken_by"]]
            breaking[np.flatnonzero(standing)[broken]] = radius
            checks[radius] = report.checks
            if verbose:
                print(f"eps {radius:.4g}: robust {np.isinf(breaking).mean():.1%}", flush=True)
    kept = {key: value for key, value in plans[0].settings.items() if key != "eps"}
    return RobustnessCurve(radii, breaking, kept | {"examples": len(breaking)}, checks)
