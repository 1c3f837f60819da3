"""What the fused computation of `fused.py` is asked for: one of several formulas, and blocks of some size."""

from typing import NamedTuple


class BlockPlan(NamedTuple):
    """Set the size of the blocks of rows.

    Attributes:
        cores: How many processor cores work on a block; None for one block of all rows.
        logits_per_core: How many logits of a block one core works on; None for what is fastest on the backend.
    """

    cores: int | None
    logits_per_core: int | None = None


class Form(NamedTuple):
    """Say which of the formulas a program computes.

    Attributes:
        spread: `"sum_of_squares"` or `"variance"`.
        smooth: Whether labels are smoothed.
        masked: Whether logits may be arbitrary where the scale is 0.
        sparse: Whether labels are class ids. Label distributions are checked.
    """

    spread: str
    smooth: bool
    masked: bool
    sparse: bool
