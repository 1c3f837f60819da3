"""The smallest perturbation that misleads a model, for each example: the robustness curve from one run."""

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _files, _validation
from keras_drsl._typing import Array, Norm, Numbers, Tensor
from keras_drsl.attacks import APGD
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.fmn import find_small_perturbations
from keras_drsl.attacks.gradients import target_class
from keras_drsl.evaluation.curve import RobustnessCurve
from keras_drsl.evaluation.evaluator import Evaluator
from keras_drsl.evaluation.intervals import median_ranks
from keras_drsl.evaluation.progress import Progress
from keras_drsl.evaluation.report_format import to_json_values
from keras_drsl.models.heads import View
from keras_drsl.models.logits import LogitsModel
from keras_drsl.models.state import check_model, preserve_state
from keras_drsl.threat import ThreatModel

EXPLORED = (0.1, 0.01)  # the shares by which searches from new points try to come nearer
PRECISION = 0.001  # the share at which it ends
HALVINGS = 10  # on the way from a point back to its input
CURVE_POINTS = 50


class MinimalDistances:
    """The result of `minimal_distances`.

    Print it for a summary.

    Args:
        distances: The size of the smallest perturbation that was found for each example; 0 where it is misclassified
            without one, infinity where none was found. In the norm and the units of the inputs; with one `eps` per
            feature in units of the largest one.
        x_adv: The perturbed inputs, shape `(count, ...)`; the input itself where the distance is 0 or infinite.
        index: The position of each example in the data set.
        settings: The arguments of the search.
    """

    def __init__(self, distances: Any, x_adv: Array, index: Sequence[int], settings: dict[str, Any]) -> None:
        self.distances = np.asarray(distances, "float64")
        self.x_adv = x_adv
        self.index = list(index)
        self.settings = settings

    @property
    def median(self) -> float:
        """The median distance; infinity where more than half of the examples have none."""
        ordered = np.sort(self.distances)
        low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
        return float(high if math.isinf(high) else (low + high) / 2)

    @property
    def median_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the median, from the ranks of the distances.

        Examples without a distance count as larger than all others, so a limit may be infinity.
        """
        ordered = np.concatenate([[0.0], np.sort(self.distances), [math.inf]])
        low, high = median_ranks(len(self.distances))
        return float(ordered[low]), float(ordered[high])

    def curve(self, eps: Sequence[float] | None = None) -> RobustnessCurve:
        """Return the robust accuracy at radii of your choice, without a new search.

        Args:
            eps: The radii, rising; None for 50 from 0 to the largest distance.

        Raises:
            ValueError: If radii are negative or do not rise.
        """
        if eps is None:
            finite = self.distances[np.isfinite(self.distances)]
            largest = float(finite.max()) if finite.any() else 1.0
            eps = np.linspace(0, largest, CURVE_POINTS).tolist()
        radii = [_validation.check_non_negative("eps", radius) for radius in eps]
        if not radii or sorted(set(radii)) != radii:
            raise ValueError(f"`eps` must hold radii, each larger than the one before. Received: eps={eps}")
        settings = self.settings | {"suite": "minimal distances", "examples": len(self.distances)}
        return RobustnessCurve(radii, self.distances, settings, {})

    def __str__(self) -> str:
        finite = self.distances[np.isfinite(self.distances)]
        low, high = self.median_interval
        wrong, none = int((self.distances == 0).sum()), len(self.distances) - len(finite)
        lines = [
            f"{len(self.distances)} examples, norm {self.settings['norm']}, smallest perturbations that were found",
            f"median           {self.median:.4g}   95 % interval {low:.4g} to {high:.4g}",
            f"smallest, largest {finite.min():.4g}, {finite.max():.4g}" if len(finite) else "",
            f"wrong without one {wrong} examples",
            f"none found        {none} examples",
        ]
        return "\n".join(line for line in lines if line)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the perturbed inputs, as JSON takes it."""
        content = {
            "settings": self.settings,
            "median": self.median,
            "median_interval": list(self.median_interval),
            "index": self.index,
            "distances": self.distances.tolist(),
        }
        values: dict[str, Any] = to_json_values(content)
        return values

    def to_json(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Write everything but the perturbed inputs to a file.

        Args:
            path: The file.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Raises:
            ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
            OSError: If the file cannot be written, as on a full disk.
        """
        _files.write(_files.check_new("path", path, overwrite=overwrite), json.dumps(self.to_dict(), indent=1) + "\n")


def minimal_distances(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    norm: Norm = "inf",
    clip_min: Numbers | None = None,
    clip_max: Numbers | None = None,
    mask: Any = None,
    steps: int = 100,
    from_logits: bool | None = None,
    output: str | int | None = None,
    preprocessing: Callable[[Tensor], Tensor] | None = None,
    attack_input: str | int | None = None,
    task: str = "multiclass",
    which: int | None = None,
    batch_size: int = 256,
    max_samples: int | None = None,
    x_pool: Any = None,
    seed: int = 0,
    verbose: int = 1,
) -> MinimalDistances:
    """Find the smallest perturbation that misleads a model, for each example.

    Use it where no radius is given: it has the robust accuracy at all radii in one run, which no example can raise
    again at a larger one.

    FMN finds a near misclassified point; where it finds none, the way to the nearest image of another class crosses a
    boundary. Then targeted APGD on the margin searches balls that are 10 % smaller than the distance, from random
    points and from the nearest image of each target class, until it fails. Untargeted APGD goes on from the nearest
    point so far, in balls that are smaller by 5 % to 0.2 %. The same two searches follow once more from 1 % on, with
    more steps.

    Note:

    - A distance is an upper bound, as the accuracy of an attack is. No check runs here. On a model that hides its
      gradients, distances are too large: evaluate it at one radius by `evaluate_robustness`, whose checks tell.

    Args:
        model: As in `evaluate_robustness`, not random at inference.
        x_or_dataset: As in `evaluate_robustness`.
        y: As in `evaluate_robustness`.
        norm: `"inf"`, 2 or 1.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        steps: How many steps FMN and the last searches take, >= 1. The others take half as many.
        from_logits: As in `evaluate_robustness`.
        output: As in `evaluate_robustness`.
        preprocessing: As in `evaluate_robustness`.
        attack_input: As in `evaluate_robustness`.
        task: `"multiclass"`, or `"multilabel"`: the distance is then that of the nearest label.
        which: As in `evaluate_robustness`.
        batch_size: How many examples are attacked together.
        max_samples: As in `evaluate_robustness`.
        x_pool: As in `evaluate_robustness`.
        seed: The seed of all randomness, >= 0.
        verbose: 0 for no output, 1 to show progress on `sys.stderr`.

    Returns:
        A `MinimalDistances`.

    Raises:
        ValueError: If an argument is out of its range, inputs lie outside the valid range, labels do not match, or the
            outputs of the model are neither logits nor probabilities.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> x, y = np.random.default_rng(0).random((20, 8)), np.arange(20) % 3
    >>> found = keras_drsl.minimal_distances(model, x, y, steps=10, verbose=0)
    >>> found.curve([0, 0.1]).accuracy[1] <= found.curve([0]).accuracy[0]
    True

    Reference: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints",
    arXiv:2102.12827.
    """
    check_model("model", model)
    steps = _validation.check_integer("steps", steps, at_least=1)
    _validation.check_choice("task", task, ("multiclass", "multilabel"))
    unit = ThreatModel.from_arguments(math.ulp(0.0), norm, clip_min, clip_max, mask=mask)
    unit = unit.with_radius(float(np.min(unit.span)))
    view = View(output, preprocessing, 1, attack_input, task, which, None)
    evaluator = Evaluator(unit, suite="standard", seed=seed, batch_size=batch_size, max_samples=max_samples, view=view)
    examples = evaluator.read_examples(model, x_or_dataset, y)
    settings = {name: value for name, value in evaluator.settings.items() if name not in ("eps", "checks", "shard")}
    with preserve_state(model, preprocessing, inputs=examples.x):
        found = evaluator.find_logits(model, examples, from_logits)
        pool = evaluator.make_pool(found, examples, x_pool)
        logits = found.classifier.logits_in_batches(examples.x, batch_size)
        if not np.isfinite(logits).all():
            raise ValueError("`model` must return finite outputs for all inputs. Received: NaN or infinite ones")
        labels = evaluator.read_labels(examples, logits)
        threat = unit if examples.layout is None else examples.layout.extend(unit)
        search = _Search(found, threat, steps=steps, batch_size=batch_size, seed=seed)
        nearest, distances = examples.x.copy(), np.zeros(len(examples.x))
        with Progress(enabled=bool(verbose)) as progress:
            for start in range(0, len(labels), batch_size):
                part = slice(start, start + batch_size)
                progress.update(f"distances: {start} of {len(labels)} rows", done=start, total=len(labels))
                batch = Batch(
                    examples.x[part],
                    labels[part],
                    examples.ids[part],
                    logits[part],
                    np.zeros(len(labels[part]), int),
                    np.arange(len(labels[part])),
                    pool=pool,
                )
                nearest[part], distances[part] = search.run(batch)
    rows = distances.reshape(-1, examples.num_labels).argmin(axis=1) + np.arange(0, len(distances), examples.num_labels)
    x_adv = nearest[rows] if examples.layout is None else examples.layout.attacked_part(nearest[rows])
    return MinimalDistances(
        distances[rows], x_adv, (examples.ids[rows] // examples.num_labels).tolist(), settings | {"steps": steps}
    )


class _Search:
    """The search for the nearest misclassified point of a batch of examples.

    Args:
        model: The model.
        threat: The norm, the range and the radii of features; of the largest radius only its unit counts.
        steps: The steps of FMN and of the last searches; the others take half as many.
        batch_size: How many rows are attacked together.
        seed: The seed of all randomness.
    """

    def __init__(self, model: LogitsModel, threat: ThreatModel, *, steps: int, batch_size: int, seed: int) -> None:
        self._model = model
        self._threat = threat
        self._steps = steps
        self._batch_size = batch_size
        options: dict[str, Any] = {"threat": threat, "loss": "margin"}
        half = -(-steps // 2)
        self._explorers = [
            APGD(**options, targeted=True, steps=half, seed=seed),
            APGD(**options, targeted=True, steps=half, seed=seed + 1),
        ]
        self._local = APGD(**options, steps=half, seed=seed)

    def run(self, batch: Batch) -> tuple[Array, Array]:
        """Return the nearest misclassified point of each row, and its distance: 0 without one, infinity for none."""
        nearest, distances = batch.x.copy(), np.zeros(len(batch.x))
        rows = np.flatnonzero(~self._misclassifies(batch.x, batch.y))
        if len(rows):
            nearest[rows], distances[rows] = self._search(batch.take(rows))
        return nearest, distances

    def _search(self, batch: Batch) -> tuple[Array, Array]:
        nearest = find_small_perturbations(self._model.classifier, batch, self._threat, self._steps)
        distances = self._distances(nearest, batch)
        self._start_from_pool(batch, nearest, distances)
        self._come_back(batch, nearest, distances, np.arange(len(nearest)))
        shares, left = np.full(len(nearest), EXPLORED[0]), np.flatnonzero(np.isfinite(distances))
        for attack, share in zip(self._explorers, EXPLORED, strict=True):
            # From new points, to all classes.
            shares[left] = np.minimum(shares[left], share)
            rows = left
            while len(rows):
                rows = self._search_nearer(attack, batch, nearest, distances, rows, shares[rows], from_new=True)
            # From the nearest point so far.
            shares[left] = share / 2
            while len(rows := left[shares[left] >= PRECISION]):
                nearer = self._search_nearer(self._local, batch, nearest, distances, rows, shares[rows], from_new=False)
                shares[np.setdiff1d(rows, nearer)] /= 2
        self._confirm(batch, nearest, distances)
        return nearest, distances

    def _search_nearer(
        self,
        attack: APGD,
        batch: Batch,
        nearest: Array,
        distances: Array,
        rows: Array,
        shares: Array,
        *,
        from_new: bool,
    ) -> Array:
        """Attack some rows in balls that are smaller than their distances by a share. Return where that succeeded."""
        some = batch.take(rows)._replace(radius=distances[rows] * (1 - shares))
        if not from_new:
            some = some._replace(start=nearest[rows], pool=None)
        found = attack.run_all(self._model.classifier, some, self._batch_size)
        reached = self._distances(found, some)
        nearer = reached < distances[rows]
        nearest[rows[nearer]], distances[rows[nearer]] = found[nearer], reached[nearer]
        self._come_back(batch, nearest, distances, rows[nearer])
        return np.asarray(rows[nearer])

    def _misclassifies(self, x: Array, y: Array) -> Array:
        return self._model.misclassifies(x, y, self._batch_size)

    def _distances(self, points: Array, batch: Batch) -> Array:
        """Return the distance of each point that is misclassified, infinity for the others."""
        wrong = self._misclassifies(points, batch.y)
        return np.where(wrong, self._threat.size(points.astype("float64") - batch.x), np.inf)

    def _start_from_pool(self, batch: Batch, nearest: Array, distances: Array) -> None:
        """Take the nearest image of another class where there is no point yet."""
        rows = np.flatnonzero(np.isinf(distances))
        if batch.pool is None or not len(rows):
            return
        some = batch.take(rows)
        for rank in range(min(self._explorers[0].targets, batch.logits.shape[-1] - 1)):
            images, _ = batch.pool.nearest(some.x, target_class(some, np.full(len(rows), rank)))
            # Only what may change moves.
            points = ops.convert_to_numpy(self._threat.project(images, some.x, np.full(len(rows), 1e30)))
            reached = self._distances(points, some)
            nearer = reached < distances[rows]
            nearest[rows[nearer]], distances[rows[nearer]] = points[nearer], reached[nearer]

    def _come_back(self, batch: Batch, nearest: Array, distances: Array, rows: Array) -> None:
        """Move points back to their inputs as long as they are misclassified, by halving the way."""
        rows = rows[np.isfinite(distances[rows])]
        if not len(rows):
            return
        some, points = batch.take(rows), nearest[rows]
        low, high = np.zeros(len(rows)), distances[rows].copy()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried = ops.convert_to_numpy(self._threat.project(points, some.x, middle))
            reached = self._distances(tried, some)
            is_wrong = np.isfinite(reached)
            low, high = np.where(is_wrong, low, middle), np.where(is_wrong, middle, high)
            nearer = reached < distances[rows]
            nearest[rows[nearer]], distances[rows[nearer]] = tried[nearer], reached[nearer]

    def _confirm(self, batch: Batch, nearest: Array, distances: Array) -> None:
        """Ask once more for all points together, and move those a little further that rounding had made wrong."""
        found = np.isfinite(distances)
        for factor in (1.0, 1 + 1e-5, 1 + 1e-4, 1 + 1e-3, 1 + 1e-2):
            rows = np.flatnonzero(found & np.isinf(distances)) if factor > 1 else np.flatnonzero(found)
            if len(rows):
                some = batch.take(rows)
                further = some.x + np.float32(factor) * (nearest[rows] - some.x)
                tried = ops.convert_to_numpy(self._threat.project(further, some.x, np.full(len(rows), 1e30)))
                nearest[rows], distances[rows] = tried, self._distances(tried, some)
        nearest[np.isinf(distances)] = batch.x[np.isinf(distances)]
