"""The perturbations an attack may make: an L-inf or L2 ball around each input, cut by the valid range."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

NORMS = ("inf", 2)


def check_range(name: str, x: np.ndarray, clip_min: float, clip_max: float) -> None:
    """`ValueError` unless all values lie in the valid range; NaN does not."""
    if not (x.min() >= clip_min and x.max() <= clip_max):
        raise ValueError(
            f"`{name}` must lie in [clip_min, clip_max] = [{clip_min:g}, {clip_max:g}]. "
            f"Received: values from {x.min():g} to {x.max():g}"
        )


def size(delta: np.ndarray, norm: str | int) -> np.ndarray:
    """The norm of each row of an array, in float64."""
    delta = np.abs(delta.reshape(len(delta), -1).astype("float64"))
    return delta.max(axis=1, initial=0) if norm == "inf" else np.sqrt((delta**2).sum(axis=1))


def project(x_adv: Any, x: Any, ball: dict, norm: str | int) -> Any:
    """The nearest point of the ball around `x`, then of the valid range.

    Args:
        x_adv: shape `(batch, ...)`.
        x: the same shape, within the range.
        ball: scalars `eps`, `clip_min`, `clip_max`.
        norm: "inf" or 2.
    """
    if norm == "inf":
        x_adv = ops.clip(x_adv, x - ball["eps"], x + ball["eps"])
    else:
        delta = x_adv - x
        x_adv = x + delta * ops.minimum(1.0, ball["eps"] / ops.maximum(_length(delta), 1e-30))
    return ops.clip(x_adv, ball["clip_min"], ball["clip_max"])


def direction(gradient: Any, norm: str | int) -> Any:
    """Where a step of size 1 gains the most: the gradient's sign, or the gradient at length 1. 0 where it is 0."""
    if norm == "inf":
        return ops.sign(gradient)
    # However small the gradient, its squares must not vanish.
    largest = ops.max(ops.abs(gradient), axis=tuple(range(1, len(gradient.shape))), keepdims=True)
    gradient = gradient / ops.maximum(largest, 1e-30)
    return gradient / ops.maximum(_length(gradient), 1e-30)


def _length(x: Any) -> Any:
    return ops.sqrt(ops.sum(ops.square(x), axis=tuple(range(1, len(x.shape))), keepdims=True))


def random_points(generators: list[np.random.Generator], shape: tuple[int, ...], eps: float, norm: str | int) -> Any:
    """A point of the ball around 0 for each generator, uniformly distributed, shape `(batch, *shape)`."""
    if norm == "inf":
        points = [generator.uniform(-eps, eps, shape) for generator in generators]
    else:
        points = []
        for generator in generators:
            point = generator.standard_normal(shape)
            radius = eps * generator.uniform() ** (1 / point.size)
            points.append(point * radius / np.sqrt((point**2).sum()))
    return np.asarray(points, dtype="float32").reshape(-1, *shape)


def draw(shape: Any, eps: Any, norm: str | int, seed: Any) -> Any:
    """Points of the ball around 0, uniformly distributed, in a program that trains.

    Args:
        shape: `(batch, ...)`.
        eps: a scalar.
        norm: "inf" or 2.
        seed: a `keras.random.SeedGenerator`.
    """
    if norm == "inf":
        return eps * keras.random.uniform(shape, -1.0, 1.0, seed=seed)
    features = ops.cast(math.prod(shape[1:]), "float32")
    radius = keras.random.uniform((shape[0],) + (1,) * (len(shape) - 1), seed=seed) ** (1 / features)
    return eps * radius * direction(keras.random.normal(shape, seed=seed), norm)
