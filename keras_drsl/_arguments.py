"""What the arguments of public classes and functions may be; anything else is a `ValueError` that names them."""

import math
import numbers
from collections.abc import Callable, Collection
from typing import Any


def check_number(name: str, value: Any, rule: str, obeys: Callable[[float], bool]) -> float:
    """`value` as a float if it is a finite number that obeys the rule, or `ValueError`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and obeys(float(value))):
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return float(value)


def check_non_negative(name: str, value: Any) -> float:
    """`value` as a float >= 0, or `ValueError`."""
    return check_number(name, value, "a non-negative number", lambda number: number >= 0)


def check_positive(name: str, value: Any) -> float:
    """`value` as a float > 0, or `ValueError`."""
    return check_number(name, value, "a positive number", lambda number: number > 0)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """`value` if it is one of `choices`, or `ValueError`."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}")
    return value


def check_integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """`value` as an int, or `ValueError`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or (at_least is not None and value < at_least):
        rule = "an integer" if at_least is None else f"an integer of {at_least} or more"
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return int(value)
