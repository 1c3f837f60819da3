"""The logits of a model whose outputs may be probabilities.

Attacks follow logits: the gradient of a saturated softmax is 0. The program that computes the outputs is asked for what
its softmaxes were given. No layer is changed for it, so other threads can call the model meanwhile.
"""

import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.classifier import (
    Classifier,
    compute_rounding,
    count_wrong,
    is_misclassified,
    looks_like_probabilities,
)
from keras_drsl.models.heads import Head, Unit, View, select_output
from keras_drsl.models.state import keep_counters, preserve_state, random_counters
from keras_drsl.spread import class_values

KEPT = "_keras_drsl_classifiers"  # the attribute in which a model keeps its classifiers

NUM_TRIED = 32  # how many inputs the logits of a model are looked for on


class LogitsModel(NamedTuple):
    """A model and the way to its logits.

    Attributes:
        classifier: Maps inputs to logits, with the weights of the model. Attacks follow it.
        model: Maps inputs to the outputs of the model. They decide which inputs are misclassified, and logits where
            two outputs are equal only by rounding.
        outputs: `"logits"` if the model returns them; `"softmax"` if they were found behind its softmax, or behind the
            average of its softmaxes; `"probabilities"` if they were not, and the logarithms of the probabilities
            replace them.
    """

    classifier: Classifier
    model: Classifier
    outputs: Literal["logits", "softmax", "probabilities"]

    @property
    def unit(self) -> Unit | None:
        """What the model returns if it has a single unit: `"logit"` or `"probability"`; None for several."""
        head = self.model.logits_fn
        return head.unit if isinstance(head, Head) else None

    @property
    def expectation_draws(self) -> int:
        """Over how many calls of a random model its probabilities are averaged."""
        return self.model.expectation_draws

    def seed(self, *key: Any) -> None:
        """Let the random numbers of a model depend on a key from here on, if its probabilities are averaged."""
        if self.expectation_draws > 1:
            for index, counter in enumerate(random_counters(self.model)):
                if counter.name == "seed_generator_state":
                    counter.assign(np.array([zlib.crc32(repr((*key, index)).encode()), 0], dtype="uint32"))

    def misclassifies(self, x: Array, y: Array, batch_size: int) -> Array:
        """Return which inputs the model misclassifies, `batch_size` at a time, shape `(count,)`.

        Two saturated probabilities may be equal where their logits are not. Such an input counts as misclassified
        although the first of the equal classes may be the true one.
        """
        outputs = self.model.logits_in_batches(x, batch_size)
        wrong = is_misclassified(outputs, y)
        if self.outputs == "softmax":
            second, first = np.sort(outputs, axis=1)[:, -2:].T
            tied = first - second <= 4 * compute_rounding(self.model) * first
            wrong |= tied & is_misclassified(self.classifier.logits_in_batches(x, batch_size), y)
        return wrong

    def count_wrong(self, x: Array, y: Array, batch_size: int) -> Array:
        """Return how many predictions of each input are wrong, `batch_size` inputs at a time, shape `(count,)`.

        There is one prediction, or one for each position that counts.
        """
        if y.ndim == 1:
            return self.misclassifies(x, y, batch_size).astype(int)
        return count_wrong(self.model.logits_in_batches(x, batch_size), y)


def find_logits(
    model: keras.Model,
    x: Array,
    from_logits: bool | None = None,
    *,
    output: str | int | None = None,
    preprocessing: Callable[[Tensor], Tensor] | None = None,
    expectation_draws: int = 1,
) -> LogitsModel:
    """Find the logits of a model, behind its softmax if it ends with one.

    Use it to attack a model that ends with a softmax: `find_logits(model, x).classifier` is what attacks take.

    Note:

    - Sequential, functional, nested and subclassed models are searched alike, on all backends.
    - Logits count as found only if their softmax equals the outputs, also on random inputs.
    - For a weighted average of softmax outputs, with positive weights, they are the logarithms of the average, computed
      from the log-softmaxes. They are exact where the average itself is 0 or 1 in float32.
    - Behind other operations on a softmax, such as rounding, no logits are found: `outputs` is then `"probabilities"`.
    - A single unit is read as two classes, with the logits `[0, z]`. It counts as a probability if all its values lie
      in [0, 1], also on random inputs; `from_logits` says otherwise.
    - Calling the model may change its state, such as a counter: all variables are restored.
    - The model keeps the programs that are compiled for it, for the next call. They are compiled anew if its variables,
      an attribute of one of its layers, or its outputs for `x` changed. A change elsewhere, such as in a global
      variable that `call` reads, is noticed by the outputs only.

    Args:
        model: A classifier.
        x: A few inputs to try the model on, shape `(batch, ...)`.
        from_logits: Whether the outputs are said to be logits; None to find out.
        output: The name or position of the output that holds the classes; None for a model with one output.
        preprocessing: A Keras layer or a function that maps inputs to what the model takes, or None.
        expectation_draws: Over how many calls the probabilities of a random model are averaged, >= 1.

    Returns:
        A `LogitsModel`.

    Raises:
        ValueError: If the model cannot be called on batches of any size of such inputs, has no such output, or its
            outputs are not of shape `(batch, C)`, not finite, or not as `from_logits` says.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> keras_drsl.models.find_logits(model, np.ones((2, 8), "float32")).outputs
    'softmax'
    """
    with preserve_state(model, preprocessing, inputs=x):
        return find_logits_of(model, x, from_logits, View(output, preprocessing, expectation_draws).check())


def find_logits_of(model: keras.Model, x: Array, from_logits: bool | None, view: View) -> LogitsModel:
    """Find the logits of a model, looked at by a view; see `find_logits`. The state of the model may change."""
    # Random inputs as well: what holds on the data alone may not hold elsewhere.
    tried = np.concatenate([x, view.random_like(x)])
    head = _make_head(model, tried, from_logits, view)
    rewind = _keep_draws(head)
    found = _Classifiers.of(head, x)
    outputs = found.outputs.logits(x)
    _check_outputs(model, outputs, from_logits)
    if not looks_like_probabilities(outputs):
        return LogitsModel(found.outputs, found.outputs, "logits")
    logits_model = _behind_probabilities(found, tried, rewind)
    # Here, so that the calls of an attack do not depend on whether it is the first one.
    logits_model.classifier.check(x)
    return logits_model


def _behind_probabilities(found: "_Classifiers", tried: Array, rewind: Callable[[], None]) -> LogitsModel:
    """Return the logits of a model that returns probabilities."""
    try:
        rewind()
        logits = found.behind_softmax.logits(tried)
    except LookupError:
        logits = None
    rewind()
    if logits is None or looks_like_probabilities(logits) or not _is_softmax_of(found.outputs.logits(tried), logits):
        return LogitsModel(found.logarithms, found.outputs, "probabilities")
    return LogitsModel(found.behind_softmax, found.outputs, "softmax")


def _make_head(model: keras.Model, x: Array, from_logits: bool | None, view: View) -> Head:
    """Return the outputs of a model, after a look at what it returns for some inputs."""
    try:
        outputs = view.call_all(model, ops.convert_to_tensor(x), training=False)
    except Exception:  # `Classifier.check` says why
        return Head(model, view)
    outputs = select_output(model, outputs, view.output)
    if not ops.is_tensor(outputs):
        return Head(model, view)
    values = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    if view.task == "multilabel":
        _check_labels(values, view)
    elif view.task == "positions" and values.ndim < 3:
        raise ValueError(
            '`model` must return classes for each position, shape (batch, ..., classes), for task="positions". '
            f"Received: shape {values.shape}"
        )
    elif view.task == "positions" and values.shape[-1] == 1:
        pass
    elif values.shape != (len(x), 1):
        return Head(model, view, returns_logits=not looks_like_probabilities(values))
    in_range = bool(((values >= 0) & (values <= 1)).all()) if from_logits is None else not from_logits
    return Head(model, view, "probability" if in_range else "logit", returns_logits=not in_range)


def _check_labels(values: Array, view: View) -> None:
    """Raise `ValueError` unless outputs have a unit for each label."""
    if values.ndim != 2:
        raise ValueError(
            f'`model` must return one unit per label, shape (batch, labels), for task="multilabel". '
            f"Received: shape {values.shape}"
        )
    if view.which is not None and view.which >= values.shape[1]:
        raise ValueError(
            f"`which` must be one of the {values.shape[1]} labels of `model`. Received: which={view.which}"
        )
    if view.layout is not None and view.layout.num_labels:
        check_num_labels(view.layout.num_labels, values.shape[1])


def check_num_labels(received: int, expected: int) -> None:
    """Raise `ValueError` unless labels have a column for each unit of a model."""
    if received != expected:
        raise ValueError(f"`y` must have a column for each of the {expected} labels of `model`. Received: {received}")


def _keep_draws(head: Head) -> Callable[[], None]:
    """Return a function that lets an average use the same random numbers again; it does nothing for a single call."""
    return keep_counters(head) if head.expectation_draws > 1 else lambda: None


class _Classifiers:
    """The classifiers that the logits of a model are looked for with. The model keeps them, and their programs.

    Attributes:
        outputs: Returns the outputs of the model.
        behind_softmax: Returns what its softmaxes were given.
        logarithms: Returns the logarithms of its outputs.
    """

    def __init__(self, head: Head, x: Array) -> None:
        self._head = head.settings
        self.outputs = Classifier(head.model if head.is_model else head)
        self.behind_softmax = Classifier(_Function(head, _backend.logits_behind(head)))
        self.logarithms = Classifier(_Function(head, lambda x: log_probabilities(head(x))))
        self.outputs.check(x)
        self._attributes = _attributes(head.model)  # after a call, as the first one may add some

    @classmethod
    def of(cls, head: Head, x: Array) -> "_Classifiers":
        """Return the classifiers of a model that an earlier call has made, or new ones if the model changed since."""
        kept: _Classifiers | None = vars(head.model).get(KEPT)
        if kept is None or kept._head != head.settings or not kept._are_of(head, x):
            kept = cls(head, x)
            # Keras would look into an attribute that it is told of when it saves the model.
            object.__setattr__(head.model, KEPT, kept)
        return kept

    def _are_of(self, head: Head, x: Array) -> bool:
        """Return whether the compiled programs still compute what the model does."""
        if not _are_same(_attributes(head.model), self._attributes):
            return False
        self.outputs.check(x)
        rewind = _keep_draws(head)
        now = ops.convert_to_numpy(self.outputs(ops.convert_to_tensor(x)))
        rewind()
        then = self.outputs.logits(x)
        tolerance = 100 * compute_rounding(self.outputs) * max(np.abs(now).max(), 1.0)
        return np.allclose(now, then, rtol=0, atol=tolerance, equal_nan=True)


def _attributes(model: keras.Model) -> list[Any]:
    """Return the variables of a model and all attributes of its layers, containers copied."""
    layers = [model, *model._flatten_layers(include_self=False)]
    attributes = [{name: value for name, value in vars(layer).items() if name != KEPT} for layer in layers]
    return [list(model.variables), _copy(attributes)]


def _copy(value: Any) -> Any:
    """Return a value with its containers and arrays copied."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    if isinstance(value, set | np.ndarray):
        return value.copy()
    return value


def _are_same(first: Any, second: Any) -> bool:
    """Return whether values are the same objects, equal numbers or texts, or containers of such."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_are_same, first, second))
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, set) and isinstance(second, set):
        return first == second
    is_plain = isinstance(first, bool | int | float | str | bytes)
    return first is second or (is_plain and type(first) is type(second) and first == second)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Return the logarithms of probabilities in float32, finite."""
    return class_values(ops.cast(probabilities, "float32"), from_logits=False, space="log_softmax")


class _Function:
    """A function of a model, with the variables that it reads."""

    def __init__(self, head: Head, function: Callable[[Tensor], Tensor]) -> None:
        self.model = head.model
        self._head = head
        self._function = function

    @property
    def variables(self) -> list[keras.Variable]:
        return self._head.variables

    @property
    def expectation_draws(self) -> int:
        return self._head.expectation_draws

    @property
    def per_position(self) -> bool:
        return self._head.per_position

    def __call__(self, x: Tensor) -> Tensor:
        return self._function(x)


def _check_outputs(model: keras.Model, outputs: Array, from_logits: bool | None) -> None:
    """Raise `ValueError` for outputs that are neither logits nor probabilities, or not as `from_logits` says."""
    if not np.isfinite(outputs).all():
        weights = [weight.path for weight in model.weights if not np.isfinite(ops.convert_to_numpy(weight)).all()]
        cause = f" Weights that are not finite: {', '.join(weights[:3])}." if weights else ""
        raise ValueError(f"`model` must return finite outputs. Received: NaN or infinite ones.{cause}")
    probabilities = looks_like_probabilities(outputs)
    if from_logits and probabilities:
        raise ValueError(
            "`from_logits=True`, but the outputs of `model` look like probabilities: they are not negative and sum to "
            "1. Leave `from_logits=None`, and the logits behind them are found where possible."
        )
    if from_logits is False and not probabilities:
        raise ValueError(
            "`from_logits=False`, but the outputs of `model` are no probabilities. "
            f"Received: values from {outputs.min():g} to {outputs.max():g}, sums from {outputs.sum(-1).min():g} to "
            f"{outputs.sum(-1).max():g}"
        )


def _is_softmax_of(probabilities: Array, logits: Array) -> bool:
    """Return whether the softmax of the logits equals the probabilities, small ones included."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    significant = probabilities > 1e-4
    # Above that, the logarithm of a half-precision probability is exact to 0.02.
    return np.allclose(log_p[significant], np.log(probabilities[significant]), atol=2e-2)
