"""The formulas as plain loops in float64, one sample at a time: where the tests' expected values come from."""

import math

import numpy as np


def log_softmax(z):
    """`z`: the logits of one sample, a sequence of floats."""
    top = max(z)
    total = math.fsum(math.exp(value - top) for value in z)
    return [value - top - math.log(total) for value in z]


def cross_entropy(y, z, label_smoothing=0.0):
    classes = len(z)
    log_p = log_softmax(z)
    return -math.fsum(
        (label * (1 - label_smoothing) + label_smoothing / classes) * value
        for label, value in zip(y, log_p, strict=True)
    )


def spread(y, z, space="log_softmax", kind="sum_of_squares"):
    log_p = log_softmax(z)
    values = log_p if space == "log_softmax" else [math.exp(value) for value in log_p]
    weights = [1 - label for label in y]
    count = math.fsum(weights)
    mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / count
    squares = math.fsum(weight * (value - mean) ** 2 for weight, value in zip(weights, values, strict=True))
    return squares / count if kind == "variance" else squares


def entropy(y, z):
    classes = len(z)
    if classes == 2:
        return 1.0
    mass = [(1 - label) * math.exp(value) for label, value in zip(y, log_softmax(z), strict=True)]
    total = math.fsum(mass)
    shares = [value / total for value in mass if value > 0]
    return -math.fsum(share * math.log(share) for share in shares) / math.log(classes - 1)


def diversity(y, z, measure="variance", space="log_softmax"):
    if measure == "entropy":
        return entropy(y, z)
    variance = spread(y, z, space, "variance")
    return math.sqrt(variance) if measure == "std" else variance


def drs_loss(y, z, lam=0.3, space="log_softmax", kind="sum_of_squares", label_smoothing=0.0):
    return cross_entropy(y, z, label_smoothing) + lam * spread(y, z, space, kind)


def each(function, y, z, **options):
    """`function` for each sample: `y` a label distribution and `z` logits, shape `(..., C)`; returns `(...)`."""
    y, z = np.asarray(y, "float64"), np.asarray(z, "float64")
    flat = zip(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), strict=True)
    values = [function(one_y.tolist(), one_z.tolist(), **options) for one_y, one_z in flat]
    return np.array(values).reshape(z.shape[:-1])


def one_hot(labels, classes):
    return np.eye(classes)[np.asarray(labels)]


def gradient(function, z, step=1e-6):
    """The gradient of `function(z).sum()` by central differences, in float64."""
    z = np.asarray(z, "float64")
    result = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        result[index] = (np.sum(function(up)) - np.sum(function(down))) / (2 * step)
    return result
