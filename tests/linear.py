"""A linear model, whose worst perturbation is known in closed form."""

import keras
import numpy as np

WEIGHTS = np.array([[1.0, -1.0, 0.5], [0.3, 0.8, -0.2], [-0.4, 0.1, 0.9], [0.2, 0.2, 0.2]], "float32")


def linear_model(weights=WEIGHTS, *head):
    """Logits linear in the input, and layers that follow."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(weights.shape[1]), *head])
    model.layers[0].set_weights([weights, np.zeros(weights.shape[1])])
    return model


def inputs(count=50, weights=WEIGHTS):
    """Inputs at least 0.25 away from the clip range, with the label the linear model gives them."""
    x = np.random.default_rng(0).uniform(0.25, 0.75, (count, 4)).astype("float32")
    return x, (x @ weights).argmax(1)


def distance(x, y, norm, weights=WEIGHTS):
    """The size of the smallest perturbation that makes a rival win: the margin over the dual norm, for the nearest."""
    smallest = np.full(len(x), np.inf)
    for rival in range(weights.shape[1]):
        slope = weights[:, y] - weights[:, [rival]]
        margin = (x.T * slope).sum(0)
        dual = np.abs(slope).sum(0) if norm == "inf" else np.sqrt((slope**2).sum(0))
        smallest = np.where(y == rival, smallest, np.minimum(smallest, margin / np.where(y == rival, 1, dual)))
    return smallest


def exact_robust(x, y, eps, norm, weights=WEIGHTS):
    """Where no perturbation within eps makes a rival win."""
    return distance(x, y, norm, weights) > eps
