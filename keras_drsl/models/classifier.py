"""A function of logits with the programs that are compiled for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array, Tensor


class Classifier:
    """Logits in float32, and the programs compiled for them, each once.

    Use it where several attacks work on one model. A program that one attack has compiled serves another attack with
    other values of `eps`, `steps` or `restarts`.

    Args:
        logits_fn: A `keras.Model`, or any function that maps inputs `(batch, ...)` to **logits** `(batch, C)`. A Keras
            model is called as at inference, and its weights are read in each call. On JAX, the weights of a function
            are read in the first call only, unless the function is a method of a Keras layer or has an attribute
            `variables`, the list of its Keras variables.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> classifier = keras_drsl.models.Classifier(model)
    >>> classifier.logits(np.ones((4, 8), "float32")).shape
    (4, 10)
    """

    def __init__(self, logits_fn: Callable[[Tensor], Tensor]) -> None:
        self.logits_fn = logits_fn
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def variables(self) -> list[keras.Variable]:
        """The Keras variables that the logits are computed from, as far as they are known."""
        owner = getattr(self.logits_fn, "__self__", self.logits_fn)
        return list(getattr(owner, "variables", ()))

    @property
    def reads_current_weights(self) -> bool:
        """Whether compiled programs see weights that changed after compilation."""
        return _backend.READS_WEIGHTS_EACH_CALL or bool(self.variables)

    @classmethod
    def of(cls, logits_fn: "Callable[[Tensor], Tensor] | Classifier") -> "Classifier":
        """Return the classifier itself, or a new one of a function or model."""
        return logits_fn if isinstance(logits_fn, cls) else cls(logits_fn)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the logits of a tensor `(batch, ...)` as at inference, shape `(batch, C)`."""
        is_layer = isinstance(self.logits_fn, keras.Layer)
        logits = self.logits_fn(x, training=False) if is_layer else self.logits_fn(x)  # type: ignore[call-arg]
        return ops.cast(logits, "float32")

    def compile(self, function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """Compile `function(classifier, *tensors, **static)` to a function of the tensors.

        The program is kept for the same function and static values, which must be hashable. So pass a function of the
        module: a lambda or a nested function is another one in each call, and is compiled anew.
        """
        key = (function, *sorted(static.items()))
        if key not in self._programs:
            self._programs[key] = _backend.compile_function(partial(function, self, **static), self.variables)
        return self._programs[key]

    def compile_steps(self, step: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """Compile `step(classifier, rows, *tensors, **static)` to a function of the rows and of stacked tensors.

        The function runs one step per element of the tensors' first axis.
        """
        key = ("steps", step, *sorted(static.items()))
        if key not in self._programs:
            self._programs[key] = _backend.multi_step(partial(step, self, **static), self.variables)
        return self._programs[key]

    def logits(self, x: Array) -> Array:
        """Compute the logits of an array `(batch, ...)`, shape `(batch, C)`."""
        if isinstance(self.logits_fn, keras.Layer) and not self.logits_fn.built:
            self(ops.convert_to_tensor(x[:1]))
        rows = np.arange(_backend.bucket_size(len(x)))
        logits = self.compile(_forward)(x[np.minimum(rows, len(x) - 1)])
        return np.asarray(ops.convert_to_numpy(logits))[: len(x)]

    def logits_in_batches(self, x: Array, batch_size: int) -> Array:
        """Compute the logits of an array of any length, `batch_size` rows at a time, shape `(count, C)`."""
        return np.concatenate([self.logits(x[start : start + batch_size]) for start in range(0, len(x), batch_size)])


def _forward(classifier: Classifier, x: Tensor) -> Tensor:
    return classifier(x)


def margins(logits: Array, y: Array) -> Array:
    """Return the largest non-true logit minus the true one, shape `(batch,)`; infinite where a logit is NaN."""
    true = np.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    others = np.where(np.arange(logits.shape[1]) == y[:, None], -np.inf, logits)
    with np.errstate(invalid="ignore"):
        margin = others.max(axis=1) - true
    return np.where(np.isnan(margin), np.inf, margin)


def is_misclassified(logits: Array, y: Array) -> Array:
    """Return where the prediction is not the true class or a logit is NaN, shape `(batch,)`."""
    wrong: Array = (logits.argmax(axis=1) != y) | np.isnan(logits).any(axis=1)
    return wrong


def looks_like_probabilities(outputs: Array) -> bool:
    """Return whether outputs `(batch, C)` are non-negative and sum to 1, up to the rounding of half precision."""
    return bool(outputs.min() >= 0 and np.allclose(outputs.sum(axis=-1), 1.0, atol=1e-2))
