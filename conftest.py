"""What every test and docstring example finds ready."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

import keras_drsl


@pytest.fixture(autouse=True)
def seeded(doctest_namespace):
    """Same weights in every run; the names docstring examples use."""
    keras.utils.set_random_seed(0)
    doctest_namespace.update(keras=keras, keras_drsl=keras_drsl, np=np)
