"""Compute the formulas as plain loops in float64, one sample at a time. The tests take expected values from here."""

import math

import numpy as np


def log_softmax(z):
    """Compute log p; `z` are the logits of one sample, a sequence of floats."""
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


def mean_of_others(y, values):
    w = [1 - label for label in y]
    return math.fsum(weight * value for weight, value in zip(w, values, strict=True)) / math.fsum(w)


def shares_of_others(y, z):
    """Return the non-true probabilities, scaled to sum to 1."""
    top = max(value for label, value in zip(y, z, strict=True) if label < 1)
    mass = [(1 - label) * math.exp(value - top) if label < 1 else 0.0 for label, value in zip(y, z, strict=True)]
    return [share / math.fsum(mass) for share in mass]


def complement_entropy(y, z):
    return -math.fsum(share * math.log(share) for share in shares_of_others(y, z) if share > 0)


def squentropy(y, z, lam):
    return cross_entropy(y, z) + lam * mean_of_others(y, [value**2 for value in z])


def logit_squeezing(y, z, lam):
    return cross_entropy(y, z) + lam * math.fsum(value**2 for value in z)


def z_loss(y, z, lam, base=cross_entropy):
    top = max(z)
    return base(y, z) + lam * (top + math.log(math.fsum(math.exp(value - top) for value in z))) ** 2


def guided_complement_entropy(y, z, alpha):
    # For a class id the power of the true probability.
    guide = math.exp(alpha * math.fsum(label * value for label, value in zip(y, log_softmax(z), strict=True)))
    return -guide * (1.0 if len(z) == 2 else complement_entropy(y, z) / math.log(len(z) - 1))


def complement_objective(y, z, lam):
    return cross_entropy(y, z) - lam * complement_entropy(y, z) / (len(z) - 1)


def probabilistically_compact(y, z, margin, lam):
    p = [math.exp(value) for value in log_softmax(z)]
    p_true, z_true = (math.fsum(a * b for a, b in zip(y, values, strict=True)) for values in (p, z))
    gaps = mean_of_others(y, [max(0.0, value + margin - p_true) for value in p])
    leads = [share * max(0.0, z_true - value) for share, value in zip(shares_of_others(y, z), z, strict=True)]
    return gaps + lam * math.fsum(leads)


def prs_loss(y, z, lam, start, end, weights=None, number=None):
    """Compute the loss of all tokens of a batch: `y` label distributions, `z` logits, one row per token."""
    means = []
    for labels, logits in zip(y, z, strict=True):
        true = max(range(len(logits)), key=lambda k, labels=labels: labels[k])
        others = sorted((value for k, value in enumerate(logits) if k != true), reverse=True)
        means.append(math.fsum(others[start:end]) / (end - start))
    weights = [1.0] * len(means) if weights is None else weights
    top = max(means)
    total = top + math.log(math.fsum(s * math.exp(a - top) for s, a in zip(weights, means, strict=True)))
    number = len(means) if number is None else number
    rows = zip(y, z, means, strict=True)
    return [cross_entropy(labels, logits) - lam * number * (a - total) for labels, logits, a in rows]


def each(function, y, z, **options):
    """Compute `function` per sample: `y` a label distribution and `z` logits, shape `(..., C)`; returns `(...)`."""
    y, z = np.asarray(y, "float64"), np.asarray(z, "float64")
    flat = zip(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), strict=True)
    values = [function(labels.tolist(), logits.tolist(), **options) for labels, logits in flat]
    return np.array(values).reshape(z.shape[:-1])


def one_hot(labels, classes):
    # Not `np.eye(classes)[labels]`, which for a vocabulary of 50,000 takes 20 GB.
    return (np.asarray(labels)[..., None] == np.arange(classes)).astype("float64")


def gradient(function, z, step=1e-6):
    """Compute the gradient of `function(z).sum()` by central differences, in float64."""
    z = np.asarray(z, "float64")
    result = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        result[index] = (np.sum(function(up)) - np.sum(function(down))) / (2 * step)
    return result


def log_sum_exp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def bilateral_softmax(y, z, positive_temperature, negative_temperature):
    """Compute the bilateral softmax loss; NaN without a class of weight 0."""
    pairs = list(zip(y, z, strict=True))
    positives = [math.log(label) + value / positive_temperature for label, value in pairs if label > 0]
    negatives = [value / negative_temperature for label, value in pairs if label == 0]
    if not negatives:
        return math.nan
    return negative_temperature / positive_temperature * log_sum_exp(negatives) - log_sum_exp(positives)


def interval_dense(lower, upper, kernel, bias):
    """Compute the ends of a box behind a dense layer; `lower` and `upper` have one number per input."""
    low, high = [], []
    for unit in range(kernel.shape[1]):
        weights = [float(weight) for weight in kernel[:, unit]]
        pairs = list(zip(weights, map(float, lower), map(float, upper), strict=True))
        low.append(math.fsum(w * (small if w > 0 else large) for w, small, large in pairs) + float(bias[unit]))
        high.append(math.fsum(w * (large if w > 0 else small) for w, small, large in pairs) + float(bias[unit]))
    return np.array(low), np.array(high)


def interval_conv(lower, upper, kernel, bias, strides):
    """Compute the ends of a box of an image `(height, width, channels)` behind a convolution with same padding."""
    size = kernel.shape[0]
    height, width = lower.shape[:2]
    rows, columns = -(-height // strides), -(-width // strides)
    before = [
        max((count - 1) * strides + size - length, 0) // 2 for count, length in ((rows, height), (columns, width))
    ]
    low, high = (np.zeros((rows, columns, kernel.shape[3])) for _ in range(2))
    for i, j in np.ndindex(rows, columns):
        taken = []
        for a, b in np.ndindex(size, size):
            row, column = i * strides + a - before[0], j * strides + b - before[1]
            if 0 <= row < height and 0 <= column < width:
                taken += [(row, column, channel, a, b) for channel in range(kernel.shape[2])]
        ends = [[float(end[row, column, channel]) for row, column, channel, _, _ in taken] for end in (lower, upper)]
        weights = np.array([kernel[a, b, channel] for _, _, channel, a, b in taken])
        low[i, j], high[i, j] = interval_dense(*ends, weights, bias)
    return low, high


def interval_max_pool(lower, upper, size=2):
    """Compute the ends of a box of an image behind maxima over squares, one step apart."""
    rows, columns = lower.shape[0] - size + 1, lower.shape[1] - size + 1
    return tuple(
        np.array([[end[i : i + size, j : j + size].max(axis=(0, 1)) for j in range(columns)] for i in range(rows)])
        for end in (lower, upper)
    )


def rectified(lower, upper):
    """Compute the ends of a box behind a ReLU."""
    return np.maximum(lower, 0), np.maximum(upper, 0)
