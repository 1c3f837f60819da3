"""Confidence intervals of shares."""

import math
from collections.abc import Sequence


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's method, within [0, 1]."""
    z = 1.959963984540054
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def of_ratio(wrong: Sequence[int], counts: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % confidence interval of `1 - sum(wrong) / sum(counts)`, over the examples.

    The variance is that of a ratio of two sums (Cochran, "Sampling Techniques", chapter 6). With one example it says
    nothing: the interval is [0, 1].

    Args:
        wrong: How many positions of each example are wrong.
        counts: How many there are.
    """
    total, size = sum(counts), len(counts)
    share = sum(wrong) / total
    if size < 2:
        return 0.0, 1.0
    squares = sum((part - share * count) ** 2 for part, count in zip(wrong, counts, strict=True))
    width = 1.96 * math.sqrt(size / (size - 1) * squares) / total
    return max(1 - share - width, 0.0), min(1 - share + width, 1.0)
