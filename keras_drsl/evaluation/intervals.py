"""Confidence intervals of shares."""

import math


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's method, within [0, 1]."""
    z = 1.959963984540054
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
