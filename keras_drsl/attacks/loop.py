"""The loop over the steps of a search, which examples leave once they are misclassified."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array, Tensor
from keras_drsl.attacks.base import Batch
from keras_drsl.threat import as_column


def run_steps(
    steps_fn: Callable[..., dict[str, Tensor]],
    batch: Batch,
    rows: dict[str, Any],
    num_steps: int,
    arguments: Callable[[int, Array], tuple[Any, ...]],
    *,
    count: Callable[[int], None],
    check_every: int = 5,
) -> Array:
    """Repeat a step on the examples that are not misclassified yet.

    Args:
        steps_fn: Maps rows and the stacked arguments of several steps to the next rows; see `Classifier.compile_steps`.
        batch: The rows that are attacked.
        rows: Arrays with one row each. `"best"` is the point to return. `"wrong"` is the share of its predictions that
            are wrong: 1.0 ends the search for its example if `batch.stop_when_broken`.
        num_steps: How many steps to take.
        arguments: Maps the number of a step and the positions of the rows that are left to the arguments of the step.
            Arrays among them have one row per position.
        count: `Classifier.count_gradients` or `Classifier.count_queries`.
        check_every: How many steps run in one call, before the misclassified examples leave.

    Returns:
        The last `"best"` of each row.
    """
    best = np.array(rows["best"])
    left = np.arange(len(best))
    active = len(left)  # those of `left` that are not misclassified yet; JAX computes the others too
    # JAX compiles for each number of rows: it is padded to one of few sizes.
    size = _backend.bucket_size(len(left))
    rows = {name: _take_rows(value, left, size) for name, value in rows.items()}
    for start in range(0, num_steps, check_every):
        steps = range(start, min(start + check_every, num_steps))
        rows = steps_fn(rows, *_stack([arguments(step, left) for step in steps], len(left), size))
        count(len(steps) * active)
        broken = ops.convert_to_numpy(rows["wrong"])[: len(left)] >= 1
        if not batch.stop_when_broken:
            continue
        # All restarts of an example leave with the first one that succeeds.
        broken = np.isin(batch.example_index[left], batch.example_index[left[broken]])
        active = int((~broken).sum())
        if not active:
            break
        needed = _backend.bucket_size(active)
        if needed < size:
            values = {name: ops.convert_to_numpy(value) for name, value in rows.items()}
            best[left[broken]] = values["best"][: len(left)][broken]
            kept = np.flatnonzero(~broken)
            left, size = left[kept], needed
            rows = {name: _take_rows(value, kept, size) for name, value in values.items()}
    best[left] = ops.convert_to_numpy(rows["best"])[: len(left)]
    return best


def is_better(rows: dict[str, Tensor], wrong: Tensor, values: Tensor, best: Tensor, *, stop: bool) -> Tensor:
    """Return where a new point replaces the best one of its row.

    More wrong predictions decide; of equally many, a larger loss.

    Args:
        rows: `"wrong"` is the share of wrong predictions at the best point.
        wrong: The share at the new point.
        values: Its loss.
        best: The loss of the best point.
        stop: Whether the first point stays at which all predictions are wrong.
    """
    more = wrong > rows["wrong"]
    better = ops.logical_or(more, ops.logical_and(wrong == rows["wrong"], values > best))
    return ops.logical_and(better, rows["wrong"] < 1) if stop else better


def _stack(steps: list[tuple[Any, ...]], count: int, size: int) -> list[Any]:
    """Stack the arguments of several steps, their arrays padded from `count` rows to `size`."""
    positions = np.arange(count)
    padded = [
        [_take_rows(value, positions, size) if isinstance(value, np.ndarray) else value for value in step]
        for step in steps
    ]
    stacked: list[Any] = keras.tree.map_structure(lambda *values: np.stack(values), *padded)
    return stacked


def _take_rows(values: Array, kept: Array, count: int) -> Array:
    """Return some rows of an array, the last of them repeated up to a count."""
    return np.asarray(values)[kept[np.minimum(np.arange(count), len(kept) - 1)]]


def where_rows(condition: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Return `ops.where` with one condition per row."""
    return ops.where(as_column(condition, x), x, other)
