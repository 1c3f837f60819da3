"""The smallest perturbation that misleads a model, for each example: the robustness curve from one run."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _files, _validation
from keras_drsl._intervals import median_ranks
from keras_drsl._progress import Progress
from keras_drsl._typing import Array, Norm, Numbers, Tensor
from keras_drsl.attacks import APGD
from keras_drsl.attacks.base import Batch
from keras_drsl.attacks.fmn import find_small_perturbations
from keras_drsl.attacks.gradients import target_class
from keras_drsl.evaluation.curve import RobustnessCurve
from keras_drsl.evaluation.evaluator import Evaluator
from keras_drsl.evaluation.report_format import to_json_values
from keras_drsl.evaluation.results import DISTANCES
from keras_drsl.models.heads import View
from keras_drsl.models.logits import NUM_TRIED, LogitsModel
from keras_drsl.models.state import check_model, preserve_state
from keras_drsl.threat import ThreatModel

# Searches from new points: their losses, their steps in those of FMN, and the shares by which they try to come nearer.
EXPLORED = (("margin", 0.5, 0.1), ("margin", 0.5, 0.01), ("dlr", 1.0, 0.002))
PRECISION = 0.001  # the share at which searches from the nearest point so far end
LAST = 0.001  # the share by which a last search to all classes tries to come nearer
HALVINGS = 10  # on the way from a point back to its input
ANYWHERE = 1e30  # a radius that leaves the range as the only limit
CURVE_POINTS = 50


class MinimalDistances:
    """The result of `minimal_distances`.

    Print it for a summary.

    Args:
        distances: The size of the smallest perturbation that was found for each example; 0 where it is misclassified
            without one, infinity where none was found. In the norm and the units of the inputs.
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
        settings = self.settings | {"suite": DISTANCES, "examples": len(self.distances)}
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
        """Return everything but the perturbed inputs, as JSON takes it, with None in place of infinity."""
        content = {
            "settings": self.settings,
            "median": self.median,
            "median_interval": list(self.median_interval),
            "index": self.index,
            "distances": self.distances.tolist(),
        }
        values: dict[str, Any] = to_json_values(content)
        return values

    to_json = _files.to_json


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
    point so far, in balls that are smaller by 5 % to 0.2 %. The same two searches follow once more from 1 % on. Then
    the targeted one takes the difference-of-logits ratio, from random points, by 0.2 %. Last comes a targeted search
    on the margin from the nearest point, by 0.1 %.

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
        steps: How many steps FMN takes, >= 1. Each search by APGD takes half as many, on the ratio as many.
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
            outputs of the model are neither logits nor probabilities, not finite, or random.

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
    left_out = ("eps", "suite", "checks", "shard")  # of no meaning here
    settings = {name: value for name, value in evaluator.settings.items() if name not in left_out}
    with preserve_state(model, preprocessing, inputs=examples.x):
        found = evaluator.find_logits(model, examples, from_logits)
        pool = evaluator.make_pool(found, examples, x_pool)
        logits = found.classifier.logits_in_batches(examples.x, batch_size)
        if not np.isfinite(logits).all():
            raise ValueError("`model` must return finite outputs for all inputs. Received: NaN or infinite ones")
        if not np.allclose(found.classifier.logits(examples.x[:NUM_TRIED]), logits[:NUM_TRIED], rtol=1e-2, atol=1e-2):
            raise ValueError(
                "`model` must give the same answer twice: by chance, a random model misreads any input. Use "
                "`evaluate_robustness(..., expectation_draws=)`. Received: a model that is random at inference"
            )
        labels = evaluator.read_labels(examples, logits)
        threat = unit if examples.layout is None else examples.layout.extend(unit)
        search = _Search(found, threat, steps=steps, batch_size=batch_size, seed=seed)
        zeros = np.zeros(len(labels), int)
        whole = Batch(examples.x, labels, examples.ids, logits, zeros, np.arange(len(labels)), pool=pool)
        nearest, distances = examples.x.copy(), np.zeros(len(examples.x))
        with Progress(enabled=bool(verbose)) as progress:
            for start in range(0, len(labels), batch_size):
                part = np.arange(start, min(start + batch_size, len(labels)))

                def show(what: str, done: int = start) -> None:
                    progress.update(f"distances, {done} of {len(labels)} done: {what}", done=done, total=len(labels))

                nearest[part], distances[part] = search.run(whole.take(part), show)
    rows = distances.reshape(-1, examples.num_labels).argmin(axis=1) + np.arange(0, len(distances), examples.num_labels)
    x_adv = nearest[rows] if examples.layout is None else examples.layout.attacked_part(nearest[rows])
    return MinimalDistances(
        distances[rows], x_adv, (examples.ids[rows] // examples.num_labels).tolist(), settings | {"steps": steps}
    )


class _Nearest:
    """The nearest misclassified point of each row of a batch so far.

    Args:
        model: The model.
        threat: The norm, the range and the radii of features.
        batch: The rows.
        batch_size: How many points are classified together.

    Attributes:
        x_adv: The points; the input where there is none.
        distances: Their distances, infinity where there is none.
    """

    def __init__(self, model: LogitsModel, threat: ThreatModel, batch: Batch, batch_size: int) -> None:
        self._model = model
        self._threat = threat
        self._batch = batch
        self._batch_size = batch_size
        self.x_adv, self.distances = batch.x.copy(), np.full(len(batch.x), np.inf)

    def offer(self, rows: Array, points: Array) -> Array:
        """Take points that are misclassified and nearer than those so far, and return where they are misclassified."""
        if not len(rows):
            return np.zeros(0, bool)
        wrong = self._model.misclassifies(points, self._batch.y[rows], self._batch_size)
        reached = np.where(wrong, self._threat.size(points.astype("float64") - self._batch.x[rows]), np.inf)
        nearer = reached < self.distances[rows]
        self.x_adv[rows[nearer]], self.distances[rows[nearer]] = points[nearer], reached[nearer]
        return wrong

    def come_back(self, rows: Array) -> None:
        """Move points back to their inputs as long as they are misclassified, by halving the way."""
        rows = rows[np.isfinite(self.distances[rows])]
        points, low, high = self.x_adv[rows], np.zeros(len(rows)), self.distances[rows].copy()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            wrong = self.offer(rows, self._project(points, rows, middle))
            low, high = np.where(wrong, low, middle), np.where(wrong, middle, high)

    def offer_images(self, num_targets: int) -> None:
        """Offer the nearest image of each class in the pool to rows without a point.

        Args:
            num_targets: How many classes each row tries, and more if it has no point then.
        """
        rows, pool = np.flatnonzero(np.isinf(self.distances)), self._batch.pool
        for rank in range(self._batch.logits.shape[-1] - 1):
            rows = rows if rank < num_targets else rows[np.isinf(self.distances[rows])]
            if pool is not None and len(rows):
                some = self._batch.take(rows)
                images, _ = pool.nearest(some.x, target_class(some, np.full(len(rows), rank)))
                self.offer(rows, self._project(images, rows, np.full(len(rows), ANYWHERE)))

    def confirm(self) -> None:
        """Ask once more for all points together, and move those a little further that rounding had made wrong."""
        rows, points, distances = np.flatnonzero(np.isfinite(self.distances)), self.x_adv.copy(), self.distances.copy()
        self.distances[rows] = np.inf
        rows = rows[~self.offer(rows, points[rows])]
        for factor in (1e-5, 1e-4, 1e-3, 1e-2):
            further = points[rows] + np.float32(factor) * (points[rows] - self._batch.x[rows])
            rows = rows[~self.offer(rows, self._project(further, rows, np.full(len(rows), ANYWHERE)))]
        # They were misclassified in another batch.
        self.x_adv[rows], self.distances[rows] = points[rows], distances[rows]

    def _project(self, points: Array, rows: Array, radius: Array) -> Array:
        return np.asarray(ops.convert_to_numpy(self._threat.project(points, self._batch.x[rows], radius)))


class _Search:
    """The search for the nearest misclassified point of a batch of examples.

    Args:
        model: The model.
        threat: The norm, the range and the radii of features; of the largest radius only its unit counts.
        steps: The steps of FMN; see `EXPLORED` for those of APGD.
        batch_size: How many rows are attacked together.
        seed: The seed of all randomness.
    """

    def __init__(self, model: LogitsModel, threat: ThreatModel, *, steps: int, batch_size: int, seed: int) -> None:
        self._model = model
        self._threat = threat
        self._steps = steps
        self._batch_size = batch_size
        self._explorers = [
            APGD(threat=threat, loss=loss, targeted=True, steps=math.ceil(share * steps), seed=seed + number)
            for number, (loss, share, _) in enumerate(EXPLORED)
        ]
        self._local = APGD(threat=threat, loss="margin", steps=math.ceil(steps / 2), seed=seed)

    def run(self, batch: Batch, show: Callable[[str], None]) -> tuple[Array, Array]:
        """Return the nearest misclassified point of each row, and its distance: 0 without one, infinity for none.

        Args:
            batch: The rows.
            show: Takes what is done, for progress.
        """
        nearest, distances = batch.x.copy(), np.zeros(len(batch.x))
        rows = np.flatnonzero(~self._model.misclassifies(batch.x, batch.y, self._batch_size))
        if len(rows):
            found = self._search(batch.take(rows), show)
            nearest[rows], distances[rows] = found.x_adv, found.distances
        return nearest, distances

    def _search(self, batch: Batch, show: Callable[[str], None]) -> _Nearest:
        show("FMN")
        found, all_rows = _Nearest(self._model, self._threat, batch, self._batch_size), np.arange(len(batch.x))
        found.offer(all_rows, find_small_perturbations(self._model.classifier, batch, self._threat, self._steps))
        found.offer_images(self._explorers[0].num_runs(batch.logits.shape[-1]))
        found.come_back(all_rows)
        left = np.flatnonzero(np.isfinite(found.distances))
        for attack, (_, _, share) in zip(self._explorers, EXPLORED, strict=True):
            rows = left  # from new points, to all classes
            while len(rows):
                show(f"{share:.1%} nearer, {len(rows)} rows")
                rows = self._come_nearer(attack, batch.take(rows), found, rows, np.full(len(rows), share))
            shares = np.full(len(batch.x), share / 2)  # from the nearest point so far
            while len(rows := left[shares[left] >= PRECISION]):
                show(f"{shares[rows].max():.1%} nearer, {len(rows)} rows")
                some = batch.take(rows)._replace(start=found.x_adv[rows], pool=None)
                nearer = self._come_nearer(self._local, some, found, rows, shares[rows])
                shares[np.setdiff1d(rows, nearer)] /= 2
        rows = left  # from the nearest point so far, to all classes
        while len(rows):
            show(f"{LAST:.1%} nearer, {len(rows)} rows")
            some = batch.take(rows)._replace(start=found.x_adv[rows], pool=None)
            rows = self._come_nearer(self._explorers[0], some, found, rows, np.full(len(rows), LAST))
        found.confirm()
        return found

    def _come_nearer(self, attack: APGD, some: Batch, found: _Nearest, rows: Array, shares: Array) -> Array:
        """Attack some rows in balls that are smaller than their distances by a share. Return where that succeeded."""
        before = found.distances[rows]
        points = attack.run_all(self._model.classifier, some._replace(radius=before * (1 - shares)), self._batch_size)
        found.offer(rows, points)
        nearer = np.asarray(rows[found.distances[rows] < before])
        found.come_back(nearer)
        return nearer
