"""What a model holds beside its weights, and how to leave it unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array


def check_model(name: str, model: Any) -> None:
    """Raise `ValueError` unless a value is a Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`{name}` must be a keras.Model. Received: {type(model).__name__}")


def random_counters(model: keras.Model) -> list[keras.Variable]:
    """Return the variables that count the random numbers a model has drawn."""
    return [variable for variable in model.variables if "float" not in variable.dtype]


@contextmanager
def preserve_state(*models: Any, inputs: Array | None = None) -> Iterator[None]:
    """Restore all variables of models at the end, also after an exception.

    Args:
        *models: Keras models, classifiers, or other objects with a list `variables` of Keras variables; None is
            skipped.
        inputs: Some inputs, shape `(count, ...)`. A model that has no variables yet is built for their shape.
    """
    given = [model for model in models if model is not None]
    layers = [
        layer for layer in (getattr(model, "logits_fn", model) for model in given) if isinstance(layer, keras.Layer)
    ]
    for layer in layers:
        if inputs is not None and not layer.built:
            with suppress(Exception):  # a model that cannot be called is refused later
                # A symbolic call changes no variable.
                layer(keras.KerasTensor((None, *inputs.shape[1:]), dtype="float32"), training=False)
    variables = [variable for model in given for variable in model.variables]
    before = [ops.copy(ops.convert_to_tensor(variable)) for variable in variables]
    restore_native = [_backend.save_native_state(layer) for layer in layers]
    try:
        yield
    finally:
        for restore in restore_native:
            restore()
        for variable, value in zip(variables, before, strict=True):
            # Torch refuses the gradient of another thread once its weights are written, even with equal values.
            if not ops.all(ops.equal(variable, value)):
                variable.assign(value)
