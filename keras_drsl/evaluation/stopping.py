"""When an evaluation may end early: its interval is narrow enough, or a threshold is decided."""

from typing import Any, NamedTuple

import numpy as np

from keras_drsl._intervals import confidence_sequence
from keras_drsl._typing import Array
from keras_drsl._validation import check_number

# How many examples all attacks finish before the interval is looked at.
BETWEEN_LOOKS = 64


class StoppingRule(NamedTuple):
    """Say when an evaluation may end. Examples are attacked in a random order, a few at a time by all attacks.

    Attributes:
        precision: How far the interval may reach from the share to each side; None for no such rule.
        at_least: The interval must lie wholly above or below this share; None for no such rule.
    """

    precision: float | None
    at_least: float | None

    @property
    def settings(self) -> dict[str, Any]:
        """What a report records of the rule."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def is_met(self, robust: int, count: int) -> bool:
        """Return whether an evaluation may end.

        Args:
            robust: How many of the examples that were attacked are robust.
            count: How many were attacked.
        """
        low, high = confidence_sequence(robust, count)
        share = robust / count
        is_narrow = self.precision is None or max(share - low, high - share) <= self.precision
        is_decided = self.at_least is None or not low < self.at_least <= high
        return is_narrow and is_decided

    def check_count(self, count: int) -> None:
        """Raise `ValueError` if this many examples can never give the precision."""
        least = 1 - confidence_sequence(count, count)[0]  # the interval is narrowest where all are robust
        if self.precision is not None and least > self.precision:
            raise ValueError(
                f"`precision` must be at least {least:.4f} for {count} examples: the interval of so few reaches at "
                f"least as far. Received: precision={self.precision}"
            )

    def parts(self, count: int, seed: int) -> list[Array]:
        """Return the positions of the examples in a random order, as many at a time as lie between two looks."""
        order = np.random.default_rng(seed).permutation(count)
        return [np.sort(order[start : start + BETWEEN_LOOKS]) for start in range(0, count, BETWEEN_LOOKS)]


def stopping_rule(precision: Any, at_least: Any, **others: Any) -> StoppingRule | None:
    """Return the rule of the arguments `precision` and `at_least` of `evaluate_robustness`; None without both.

    Args:
        precision: A number in (0, 0.5), or None.
        at_least: A number in (0, 1], or None.
        **others: Arguments that must have their defaults beside a rule, with their values: None or `"multiclass"`.

    Raises:
        ValueError: If one is out of its range.
    """
    if precision is None and at_least is None:
        return None
    if precision is not None:
        precision = check_number("precision", precision, "a number in (0, 0.5)", lambda number: 0 < number < 0.5)
    if at_least is not None:
        at_least = check_number("at_least", at_least, "a number in (0, 1]", lambda number: 0 < number <= 1)
    given = "precision" if at_least is None else "at_least"
    for name, value in others.items():
        if value not in (None, "multiclass"):
            raise ValueError(f"`{name}` cannot be combined with `{given}`. Received: {name}={value!r}")
    return StoppingRule(precision, at_least)
