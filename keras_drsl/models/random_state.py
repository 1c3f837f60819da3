"""Models that draw random numbers, and how to leave their state unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops


def check_model(name: str, model: Any) -> None:
    """Raise `ValueError` unless a value is a Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`{name}` must be a keras.Model. Received: {type(model).__name__}")


def random_counters(model: keras.Model) -> list[keras.Variable]:
    """Return the variables that count the random numbers a model has drawn."""
    return [variable for variable in model.variables if "float" not in variable.dtype]


@contextmanager
def preserve_random_state(*models: keras.Model | None) -> Iterator[None]:
    """Restore the random counters of models at the end, also after an exception."""
    counters = [counter for model in models if model is not None for counter in random_counters(model)]
    before = [ops.convert_to_numpy(counter) for counter in counters]
    try:
        yield
    finally:
        for counter, value in zip(counters, before, strict=True):
            counter.assign(value)
