"""Check the arguments of public classes and functions."""

import math
import numbers
from collections.abc import Callable, Collection
from typing import Any


def check_number(name: str, value: Any, rule: str, obeys: Callable[[float], bool]) -> float:
    """Return `value` as a float, or raise `ValueError` unless it is a finite number that obeys the rule."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and obeys(float(value))):
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return float(value)


def check_non_negative(name: str, value: Any) -> float:
    """Return `value` as a float, or raise `ValueError` unless it is a number >= 0."""
    return check_number(name, value, "a non-negative number", lambda number: number >= 0)


def check_positive(name: str, value: Any) -> float:
    """Return `value` as a float, or raise `ValueError` unless it is a number > 0."""
    return check_number(name, value, "a positive number", lambda number: number > 0)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return `value`, or raise `ValueError` unless it is one of `choices`."""
    if value not in choices or isinstance(value, bool):  # True equals 1
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}")
    return value


def check_name(name: str, value: Any, choices: Collection[str]) -> str:
    """Return the name among `choices` that equals `value`, in any case of letters, or raise `ValueError`."""
    result: str = check_choice(name, value.lower() if isinstance(value, str) else value, choices)
    return result


def check_integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """Return `value` as an int, or raise `ValueError` unless it is an integer in its range."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or (at_least is not None and value < at_least):
        rule = "an integer" if at_least is None else f"an integer of {at_least} or more"
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")
    return int(value)


def check_max_samples(value: Any) -> int | None:
    """Return `max_samples` as an int, or None for None, or raise `ValueError` unless it is an integer of 1 or more."""
    return None if value is None else check_integer("max_samples", value, at_least=1)


def check_shard(shard: Any) -> tuple[int, int] | None:
    """Return `(i, n)`, or None for None, or raise `ValueError` unless `0 <= i < n`."""
    if shard is None:
        return None
    is_pair = isinstance(shard, tuple | list) and len(shard) == 2 and all(isinstance(part, int) for part in shard)
    if not is_pair or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` must be (i, n) with 0 <= i < n. Received: shard={shard!r}")
    return shard[0], shard[1]
