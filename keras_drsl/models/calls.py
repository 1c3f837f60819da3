"""What an attack costs: the number of inputs that models are evaluated on, and the time to compile programs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Calls:
    """What calls of models cost.

    Attributes:
        gradients: On how many inputs models were evaluated with a gradient.
        queries: On how many without one.
        compile_seconds: How long their programs were compiled.
    """

    gradients: int = 0
    queries: int = 0
    compile_seconds: float = 0.0


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


def add_calls(*, gradients: int = 0, queries: int = 0, compile_seconds: float = 0.0) -> None:
    """Add to the calls of the block that counts them, if there is one."""
    calls = _CALLS.get()
    if calls is not None:
        calls.gradients += gradients
        calls.queries += queries
        calls.compile_seconds += compile_seconds
