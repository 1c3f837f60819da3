"""Provide the functions that two of the three backends share."""

import os
from collections.abc import Callable
from typing import Any

import keras

from keras_drsl._typing import Tensor


def available_cores() -> int:
    """Return how many processor cores this process may use, or how many exist where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def padded_length(rows: int) -> int:
    """Return a number of rows of at least `rows`: one of four numbers between a power of two and the next."""
    step = max(1, (1 << max(rows - 1, 0).bit_length()) // 8)
    return -(-rows // step) * step


def repeat_random(function: Callable[[], Tensor], times: int, variables: list[Any]) -> Tensor:
    """Return the results of several calls of a function that is random, stacked.

    Args:
        function: Draws other random numbers in each call.
        times: How many calls.
        variables: The Keras variables that the function reads.
    """
    return keras.ops.stack([function() for _ in range(times)])


def step_by_step(program: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Call a compiled step once per element of the stacked arguments' first axis."""

    def several(rows: dict[str, Tensor], *stacked: Any) -> dict[str, Tensor]:
        flat = keras.tree.flatten(stacked)
        for arguments in zip(*flat, strict=True):
            rows = program(rows, *keras.tree.pack_sequence_as(stacked, arguments))
        return rows

    return several
