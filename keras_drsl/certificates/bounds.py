"""Bounds of the share of draws that return a class, and when no more draws are needed."""

import math

import numpy as np

from keras_drsl._intervals import confidence_sequence, is_outside_sequence
from keras_drsl._typing import Array


def lower_bound(hits: int, count: int, alpha: float) -> float:
    """Return a lower bound of a share that is right with a probability of `1 - alpha`, by Clopper and Pearson."""
    from scipy.stats import beta

    return float(beta.ppf(alpha, hits, count - hits + 1)) if hits else 0.0


def radius_of(share: float, sigma: float) -> float:
    """Return the radius that a lower bound of the share certifies, 0 unless it is above 1/2."""
    from scipy.stats import norm

    return sigma * float(norm.ppf(share)) if share > 0.5 else 0.0


def check_draws(draws: int, alpha: float, sigma: float, radius: float | None) -> None:
    """Raise `ValueError` if so many draws, all of one class, do not certify a radius.

    Args:
        draws: How many draws.
        alpha: The probability of error.
        sigma: The standard deviation of the noise.
        radius: The radius, or None for any.

    Raises:
        ValueError: If they are too few.
        ImportError: Without SciPy.
    """
    try:
        from scipy.stats import norm
    except ImportError as error:
        raise ImportError("Certificates need `pip install scipy`") from error
    if radius is None:
        needed = math.floor(math.log(alpha) / math.log(0.5)) + 1
        if draws < needed:
            raise ValueError(
                f"`draws` must be at least {needed} for any certificate at alpha={alpha:g}. Received: draws={draws}"
            )
        return
    share = float(norm.cdf(radius / sigma))
    if share == 1 or not is_outside_sequence(share, np.array([draws]), np.array([draws]), alpha)[0]:
        raise ValueError(
            f"`radius` must be one that {draws} draws can certify at sigma={sigma:g} and alpha={alpha:g}: at most "
            f"{radius_of(confidence_sequence(draws, draws, alpha)[0], sigma):.4g}. Received: radius={radius}"
        )


class Rule:
    """Count the draws of one example, and decide when they end.

    The decision depends on the order of the draws, not on how many are added together.

    Args:
        draws: How many draws there are at most.
        alpha: The probability of error.
        sigma: The standard deviation of the noise.
        radius: The radius to decide about, or None for the largest one.

    Attributes:
        hits: How many of the draws that count return the class.
        count: How many draws count.
        has_ended: Whether no more are needed.
    """

    def __init__(self, draws: int, alpha: float, sigma: float, radius: float | None) -> None:
        from scipy.stats import norm

        self._draws, self._alpha, self._sigma = draws, alpha, sigma
        self._decides = radius is not None
        self._share = 0.5 if radius is None else float(norm.cdf(radius / sigma))
        self.hits = self.count = 0
        self.has_ended = False

    def add(self, are_hits: Array) -> None:
        """Count the next draws, up to the one that ends them."""
        counts = self.count + np.arange(1, len(are_hits) + 1)
        hits = self.hits + np.cumsum(are_hits)
        ends = is_outside_sequence(self._share, hits, counts, self._alpha)
        if not self._decides:
            ends &= hits < self._share * counts  # such an example abstains
        last = int(ends.argmax()) if ends.any() else len(counts) - 1
        self.hits, self.count = int(hits[last]), int(counts[last])
        self.has_ended = bool(ends.any()) or self.count >= self._draws

    @property
    def abstains(self) -> bool:
        """Whether no majority for the class was found: the draws may be few, or fewer than half of them return it."""
        return self.radius == 0 and not (self._decides and self.hits > self.count / 2 and self.count < self._draws)

    @property
    def radius(self) -> float:
        """The radius that is certified, 0 for none."""
        if self._decides:
            return radius_of(confidence_sequence(self.hits, self.count, self._alpha)[0], self._sigma)
        if self.count < self._draws:
            return 0.0
        return radius_of(lower_bound(self.hits, self.count, self._alpha), self._sigma)
