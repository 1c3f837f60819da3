"""The base class of attacks: checks, restarts, and the choice of the worst point found."""

import copy
import inspect
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, final

import numpy as np

from keras_drsl import _validation
from keras_drsl._data import content_keys, read_labels, to_arrays
from keras_drsl._typing import Array, Norm, Numbers, Tensor
from keras_drsl.attacks.pool import Pool
from keras_drsl.models.classifier import Classifier, is_misclassified, looks_like_probabilities, severity
from keras_drsl.models.state import preserve_state
from keras_drsl.threat import ThreatModel

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Batch(NamedTuple):
    """Rows to attack, each for one restart.

    They belong to examples that are classified correctly without an attack, or to all examples if the answers of a
    random model are averaged.

    Attributes:
        x: Inputs, float32, shape `(batch, ...)`.
        y: Class ids, int32, shape `(batch,)`; of a model of positions `(batch, positions)`, negative where a position
            does not count.
        ids: Integers that the random numbers of an example depend on, shape `(batch,)`.
        logits: The logits of the clean inputs, shape `(batch, C)` or `(batch, positions, C)`.
        restart: Which of the `Attack.num_runs` runs each row is for, shape `(batch,)`.
        example_index: Equal integers for the rows of one example, shape `(batch,)`.
        stop_when_broken: Whether a search may end for an example as soon as it is misclassified. An average of random
            answers may be wrong by chance, so that it may not.
        pool: Images of all classes that a search may start from, or None.
        radius: For APGD, the radius of each row, shape `(batch,)`, in place of that of the attack; or None.
        start: For PGD and APGD, where the search of each row starts, projected into its ball, in place of a random
            point; or None.
        targets: The classes that targeted attacks aim at, the most promising one first, shape `(batch, targets)`; None
            for the order of the logits.
    """

    x: Array
    y: Array
    ids: Array
    logits: Array
    restart: Array
    example_index: Array
    stop_when_broken: bool = True
    pool: Pool | None = None
    radius: Array | None = None
    start: Array | None = None
    targets: Array | None = None

    def take(self, rows: Array) -> "Batch":
        """Return some rows."""
        per_row = ("x", "y", "ids", "logits", "restart", "example_index", "radius", "start", "targets")
        arrays = {name: getattr(self, name) for name in per_row}
        chosen: Any = {name: array if array is None else array[rows] for name, array in arrays.items()}
        return self._replace(**chosen)

    def generators(self, attack: "Attack") -> list[np.random.Generator]:
        """Return one source of random numbers per row.

        It depends on the seed and the name of the attack, the restart and the id of the example only, so an example
        gets equal numbers in any batch and on any backend. The generator is counter-based (Philox).
        """
        name = zlib.crc32(attack.name.encode())
        keys = zip(self.restart.tolist(), self.ids.tolist(), strict=True)
        return [np.random.Generator(np.random.Philox((attack.seed, name, *key))) for key in keys]


class Attack:
    """The base of all attacks: a search for a misclassified point near each input.

    Derive from it to write an attack: implement `run`, and call the attack as any other. Store a constructor argument
    under its own name, so that `settings` and `repr` find it. Give `eps` the default None, so that `threat=` works.

    Note:

    - An attack cannot be changed after it was made: reports record its settings.
    - Attacks of one class with equal settings are equal.

    Attributes:
        needs_gradient: Whether the attack follows gradients of the model. Attacks without gradients run last in an
            evaluation. If they break examples that the gradient attacks did not, the model masks its gradients.
        restarts: The number of searches per example.

    Args:
        eps: The radius of the ball around each input, > 0, in units of the input.
        norm: `"inf"` (the default), 2 or 1.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        threat: A `keras_drsl.ThreatModel` in place of these.
        seed: The seed of all randomness, an integer >= 0. The random numbers of an example depend on it, the name of
            the attack, the restart and the id of the example, but not on the batch.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> class Corner(keras_drsl.attacks.Attack):
    ...     needs_gradient = False
    ...
    ...     def run(self, classifier, batch):
    ...         generators = batch.generators(self)
    ...         delta = [self.eps * generator.choice([-1.0, 1.0], batch.x.shape[1:]) for generator in generators]
    ...         return np.clip(batch.x + np.array(delta, "float32"), self.clip_min, self.clip_max)
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> Corner(eps=0.1)(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)
    """

    needs_gradient = True
    restarts = 1
    _takes_fixed = True  # works on inputs with features that are fixed
    _takes_radii = False  # works on rows with radii of their own

    def __init__(
        self,
        eps: Numbers | None = None,
        *,
        norm: Norm | None = None,
        clip_min: Numbers | None = None,
        clip_max: Numbers | None = None,
        mask: Any = None,
        threat: ThreatModel | None = None,
        seed: int = 0,
    ) -> None:
        self.threat = ThreatModel.from_arguments(eps, norm, clip_min, clip_max, threat, mask)
        self.seed = _validation.check_integer("seed", seed, at_least=0)
        self._classifier: Classifier | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name in vars(self):
            raise AttributeError(
                f"`{name}` of an attack cannot be changed. Make a new attack. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_classifier": None}  # its compiled programs belong to this process

    @property
    def eps(self) -> Numbers:
        """The radius of the ball."""
        return self.threat.eps

    @property
    def norm(self) -> Norm:
        """The norm of the ball."""
        return self.threat.norm

    @property
    def clip_min(self) -> Numbers:
        """The smallest valid input value."""
        return self.threat.clip_min

    @property
    def clip_max(self) -> Numbers:
        """The largest valid input value."""
        return self.threat.clip_max

    @property
    def mask(self) -> Any:
        """Which channels or features may not change, or None."""
        return self.threat.mask

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return type(self).__name__.lower()

    @property
    def settings(self) -> dict[str, Any]:
        """Every argument of the constructor by name, as JSON takes it."""
        names: list[str] = []
        for cls in type(self).__mro__:
            if "__init__" in vars(cls):
                parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
                names = [parameter.name for parameter in parameters if parameter.kind not in _VARIADIC] + names
                if all(parameter.kind not in _VARIADIC for parameter in parameters):
                    break
        values = {name: getattr(self, name) for name in dict.fromkeys(names) if name not in ("self", "threat")}
        # Attacks without a mask have the settings that they had before there were masks.
        return {name: value for name, value in values.items() if name != "mask" or value is not None}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.settings == getattr(other, "settings", None)

    def __hash__(self) -> int:
        return hash((type(self), json.dumps(self.settings, sort_keys=True, default=repr)))

    def with_threat(self, threat: ThreatModel) -> "Attack":
        """Return the attack with another threat model of the same radius, for inputs with features that are fixed."""
        if threat == self.threat:
            return self
        if not self._takes_fixed:
            raise ValueError(
                f"`attacks` cannot hold {self.name} for a model of several inputs or labels: it cannot keep features "
                "as they are"
            )
        other = copy.copy(self)
        vars(other).update(threat=threat, _classifier=None)
        return other

    def num_runs(self, num_classes: int) -> int:
        """Return the number of searches per example. An example leaves after the first search that breaks it."""
        return self.restarts

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the model per example; a gradient counts as three.

        Progress bars estimate by it how long an evaluation takes.
        """
        return 1

    def num_pool_runs(self, num_classes: int) -> int:
        """Return how many searches follow those of `num_runs` where a call has a pool of images to start from."""
        return 0

    @property
    def uses_pool(self) -> bool:
        """Whether a search may start at the images of a pool."""
        return self.num_pool_runs(num_classes=2) > 0  # the least number of classes

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search for a misclassified point near each row.

        Args:
            classifier: The model; call it on a tensor for logits, or compile a function of it by `compile`. Tell
                `count_gradients` or `count_queries` on how many inputs, which only its `logits` does by itself.
            batch: The rows to attack.

        Returns:
            The best point of each row, an array of the shape of `batch.x`.
        """
        raise NotImplementedError

    @final
    def __call__(
        self,
        logits_fn: Callable[[Tensor], Tensor] | Classifier,
        x: Any,
        y: Any,
        *,
        ids: Any = None,
        batch_size: int | None = None,
        pool: Pool | None = None,
    ) -> Array:
        """Attack a batch.

        Args:
            logits_fn: A `keras.Model`, or any function that maps inputs to **logits**, shape `(batch, C)`. It is
                compiled once while calls pass the same one. For several attacks, or a lambda, pass a
                `keras_drsl.models.Classifier` of it.
            x: Inputs within `[clip_min, clip_max]`, shape `(batch, ...)`.
            y: The true labels: class ids `(batch,)` or `(batch, 1)`, or one-hot `(batch, C)`. For logits
                `(batch, positions, C)`: class ids `(batch, positions)`, negative where a position does not count.
            ids: Integers >= 0. Equal ids get equal random numbers. By default they are computed from the values of
                each input, so that the order of the inputs does not matter.
            batch_size: How many rows to work on at once, if more than there are inputs. Several restarts or targets of
                one input then share a batch, which is faster.
            pool: Images of all classes. A targeted attack on the margin then starts once more for each target, at the
                nearest image of that class; see `keras_drsl.attacks.Pool`.

        Returns:
            Inputs of the same shape, float32, within the threat model: for each example, the point with the largest
            margin of another class over the true class, among the results of its restarts. A search stops at a
            misclassified point. Inputs that are misclassified without an attack are returned unchanged.

        Raises:
            ValueError: If inputs lie outside the clip range, labels do not match or are no classes, or the function
                returns probabilities.
        """
        x, y = to_arrays("x", x, y)
        x = x.astype("float32", copy=False)
        if len(x) == 0:
            return np.empty(x.shape, "float32")
        self.threat.validate("x", x)
        classifier = self._classifier_of(logits_fn)
        with preserve_state(classifier, inputs=x):
            return self._attack(classifier, x, y, ids, batch_size, pool)

    def _attack(
        self, classifier: Classifier, x: Array, y: Any, ids: Any, batch_size: int | None, pool: Pool | None
    ) -> Array:
        """Check the outputs of the model and the labels, and attack."""
        classifier.check(x)
        logits = classifier.logits(x)
        if looks_like_probabilities(logits):
            raise ValueError(
                "`logits_fn` must return logits, but its outputs look like probabilities: they are not negative and "
                "sum to 1. Give the model before its softmax: keras_drsl.models.find_logits(model, x).classifier."
            )
        y = read_labels(y, logits)
        ids = content_keys(x) if ids is None else np.asarray(ids)
        rows = Batch(x, y, ids, logits, np.zeros(len(x), int), np.arange(len(x)), pool=pool)
        return self.run_all(classifier, rows, max(batch_size or len(x), len(x)))

    def _classifier_of(self, logits_fn: Callable[[Tensor], Tensor] | Classifier) -> Classifier:
        """Return the classifier of the last call if the function is the same, to reuse its programs."""
        last = self._classifier
        if last is None or logits_fn not in (last, last.logits_fn) or not last.reads_current_weights:
            last = self._classifier = Classifier.of(logits_fn)
        return last

    @final
    def run_all(self, classifier: Classifier, all_rows: Batch, batch_size: int) -> Array:
        """Run every restart on the examples that no earlier one has broken.

        Args:
            classifier: The model.
            all_rows: One row per example.
            batch_size: How many rows to work on at once, at least their number.

        Returns:
            The worst point of each row.
        """
        if all_rows.radius is not None and not self._takes_radii:
            raise ValueError(f"`all_rows` must have no radii for {self.name}, which has one. Received: radii")
        x, y, logits = all_rows.x, all_rows.y, all_rows.logits
        x_adv: Array = x.copy()
        reached = severity(logits, y)
        num_classes = logits.shape[-1]
        # An average of random answers may be wrong by chance: no search ends early, and the largest margin counts.
        is_random = classifier.expectation_draws > 1
        left = np.arange(len(x)) if is_random else np.flatnonzero(~is_misclassified(logits, y))
        run, num_runs = 0, self.num_runs(num_classes)
        if all_rows.pool is not None:
            num_runs += self.num_pool_runs(num_classes)
        while run < num_runs and len(left):
            # Where few examples are left, several restarts fill the batch.
            count = min(batch_size // len(left), num_runs - run)
            rows = np.tile(left, count)
            restart = np.repeat(np.arange(run, run + count), len(left))
            batch = all_rows.take(rows)._replace(restart=restart, example_index=rows, stop_when_broken=not is_random)
            found = self.run(classifier, batch)
            outputs = classifier.logits(found)
            found_reached = severity(outputs, batch.y)
            broken = np.zeros(len(rows), bool) if is_random else is_misclassified(outputs, batch.y)
            for part in np.split(np.arange(len(rows)), count):
                index = rows[part]
                better = broken[part] | (found_reached[part] > reached[index])
                x_adv[index[better]], reached[index[better]] = found[part[better]], found_reached[part[better]]
            left = left[~np.isin(left, rows[broken])]
            run += count
        return x_adv
