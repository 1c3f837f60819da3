import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl.training import inner_attack


@pytest.fixture
def start_at(monkeypatch):
    """Let attacks start at given perturbations: one array, or a list of arrays, one per draw."""

    def give(deltas):
        remaining = iter(deltas) if isinstance(deltas, list) else None

        def random_delta(shape, eps, norm, seed):
            delta = deltas if remaining is None else next(remaining)
            return ops.convert_to_tensor(np.asarray(delta, "float32"))

        monkeypatch.setattr(inner_attack, "random_delta", random_delta)
        return remaining

    return give


@pytest.fixture
def dtype_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
