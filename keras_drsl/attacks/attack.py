"""What attacks share: the checks, the starts, the loop over steps that the broken examples leave."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _arguments, _backend
from keras_drsl.attacks import balls
from keras_drsl.attacks.classifier import Classifier, as_array, class_ids, is_wrong, looks_like_probabilities, margins


class Batch(NamedTuple):
    """Rows to attack: examples classified correctly without an attack, each for one or more of the attack's runs.

    Attributes:
        x: float32, shape `(batch, ...)`.
        y: class ids, int32, shape `(batch,)`.
        ids: integers that tell the examples of a data set apart, shape `(batch,)`.
        logits: of the clean inputs, shape `(batch, C)`.
        runs: which run of the attack each is for, shape `(batch,)`.
        places: which rows are one example's, equal integers, shape `(batch,)`.
    """

    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    runs: np.ndarray
    places: np.ndarray

    def generators(self, attack: "Attack") -> list[np.random.Generator]:
        """A source of random numbers for each row."""
        name = zlib.crc32(attack.name.encode())
        keys = zip(self.runs.tolist(), self.ids.tolist(), strict=True)
        return [np.random.default_rng((attack.seed, name, *key)) for key in keys]


class Attack:
    """The base of all attacks: a search for a misclassified point near each input.

    A subclass says in `_search` how runs search, and in `runs` how many there are.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of all randomness, an integer of 0 or more. What is drawn for an example depends on it, the
            attack's name, the run and the example's id, and not on the batch.

    Raises:
        ValueError: for arguments out of their range.
    """

    restarts = 1

    def __init__(
        self, eps: float, *, norm: str | int = "inf", clip_min: float = 0.0, clip_max: float = 1.0, seed: int = 0
    ) -> None:
        self.eps = _arguments.check_positive("eps", eps)
        self.norm = _arguments.check_choice("norm", "inf" if norm == math.inf else norm, balls.NORMS)
        self.clip_min = _arguments.check_number("clip_min", clip_min, "a finite number", lambda number: True)
        self.clip_max = _arguments.check_number("clip_max", clip_max, "a finite number", lambda number: True)
        if not self.clip_min < self.clip_max:
            raise ValueError(f"`clip_min` must be below `clip_max`. Received: clip_min={clip_min}, clip_max={clip_max}")
        self.seed = _arguments.check_integer("seed", seed, at_least=0)
        self._last: Classifier | None = None
        self._persist = False  # whether a search goes on with what it has broken

    @property
    def name(self) -> str:
        """What reports call the attack."""
        return type(self).__name__.lower()

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, by name, as JSON takes it."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"

    def runs(self, classes: int) -> int:
        """How many runs an example that withstands them all goes through."""
        return self.restarts

    def __call__(
        self, logits_fn: Callable, x: Any, y: Any, *, ids: Any = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Attack a batch.

        Args:
            logits_fn: a `keras.Model` or any function that maps inputs to **logits**, shape `(batch, C)`. It is
                compiled once as long as it is the same one call after call. For several attacks, or a lambda, make a
                `Classifier` of it and pass that.
            x: inputs within `[clip_min, clip_max]`, shape `(batch, ...)`.
            y: the true labels, class ids `(batch,)` or `(batch, 1)` or one-hot `(batch, C)`.
            ids: integers that tell the examples apart, by default their place in the batch. Equal ids get equal random
                numbers.
            batch_size: how many rows to work on at once, if more than there are inputs: several restarts or rivals of
                one input then share a batch, which is faster.

        Returns:
            Inputs of the same shape, float32, within `eps` of `x` and within the clip range: of the points that the
            attack kept, the one with the largest margin of a rival over the true class. A run stops where it
            misclassifies, and what is misclassified without an attack is left as it is.

        Raises:
            ValueError: for inputs outside the clip range, labels that don't match or are no classes, or a function
                that returns probabilities.
        """
        x = np.asarray(as_array(x), dtype="float32")
        if len(x) == 0:
            return x
        balls.check_range("x", x, self.clip_min, self.clip_max)
        classifier = self._last
        if classifier is None or logits_fn not in (classifier, classifier.logits_fn) or not classifier.stays_current:
            classifier = self._last = Classifier.of(logits_fn)
        logits = classifier.logits(x)
        if looks_like_probabilities(logits):
            raise ValueError(
                "`logits_fn` must return logits, but its outputs look like probabilities: they are not negative and "
                "sum to 1. Give the model before its softmax: keras_drsl.evaluation.find_logits(model, x).classifier."
            )
        y = class_ids(y, len(x), logits.shape[1])
        ids = np.arange(len(x)) if ids is None else np.asarray(ids)

        x_adv, reached = x.copy(), margins(logits, y)
        standing = np.flatnonzero(~is_wrong(logits, y))
        run, runs = 0, self.runs(logits.shape[1])
        while run < runs and len(standing):
            # Where few are left, several runs fill the batch.
            count = min(max(batch_size or len(x), len(x)) // len(standing), runs - run)
            at = np.tile(standing, count)
            run_of = np.repeat(np.arange(run, run + count), len(standing))
            batch = Batch(x[at], y[at], ids[at], logits[at], run_of, at)
            found = self._search(classifier, batch)
            outputs = classifier.logits(found)
            margin, broken = margins(outputs, batch.y), is_wrong(outputs, batch.y)
            for part in np.split(np.arange(len(at)), count):
                one = at[part]
                better = broken[part] | (margin[part] > reached[one])
                x_adv[one[better]], reached[one[better]] = found[part[better]], margin[part[better]]
            standing = standing[~np.isin(standing, at[broken])]
            run += count
        return x_adv

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        """The best point found for each row, of the shape of `batch.x`."""
        raise NotImplementedError

    def _ball(self) -> dict[str, np.float32]:
        ball = {"eps": self.eps, "clip_min": self.clip_min, "clip_max": self.clip_max}
        return {name: np.float32(value) for name, value in ball.items()}


def search(
    stepper: Callable,
    batch: Batch,
    rows: dict[str, Any],
    steps: int,
    arguments: Callable,
    *,
    look_every: int = 5,
    persist: bool = False,
) -> np.ndarray:
    """Repeat a step on the examples that are not broken yet.

    Args:
        stepper: maps rows and the stacked arguments of several steps to the next rows, see `Classifier.stepper`.
        batch: what is attacked.
        rows: arrays with one row each. `"best"` is the point to return, `"broken"` whether it is misclassified, which
            ends the search for its example.
        steps: how often.
        arguments: maps the step and the places of the rows still there to a tuple. Arrays in it need one row for each
            of these.
        look_every: how many steps lie between two looks at which examples are broken.
        persist: go on with what is broken.

    Returns:
        The last `"best"` of each row.
    """
    best = np.array(rows["best"])
    alive = np.arange(len(best))
    current = _backend.padded(len(alive))
    rows = {name: _rows(value, alive, current) for name, value in rows.items()}
    for step in range(0, steps, look_every):
        given = []
        for number in range(step, min(step + look_every, steps)):
            one = arguments(number, alive)
            given.append([_rows(x, np.arange(len(alive)), current) if isinstance(x, np.ndarray) else x for x in one])
        rows = stepper(rows, *keras.tree.map_structure(lambda *values: np.stack(values), *given))
        broken = ops.convert_to_numpy(rows["broken"])[: len(alive)]
        if persist:
            rows = rows | {"broken": np.zeros(current, bool)}
            continue
        broken = np.isin(batch.places[alive], batch.places[alive[broken]])
        if broken.all():
            break
        needed = _backend.padded(int((~broken).sum()))
        if needed < current:
            values = {name: ops.convert_to_numpy(value) for name, value in rows.items()}
            best[alive[broken]] = values["best"][: len(alive)][broken]
            kept = np.flatnonzero(~broken)
            alive, current = alive[kept], needed
            rows = {name: _rows(value, kept, current) for name, value in values.items()}
    best[alive] = ops.convert_to_numpy(rows["best"])[: len(alive)]
    return best


def misclassified(logits: Any, y: Any) -> Any:
    """Where the prediction is not the true class, or none at all, shape `(batch,)`."""
    wrong = ops.cast(ops.argmax(logits, axis=-1), "int32") != y
    return ops.logical_or(wrong, ops.any(ops.isnan(logits), axis=-1))


def where_rows(condition: Any, x: Any, other: Any) -> Any:
    """`ops.where` for one condition a row."""
    return ops.where(ops.reshape(condition, (-1,) + (1,) * (len(x.shape) - 1)), x, other)


def _rows(values: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
    """Some rows of an array, the last of them repeated up to a count."""
    return np.asarray(values)[kept[np.minimum(np.arange(count), len(kept) - 1)]]
