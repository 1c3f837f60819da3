"""Robust accuracy against the radius of the attack."""

import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_drsl import _files, _validation
from keras_drsl._intervals import of_ratio, wilson
from keras_drsl._typing import Array, Norm, Numbers, Tensor
from keras_drsl.evaluation.evaluator import Evaluator
from keras_drsl.evaluation.report_format import to_json_values
from keras_drsl.evaluation.results import UPPER_BOUND, Check
from keras_drsl.models.classifier import count_wrong, is_misclassified, num_predictions
from keras_drsl.models.heads import View
from keras_drsl.models.state import check_model, preserve_state
from keras_drsl.plotting import begin_axes, draw_shares, finish_axes, norm_label
from keras_drsl.threat import ThreatModel


class RobustnessCurve:
    """The result of `robustness_curve`.

    Args:
        eps: The radii, rising.
        breaking_eps: For each example the smallest of the radii at which it was broken, 0 if it is misclassified
            without an attack, infinity if it withstood them all.
        settings: The arguments of the evaluation at each radius.
        checks: By radius, the outcome of each check there.
        positions: For a model of positions, how many count of each example. `breaking_eps` then has a value for each
            position that counts, example by example. Otherwise None.
    """

    def __init__(
        self,
        eps: Sequence[float],
        breaking_eps: Any,
        settings: dict[str, Any],
        checks: dict[float, list[Check]],
        positions: Sequence[int] | None = None,
    ) -> None:
        self.eps = list(eps)
        self.breaking_eps = np.asarray(breaking_eps, dtype="float64")
        self.settings = settings
        self.checks = checks
        self.positions = None if positions is None else list(positions)

    @property
    def trustworthy(self) -> bool:
        """False if a check failed at any radius."""
        return all(check.status != "fail" for checks in self.checks.values() for check in checks)

    @property
    def accuracy(self) -> list[float]:
        """The robust accuracy at each radius, in [0, 1], never rising; at radius 0 the clean accuracy."""
        return [float((self.breaking_eps > eps).mean()) for eps in self.eps]

    @property
    def confidence_intervals(self) -> list[tuple[float, float]]:
        """The 95 % confidence interval of each accuracy, as that of `RobustnessReport`."""
        if self.positions is not None:
            parts = np.split(self.breaking_eps, np.cumsum(self.positions)[:-1])
            return [of_ratio([int((part <= eps).sum()) for part in parts], self.positions) for eps in self.eps]
        count = len(self.breaking_eps)
        return [wilson(round(share * count), count) for share in self.accuracy]

    def __str__(self) -> str:
        lines = (
            [] if self.trustworthy else ["NOT TRUSTWORTHY: a check failed. The accuracies are upper bounds at best."]
        )
        if self.settings["suite"] in UPPER_BOUND:
            lines.append(f"Each accuracy is an upper bound, of suite {self.settings['suite']}.")
        count = len(self.breaking_eps) if self.positions is None else len(self.positions)
        lines.append(f"{'eps':>10}{'robust':>9}   95 % interval, {count} examples, norm {self.settings['norm']}")
        for eps, share, (low, high) in zip(self.eps, self.accuracy, self.confidence_intervals, strict=True):
            lines.append(f"{eps:>10.4g}{share:>9.1%}   {low:.1%} to {high:.1%}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        content = {
            "settings": self.settings,
            "eps": self.eps,
            "accuracy": self.accuracy,
            "trustworthy": self.trustworthy,
            "checks": [{"eps": eps, **vars(check)} for eps, checks in self.checks.items() for check in checks],
            "breaking_eps": self.breaking_eps.tolist(),
        }
        if self.positions is not None:
            content["positions"] = self.positions
        values: dict[str, Any] = to_json_values(content)
        return values

    to_json = _files.to_json

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        label: str | None = None,
        others: Mapping[str, "RobustnessCurve"] | None = None,
        ax: Any = None,
        overwrite: bool = True,
    ) -> Any:
        """Draw the curve with its 95 % intervals.

        Args:
            path: The file of the figure, or None for no file. Its ending names the kind of figure, such as `.png`.
            label: The name of the curve in the legend.
            others: More curves to draw beside it, by label.
            ax: The Matplotlib axes to draw in; None for a figure of its own.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Returns:
            The axes.

        Raises:
            ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
            OSError: If the file cannot be written, as on a full disk.
            ImportError: Without matplotlib.
        """
        path, axes = begin_axes(path, ax, overwrite=overwrite)
        curves: list[tuple[str | None, RobustnessCurve]] = [(label, self), *(others or {}).items()]
        for name, curve in curves:
            draw_shares(axes, curve.eps, curve.accuracy, curve.confidence_intervals, name, "o-")
        axes.set(xlabel=f"eps ({norm_label(self.settings['norm'])})", ylabel="robust accuracy (%)", ylim=(0, 101))
        doubt = "" if all(curve.trustworthy for _, curve in curves) else ", NOT TRUSTWORTHY: a check failed"
        if self.settings["suite"] in UPPER_BOUND:
            doubt = ", an upper bound" + doubt
        axes.set_title(f"suite {self.settings['suite']}, {self.settings['examples']} examples{doubt}", fontsize=10)
        return finish_axes(axes, path, is_own=ax is None, columns=2 if label is not None or others else 0)


def robustness_curve(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    eps: Sequence[float],
    norm: Norm | None = None,
    clip_min: Numbers | None = None,
    clip_max: Numbers | None = None,
    mask: Any = None,
    threat: ThreatModel | None = None,
    suite: str = "standard",
    attacks: Iterable[Any] | None = None,
    checks: str | Iterable[Any] | None = None,
    from_logits: bool | None = None,
    output: str | int | None = None,
    preprocessing: Callable[[Tensor], Tensor] | None = None,
    expectation_draws: int = 1,
    attack_input: str | int | None = None,
    task: str = "multiclass",
    which: int | None = None,
    ignore_class: int | None = None,
    batch_size: int = 256,
    max_samples: int | None = None,
    x_pool: Any = None,
    seed: int = 0,
    verbose: int = 1,
) -> RobustnessCurve:
    """Measure the robust accuracy at several radii.

    Use it to see at which size of attack a model fails. Each radius is evaluated on the examples that withstood the
    smaller ones, so the accuracy never rises.

    Args:
        model: As in `evaluate_robustness`.
        x_or_dataset: As in `evaluate_robustness`.
        y: As in `evaluate_robustness`.
        eps: The radii, each 0 or more and rising; at 0 the curve has the clean accuracy.
        norm: `"inf"` (the default), 2 or 1.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        threat: A `keras_drsl.ThreatModel` in place of `norm`, `clip_min`, `clip_max` and `mask`. Its `eps` is not used.
        suite: As in `evaluate_robustness`.
        attacks: Names of attacks, in place of those of the suite.
        checks: As in `evaluate_robustness`.
        from_logits: As in `evaluate_robustness`.
        output: As in `evaluate_robustness`.
        preprocessing: As in `evaluate_robustness`.
        expectation_draws: As in `evaluate_robustness`.
        attack_input: As in `evaluate_robustness`.
        task: As in `evaluate_robustness`.
        which: As in `evaluate_robustness`.
        ignore_class: As in `evaluate_robustness`.
        batch_size: How many examples are attacked together.
        max_samples: As in `evaluate_robustness`.
        x_pool: As in `evaluate_robustness`.
        seed: The seed of all randomness, >= 0.
        verbose: 0 for no output, 1 for one line per radius, and progress as in `evaluate_robustness`.

    Returns:
        A `RobustnessCurve`.

    Raises:
        ValueError: As in `evaluate_robustness`, before any radius is evaluated.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> x, y = np.random.default_rng(0).random((20, 8)), np.arange(20) % 3
    >>> curve = keras_drsl.robustness_curve(model, x, y, eps=[0, 0.1, 0.2], suite="quick", verbose=0)
    >>> curve.accuracy[0] >= curve.accuracy[1] >= curve.accuracy[2]
    True
    """
    check_model("model", model)
    threats = _threats(eps, norm, clip_min, clip_max, mask, threat)
    # Each radius makes its own evaluator, so a generator must not be used up by the first one.
    attacks = list(attacks) if isinstance(attacks, Iterator) else attacks
    checks = list(checks) if isinstance(checks, Iterator) else checks
    options: dict[str, Any] = {
        "seed": seed,
        "batch_size": batch_size,
        "max_samples": max_samples,
        "view": View(output, preprocessing, expectation_draws, attack_input, task, which, ignore_class),
    }
    evaluators = {
        radius: Evaluator(threat, suite=suite, attacks=attacks, checks=checks, **options)
        for radius, threat in threats.items()
    }
    first, *others = evaluators.values()
    examples = first.read_examples(model, x_or_dataset, y)
    for evaluator in others:
        evaluator.check_examples(examples)
    num_examples, found = len(examples.x) // examples.num_labels, {}
    with preserve_state(model, preprocessing, inputs=examples.x):
        logits_model = first.find_logits(model, examples, from_logits)
        logits_model.seed(seed, "clean")
        outputs = logits_model.model.logits_in_batches(examples.x, batch_size)
        labels = first.read_labels(examples, outputs)
        examples = examples._replace(y=labels)
        # How many predictions of each example are wrong, at each radius so far. All labels together are one prediction.
        if labels.ndim == 2:
            counts, wrong = num_predictions(labels), count_wrong(outputs, labels)
        else:
            counts = np.ones(num_examples, int)
            wrong = examples.any_label(is_misclassified(outputs, labels)).astype(int)
        broken_at = [(0.0, wrong)]
        pool = first.make_pool(logits_model, examples, x_pool)
        for radius, evaluator in evaluators.items():
            robust = wrong < counts
            if radius == 0 or not robust.any():
                continue
            report = evaluator.evaluate(
                logits_model, examples.select(robust), pool=pool, verbose=verbose, title=f"eps {radius:.4g}, "
            )
            if labels.ndim == 2:
                reached = [row[-1] for row in report.per_example["wrong"]]
            else:
                reached = [int(name is not None) for name in report.per_example["broken_by"]]
            wrong = wrong.copy()
            wrong[robust] = np.maximum(wrong[robust], reached)
            broken_at.append((radius, wrong))
            found[radius] = report.checks
            if verbose:
                print(f"eps {radius:.4g}: robust {1 - wrong.sum() / counts.sum():.1%}", flush=True)
    settings = {key: value for key, value in first.settings.items() if key != "eps"} | {"examples": num_examples}
    positions = None if labels.ndim == 1 else counts.tolist()
    return RobustnessCurve(list(threats), _breaking_eps(broken_at, counts), settings, found, positions)


def _breaking_eps(broken_at: list[tuple[float, Array]], counts: Array) -> Array:
    """Return at which radius each prediction broke, of how many of each example are wrong at rising radii."""
    radii = [radius for radius, _ in broken_at] + [math.inf]
    totals = np.stack([wrong for _, wrong in broken_at] + [counts])
    at_each = np.diff(totals, axis=0, prepend=0)
    return np.concatenate([np.repeat(radii, at_each[:, example]) for example in range(len(counts))])


def _threats(
    eps: Any, norm: Norm | None, clip_min: Any, clip_max: Any, mask: Any, threat: ThreatModel | None
) -> dict[float, ThreatModel]:
    """Return the threat model of each radius. Radius 0 has a tiny one, which is never attacked."""
    if isinstance(eps, str) or not isinstance(eps, Iterable):
        raise ValueError(f"`eps` must hold several radii. Received: eps={eps!r}")
    radii = list(eps)
    if threat is None:
        # The smallest positive number fits any range, so an error is about the range.
        threat = ThreatModel.from_arguments(math.ulp(0.0), norm, clip_min, clip_max, mask=mask)
    else:
        threat = ThreatModel.from_arguments(None, norm, clip_min, clip_max, threat, mask)
    base = threat.with_radius(1e-6 * float(np.min(threat.span)))
    threats = {}
    for radius in radii:
        known = base if isinstance(radius, numbers.Real) and radius == 0 else _with_eps(base, radius)
        threats[0.0 if known is base else known.radius] = known
    if not radii or list(threats) != sorted(threats) or len(threats) != len(radii):
        raise ValueError(f"`eps` must hold radii, each larger than the one before. Received: eps={radii}")
    return threats


def _with_eps(threat: ThreatModel, eps: Any) -> ThreatModel:
    """Return a threat model with another radius, or with others for its features."""
    if isinstance(threat.eps, tuple) and isinstance(eps, numbers.Real):
        return threat.with_radius(_validation.check_positive("eps", eps))
    return threat.replace(eps=eps)
