"""Provide the models and data that the tests of losses share."""

import keras
import numpy as np

from tests import reference


def draw_soft(rows=6, classes=5):
    """Return label distributions with one class of weight 0 each, which `BilateralSoftmaxLoss` needs."""
    y = np.random.default_rng(1).dirichlet(np.ones(classes), rows)
    y[np.arange(rows), np.arange(rows) % classes] = 0
    return y / y.sum(axis=1, keepdims=True)


def draw(shape=(6, 5), scale=3.0, seed=0):
    """Draw logits and class ids, and return the ids as one-hot labels too."""
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


def identity_model(shape, *layers):
    """Make a model that returns its inputs, so that the predictions in `fit` are known."""
    head = keras.layers.Dense(shape[-1], kernel_initializer="identity", use_bias=False)
    return keras.Sequential([keras.Input(shape), *layers, head])


def small_data(count=20, classes=4):
    rng = np.random.default_rng(5)
    return rng.normal(size=(count, 3)).astype("float32"), rng.integers(0, classes, count)
