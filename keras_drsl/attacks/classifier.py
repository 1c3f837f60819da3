"""A model as attacks see it."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend


class Classifier:
    """Logits in float32, and the programs compiled for them, each once.

    Use it where several attacks work on one model: what one has compiled, another of other `eps`, `steps` or
    `restarts` need not compile again.

    Args:
        logits_fn: a `keras.Model` or any function that maps inputs `(batch, ...)` to **logits** `(batch, C)`. A Keras
            model is asked as at inference, and its weights are looked up in each call. On JAX, those of a function
            are looked up in the first call, unless it is a method of a Keras layer or has them in an attribute
            `variables`, a list.
    """

    def __init__(self, logits_fn: Callable) -> None:
        self.logits_fn = logits_fn
        self._programs: dict[Any, Callable] = {}

    @property
    def variables(self) -> list:
        """The Keras variables the logits are computed from, as far as they are known."""
        owner = getattr(self.logits_fn, "__self__", self.logits_fn)
        return list(getattr(owner, "variables", ()))

    @property
    def stays_current(self) -> bool:
        """Whether its programs see weights that are changed after they were compiled."""
        return _backend.looks_up_weights() or bool(self.variables)

    @classmethod
    def of(cls, logits_fn: Callable) -> "Classifier":
        """The classifier itself, or a new one of a function or model."""
        return logits_fn if isinstance(logits_fn, cls) else cls(logits_fn)

    def __call__(self, x: Any) -> Any:
        """Logits of a tensor `(batch, ...)`, shape `(batch, C)`: no dropout, no input noise, no batch's statistics."""
        is_layer = isinstance(self.logits_fn, keras.Layer)
        logits = self.logits_fn(x, training=False) if is_layer else self.logits_fn(x)
        return ops.cast(logits, "float32")

    def program(self, function: Callable, **static: Any) -> Callable:
        """`function(classifier, *tensors, **static)` as a compiled function of the tensors."""
        key = (function, *sorted(static.items()))
        if key not in self._programs:
            self._programs[key] = _backend.graph(partial(function, self, **static), self.variables)
        return self._programs[key]

    def stepper(self, step: Callable, **static: Any) -> Callable:
        """`step(classifier, rows, *tensors, **static)` as a compiled function of the rows and of stacked tensors."""
        key = ("stepper", step, *sorted(static.items()))
        if key not in self._programs:
            self._programs[key] = _backend.stepper(partial(step, self, **static), self.variables)
        return self._programs[key]

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits of an array `(batch, ...)`, shape `(batch, C)`."""
        if isinstance(self.logits_fn, keras.Layer) and not self.logits_fn.built:
            self(ops.convert_to_tensor(x[:1]))
        rows = np.arange(_backend.padded(len(x)))
        logits = self.program(_forward)(x[np.minimum(rows, len(x) - 1)])
        return ops.convert_to_numpy(logits)[: len(x)]


def _forward(classifier: Classifier, x: Any) -> Any:
    return classifier(x)


def margins(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The largest rival's logit minus the true one's, shape `(batch,)`; infinite where the model is wrong by NaN."""
    true = np.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    rivals = np.where(np.arange(logits.shape[1]) == y[:, None], -np.inf, logits)
    with np.errstate(invalid="ignore"):
        margin = rivals.max(axis=1) - true
    return np.where(np.isnan(margin), np.inf, margin)


def is_wrong(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the prediction is not the true class, or none at all, shape `(batch,)`."""
    return (logits.argmax(axis=1) != y) | np.isnan(logits).any(axis=1)


def looks_like_probabilities(outputs: np.ndarray) -> bool:
    """Whether outputs `(batch, C)` are all non-negative and sum to 1, as far as half precision can."""
    return bool(outputs.min() >= 0 and np.allclose(outputs.sum(axis=-1), 1.0, atol=1e-2))


def fingerprint(model: Any) -> str:
    """The SHA-256 of a model's weights and, where it is a Keras model, of its layers, whatever their names."""
    digest = hashlib.sha256()
    for weight in getattr(model, "weights", ()):
        values = np.ascontiguousarray(ops.convert_to_numpy(weight))
        digest.update(f"{values.shape} {weight.dtype}".encode())
        digest.update(values.tobytes())
    try:
        config = model.get_config()
    except (AttributeError, NotImplementedError):
        config = type(model).__qualname__
    names: dict[str, str] = {}

    def nameless(value: Any) -> Any:
        if isinstance(value, dict):
            for key in ("name", "layer_name"):
                if isinstance(value.get(key), str):
                    names.setdefault(value[key], f"name {len(names)}")
            return {str(key): nameless(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [nameless(one) for one in value]
        return names.get(value, value) if isinstance(value, str) else value

    digest.update(json.dumps(nameless(config), sort_keys=True, default=lambda one: type(one).__name__).encode())
    return digest.hexdigest()


def as_array(x: Any) -> np.ndarray:
    """An array of a tensor, a list or an array."""
    return np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)


def class_ids(y: Any, count: int, classes: int) -> np.ndarray:
    """Labels of any form as class ids `(count,)`, int32, or `ValueError`."""
    y = as_array(y)
    if y.ndim == 2 and y.shape[1] in (1, classes):
        if y.shape[1] > 1 and not (y.max(axis=1) > 0).all():
            raise ValueError(f"`y` must name a class in each row. Received: row {np.argmin(y.max(axis=1))} of zeros")
        y = y[:, 0] if y.shape[1] == 1 else y.argmax(axis=1)
    if y.shape != (count,):
        raise ValueError(
            f"`y` must hold one label for each of the {count} inputs and {classes} classes. Received: y.shape={y.shape}"
        )
    is_class = np.isin(y, np.arange(classes))
    if not is_class.all():
        raise ValueError(f"`y` must hold class ids in [0, {classes}). Received: {y[~is_class][0]}")
    return y.astype("int32")
