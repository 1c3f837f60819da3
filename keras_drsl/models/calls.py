"""The number of inputs that models are evaluated on: the cost of an attack."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Calls:
    """How many inputs models were evaluated on.

    Attributes:
        gradients: With a gradient.
        queries: Without one.
    """

    gradients: int = 0
    queries: int = 0


# Of each thread its own, as two threads may share a classifier.
_CALLS: ContextVar[Calls | None] = ContextVar("calls", default=None)


@contextmanager
def count_calls() -> Iterator[Calls]:
    """Count the calls within the block, except for those of a block inside it and of other threads."""
    calls = Calls()
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def add_calls(*, gradients: int = 0, queries: int = 0) -> None:
    """Add to the calls of the block that counts them, if there is one."""
    calls = _CALLS.get()
    if calls is not None:
        calls.gradients += gradients
        calls.queries += queries
