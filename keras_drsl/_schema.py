"""Rules for the content of files, and errors that name what breaks them."""

import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Hold what a value must be, in words and as a test."""

    text: str
    obeys: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    # The comparison is False for NaN, and exact for integers beyond the range of floats.
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def integer(at_least: int) -> Rule:
    """Return the rule of an integer that is not too small."""
    return Rule(f"an integer of {at_least} or more", lambda value: type(value) is int and value >= at_least)


def dict_of(item: Rule) -> Rule:
    """Return the rule of a dictionary whose values obey a rule."""
    return Rule(
        f"a dictionary, with each value {item.text}",
        lambda value: isinstance(value, dict) and all(item.obeys(part) for part in value.values()),
    )


def list_of(item: Rule) -> Rule:
    """Return the rule of a list whose items obey a rule."""
    return Rule(
        f"a list, with each item {item.text}",
        lambda value: isinstance(value, list) and all(item.obeys(part) for part in value),
    )


def optional(rule: Rule) -> Rule:
    """Return the rule of a value that may also be None."""
    return Rule(f"{rule.text}, or null", lambda value: value is None or rule.obeys(value))


def is_nested(value: Any, obeys: Callable[[Any], bool], depth: int = 8) -> bool:
    """Return whether a value, or each value in nested lists, obeys a test."""
    if isinstance(value, list):
        return depth > 0 and value != [] and all(is_nested(item, obeys, depth - 1) for item in value)
    return obeys(value)


NUMBER = Rule("a number", is_number)
NOT_NEGATIVE = Rule("a number of 0 or more", lambda value: is_number(value) and value >= 0)
NUMBERS = Rule("a number, or nested lists of numbers", lambda value: is_nested(value, is_number))
SHARE = Rule("a number in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
# Three hundred years.
SECONDS = Rule("a number in [0, 1e10]", lambda value: is_number(value) and 0 <= value <= 1e10)
TEXT = Rule("a text", lambda value: isinstance(value, str))
NAME = Rule("a text that is not empty", lambda value: isinstance(value, str) and value != "")
BOOL = Rule("true or false", lambda value: isinstance(value, bool))
DICT = Rule("a dictionary", lambda value: isinstance(value, dict))
LIST = Rule("a list", lambda value: isinstance(value, list))


def check_value(where: str, value: Any, rule: Rule) -> None:
    """Raise `ValueError` for a value that breaks a rule."""
    if not rule.obeys(value):
        raise ValueError(f"`{where}` must be {rule.text}. Received: {reprlib.repr(value)}")


def check_fields(
    where: str, content: Any, rules: Mapping[str, Rule], *, may_lack: Collection[str] = (), may_hold_more: bool = False
) -> None:
    """Raise `ValueError` for a dictionary with a field that is missing, unknown or breaks its rule.

    Args:
        where: The name of the dictionary, for the error.
        content: The dictionary.
        rules: The rule of each field.
        may_lack: Fields that need not be there.
        may_hold_more: Whether fields without a rule are allowed.
    """
    check_value(where, content, DICT)
    missing = [name for name in rules if name not in content and name not in may_lack]
    if missing:
        raise ValueError(f"`{where}` must hold {', '.join(missing)}. Received: {reprlib.repr(list(content))}")
    unknown = [name for name in content if name not in rules]
    if unknown and not may_hold_more:
        raise ValueError(f"`{where}` must hold {', '.join(rules)} only. Received: {reprlib.repr(unknown)}")
    for name, rule in rules.items():
        if name in content:
            check_value(f"{where}.{name}", content[name], rule)
