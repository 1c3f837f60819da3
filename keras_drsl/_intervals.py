"""Confidence intervals of shares and of their differences."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from keras_drsl._typing import Array

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's method, within [0, 1]."""
    z = Z
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # Rounding does not give these two limits exactly.
    return centre - half_width if successes > 0 else 0.0, centre + half_width if successes < count else 1.0


def confidence_sequence(successes: int, count: int, alpha: float = 0.05) -> tuple[float, float]:
    """Return an interval of a share that is valid after any number of examples, however the last one was chosen.

    It holds the shares whose likelihood is at least `alpha` times its average over all shares in [0, 1]. With a
    probability of `1 - alpha`, the true share is in the intervals of all counts. It is wider than Wilson's.

    Args:
        successes: How many of the examples count.
        count: How many examples there are, drawn one after the other at random.
        alpha: The probability of error, in (0, 1).

    Reference: Waudby-Smith and Ramdas, "Confidence sequences for sampling without replacement", arXiv:2006.04347 (the
    prior-posterior ratio).
    """
    failures = count - successes
    # The density of the beta distribution that is the posterior of a uniform prior.
    constant = math.lgamma(count + 2) - math.lgamma(successes + 1) - math.lgamma(failures + 1) - math.log(alpha)

    def is_likely(share: float) -> bool:
        parts = [(number, part) for number, part in ((successes, share), (failures, 1 - share)) if number]
        # The bisection may reach 0 or 1.
        logs = [number * math.log(part) for number, part in parts if part > 0]
        return len(logs) == len(parts) and constant + sum(logs) >= 0

    best = successes / count
    low = 0.0 if not successes else 1 - _last_where(lambda other: is_likely(1 - other), 1 - best, 1.0)
    return low, 1.0 if not failures else _last_where(is_likely, best, 1.0)


def is_outside_sequence(share: float, successes: Array, counts: Array, alpha: float) -> Array:
    """Return where a share is not in the `confidence_sequence` of some successes, of so many examples.

    Args:
        share: The share, in (0, 1).
        successes: How many of the examples count, any shape.
        counts: How many examples there are, of the same shape.
        alpha: The probability of error, in (0, 1).

    Raises:
        ImportError: Without SciPy.
    """
    from scipy.special import gammaln

    failures = counts - successes
    constant = gammaln(counts + 2) - gammaln(successes + 1) - gammaln(failures + 1) - math.log(alpha)
    return np.asarray(constant + successes * math.log(share) + failures * math.log1p(-share) < 0)


def of_ratio(wrong: Sequence[int], counts: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % confidence interval of `1 - sum(wrong) / sum(counts)`, over the examples.

    It is Wilson's for the number of independent positions that would have the variance of the ratio of the two sums
    (Cochran, "Sampling Techniques", chapter 6), at most their number. Where no example differs from the others, that is
    the number of examples.

    Args:
        wrong: How many positions of each example are wrong.
        counts: How many there are.
    """
    total, size = sum(counts), len(counts)
    share = sum(wrong) / total
    squares = sum((part - share * count) ** 2 for part, count in zip(wrong, counts, strict=True))
    variance = size / max(size - 1, 1) * squares / total**2
    independent = min(share * (1 - share) / variance, total) if variance > 0 else size
    return wilson((1 - share) * independent, independent)


def paired_difference(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of the difference of two shares on the same examples, by Tango's method.

    It is never of width 0, also where no example differs.

    Args:
        only_first: How many examples count for the first share only.
        only_second: How many count for the second share only.
        count: How many examples there are.
    """

    def score(delta: float) -> float:
        """Return the score statistic of the hypothesis that the difference is `delta`, falling in `delta`."""
        linear = (2 * count - only_first + only_second) * delta - only_first - only_second
        root = math.sqrt(max(linear**2 + 8 * count * only_second * delta * (1 - delta), 0.0))
        # The most likely share that only the second one counts, given the difference.
        second = max((root - linear) / (4 * count), 0.0)
        variance = count * (2 * second + delta * (1 - delta))
        distance = only_first - only_second - count * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    difference = (only_first - only_second) / count
    low = _last_where(lambda delta: score(delta) > Z, -1.0, difference)
    return low, _last_where(lambda delta: score(delta) > -Z, difference, 1.0)


def _last_where(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return, by bisection, the largest number between two others where something holds that holds below it."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of McNemar's exact test that two shares on the same examples are equal, two-sided.

    Args:
        only_first: How many examples count for the first share only.
        only_second: How many count for the second share only.
    """
    count = only_first + only_second
    tail = term = 1  # the number of ways to choose 0 of them
    for number in range(1, min(only_first, only_second) + 1):
        term = term * (count - number + 1) // number
        tail += term
    return min(1.0, 2 * tail / (1 << count))


def paired_mean(differences: Array, counts: Array) -> tuple[float, float]:
    """Return the 95 % confidence interval of `sum(differences) / sum(counts)`, over the examples, in [-1, 1].

    Two examples are added that differ fully, one in each direction, as Bonett and Price do for shares (Journal of
    Educational and Behavioral Statistics 37, 2012). So its width is never 0.

    Args:
        differences: For each example by how many predictions the sides differ, shape `(count,)`.
        counts: How many predictions it has.
    """
    added = counts.mean()
    differences, counts = np.append(differences, [added, -added]), np.append(counts, [added, added])
    share = float(differences.sum() / counts.sum())
    half_width = Z * float(np.sqrt(((differences - share * counts) ** 2).sum()) / counts.sum())
    return max(share - half_width, -1.0), min(share + half_width, 1.0)


def welch(first: Array, second: Array, *, step: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of the difference of two means of shares, by Welch's method, in [-1, 1].

    Its width is never 0: each variance is at least that of rounding to a multiple of `step`.

    Args:
        first: The shares of the first mean, two or more, independent of each other.
        second: Those of the second mean.
        step: The share of one example.

    Raises:
        ImportError: Without SciPy.
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("An interval over several models needs `pip install scipy`") from error
    difference = float(first.mean() - second.mean())
    variances = [max(float(values.var(ddof=1)), step**2 / 12) / len(values) for values in (first, second)]
    parts = (part**2 / (len(values) - 1) for part, values in zip(variances, (first, second), strict=True))
    half_width = float(t.ppf(0.975, sum(variances) ** 2 / sum(parts))) * math.sqrt(sum(variances))
    return max(difference - half_width, -1.0), min(difference + half_width, 1.0)


def median_ranks(count: int) -> tuple[int, int]:
    """Return the ranks, from 1 on, of the order statistics that enclose a median with at least 95 % confidence.

    Of few values, the limits are the ranks 0 and `count + 1`, of no value.

    Args:
        count: How many values there are.
    """
    # How many of them lie below the median is binomial: the rank is the largest one with a tail of at most 2.5 %.
    tail, term, rank = 0, 1, 0  # in units of 1 / 2^count
    while 40 * (tail + term) <= 1 << count:
        tail, rank = tail + term, rank + 1
        term = term * (count - rank + 1) // rank
    return rank, count + 1 - rank
