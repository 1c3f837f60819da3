"""A linear model, whose worst perturbation is known in closed form."""

import keras
import numpy as np

WEIGHTS = np.array([[1.0, -1.0, 0.5], [0.3, 0.8, -0.2], [-0.4, 0.1, 0.9], [0.2, 0.2, 0.2]], "float32")


def linear_model(weights=WEIGHTS, *head):
    """Return a model of logits linear in the input, and of layers that follow."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(weights.shape[1]), *head])
    model.layers[0].set_weights([weights, np.zeros(weights.shape[1])])
    return model


def inputs(count=50, weights=WEIGHTS):
    """Return inputs at least 0.25 away from the limits of the range, with the labels of the linear model."""
    x = np.random.default_rng(0).uniform(0.25, 0.75, (count, 4)).astype("float32")
    return x, (x @ weights).argmax(1)


def distance(x, y, norm, weights=WEIGHTS):
    """Return the size of the smallest perturbation that changes the class: the smallest margin over dual norm."""
    smallest = np.full(len(x), np.inf)
    for other in range(weights.shape[1]):
        gradient = weights[:, y] - weights[:, [other]]
        margin = (x.T * gradient).sum(0)
        # In L1 one feature moves, as long as it has room.
        dual = {"inf": np.abs(gradient).sum(0), 2: np.sqrt((gradient**2).sum(0)), 1: np.abs(gradient).max(0)}[norm]
        smallest = np.where(y == other, smallest, np.minimum(smallest, margin / np.where(y == other, 1, dual)))
    return smallest


def exact_robust(x, y, eps, norm, weights=WEIGHTS):
    """Return where no perturbation within eps changes the class."""
    return distance(x, y, norm, weights) > eps


# The weights of a single unit, or of two classes.
UNIT = np.array([1.0, -0.8, 0.5, 0.2], "float32")


def unit_inputs(count=80):
    """Return inputs away from the limits, their labels, and the size of the perturbation that changes the class."""
    x = np.random.default_rng(0).uniform(0.25, 0.75, (count, 4)).astype("float32")
    z = (x - 0.5) @ UNIT.astype("float64")
    return x, (z > 0).astype("int32"), np.abs(z) / np.abs(UNIT).sum()
