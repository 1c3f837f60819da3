"""Confidence intervals of shares."""

import math
from collections.abc import Sequence


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's method, within [0, 1]."""
    z = 1.959963984540054
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # Rounding does not give these two limits exactly.
    return centre - half_width if successes > 0 else 0.0, centre + half_width if successes < count else 1.0


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
