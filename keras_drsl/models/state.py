"""What a model holds beside its weights, and how to leave it unchanged."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array


def check_model(name: str, model: Any) -> None:
    """Raise `ValueError` unless a value is a Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`{name}` must be a keras.Model. Received: {type(model).__name__}")


def random_counters(model: Any) -> list[keras.Variable]:
    """Return the variables that count the random numbers a model, or a classifier, has drawn."""
    return [variable for variable in model.variables if "float" not in variable.dtype]


def keep_counters(model: Any) -> Callable[[], None]:
    """Return a function that lets a model draw the random numbers again that it draws from here on."""
    counters = random_counters(model)
    before = [ops.copy(ops.convert_to_tensor(counter)) for counter in counters]

    def rewind() -> None:
        for counter, value in zip(counters, before, strict=True):
            counter.assign(value)

    return rewind


# For each model at work, by its id: how many calls of `preserve_state` are open, and what restores the model.
_open: dict[int, list[Any]] = {}
_lock = threading.Lock()


@contextmanager
def preserve_state(*models: Any, inputs: Array | None = None) -> Iterator[None]:
    """Restore all variables of models at the end, also after an exception.

    Where calls for one model are nested, or overlap in several threads, the last one to end restores what the first one
    found.

    Args:
        *models: Keras models, classifiers, or other objects with a list `variables` of Keras variables; None is
            skipped.
        inputs: Some inputs, shape `(count, ...)`. A model that has no variables yet is built for their shape.
    """
    with ExitStack() as stack:
        for model in models:
            if model is not None:
                stack.enter_context(_preserve(owner(model), inputs))
        yield


def owner(model: Any) -> Any:
    """Return the Keras model or other object whose variables a classifier or function reads."""
    function = getattr(model, "logits_fn", model)
    if isinstance(function, keras.Layer):
        return function
    return getattr(function, "model", None) or getattr(function, "__self__", function)


@contextmanager
def _preserve(model: Any, inputs: Array | None) -> Iterator[None]:
    with _lock:
        if id(model) not in _open:
            _open[id(model)] = [0, _save(model, inputs)]
        _open[id(model)][0] += 1
    try:
        yield
    finally:
        with _lock:
            _open[id(model)][0] -= 1
            if not _open[id(model)][0]:
                _open.pop(id(model))[1]()


def _save(model: Any, inputs: Array | None) -> Callable[[], None]:
    """Return a function that restores what a model holds now."""
    is_layer = isinstance(model, keras.Layer)
    if is_layer and inputs is not None and not model.built:
        with suppress(Exception):  # a model that cannot be called is refused later
            # A symbolic call changes no variable.
            model(keras.KerasTensor((None, *inputs.shape[1:]), dtype="float32"), training=False)
    variables = list(getattr(model, "variables", ()))
    before = [ops.copy(ops.convert_to_tensor(variable)) for variable in variables]
    restore_native = _backend.save_native_state(model) if is_layer else None

    def restore() -> None:
        if restore_native is not None:
            restore_native()
        for variable, value in zip(variables, before, strict=True):
            # Torch refuses the gradient of another thread once its weights are written, even with equal values.
            if not ops.all(ops.equal(variable, value)):
                variable.assign(value)

    return restore
