"""What the tests of losses are made on."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np

from tests import reference


def draw(shape=(6, 5), scale=3.0, seed=0):
    """Logits, class ids and the same as one-hot."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, scale, shape).astype("float32")
    ids = rng.integers(0, shape[-1], shape[:-1])
    return z, ids, reference.one_hot(ids, shape[-1]).astype("float32")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def small_model(classes=4, activation="softmax", **options):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((3,)), keras.layers.Dense(8, activation="tanh")]
    return keras.Sequential([*layers, keras.layers.Dense(classes, activation=activation, **options)])


def small_data(count=20, classes=4):
    rng = np.random.default_rng(5)
    return rng.normal(size=(count, 3)).astype("float32"), rng.integers(0, classes, count)


def run_python(code):
    """Run a program in a fresh process; its error is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
