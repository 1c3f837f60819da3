"""The images and labels an evaluation is given, in whatever form, as arrays."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _arguments
from keras_drsl.attacks.classifier import as_array


class Examples(NamedTuple):
    """What is evaluated.

    Attributes:
        x: float32, shape `(count, ...)`.
        y: labels as they were given, with `count` rows.
        ids: the place of each in the whole data set, int64, shape `(count,)`.
        digest: of the data set these are a shard of.
    """

    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    digest: str


def read_examples(x: Any, y: Any, *, max_samples: int | None, shard: tuple[int, int] | None) -> Examples:
    """The first `max_samples` examples, and of these every n-th one, or `ValueError` if there are none."""
    if max_samples is not None:
        _arguments.check_integer("max_samples", max_samples, at_least=1)
    if isinstance(x, np.ndarray | list | tuple) or ops.is_tensor(x):
        if y is None:
            raise ValueError("`y` must hold the true labels where `x_or_dataset` is an array. Received: y=None")
        x, y = as_array(x)[:max_samples], as_array(y)[:max_samples]
    else:
        if y is not None:
            raise ValueError(
                "`y` must be None where `x_or_dataset` is a data set, which holds the labels itself. "
                f"Received: x_or_dataset of {type(x).__name__}, y of {type(y).__name__}"
            )
        x, y = _collect(x, max_samples)
    if len(x) != len(y):
        raise ValueError(f"`y` must hold one label for each input. Received: {len(x)} inputs, {len(y)} labels")
    if len(x) == 0:
        raise ValueError("`x_or_dataset` must hold at least one example. Received: none")
    if x.ndim < 2:
        raise ValueError(f"`x_or_dataset` must hold inputs of shape (count, ...). Received: shape {x.shape}")
    if not np.issubdtype(x.dtype, np.number):
        raise ValueError(f"`x_or_dataset` must hold numbers. Received: dtype {x.dtype}")
    ids = np.arange(len(x))[slice(None) if shard is None else slice(shard[0], None, shard[1])]
    if len(ids) == 0:
        raise ValueError(f"`shard` must leave at least one example. Received: shard={shard} of {len(x)} examples")
    return Examples(x[ids].astype("float32"), y[ids], ids, digest(x, y))


def digest(*arrays: np.ndarray) -> str:
    """The SHA-256 of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _collect(dataset: Any, max_samples: int | None) -> tuple[np.ndarray, np.ndarray]:
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    count = 0
    for batch in _batches(dataset, max_samples):
        if not (isinstance(batch, tuple | list) and len(batch) in (2, 3)):
            raise ValueError(
                "`x_or_dataset` must give batches (inputs, labels), maybe with sample weights, which are not used. "
                f"Received: {type(batch).__name__}"
            )
        one, labels = as_array(batch[0]), as_array(batch[1])
        if one.ndim == 0 or labels.ndim == 0 or len(one) != len(labels):
            raise ValueError(
                "`x_or_dataset` must give batches of as many labels as inputs (a tf.data.Dataset: call `.batch`). "
                f"Received: shapes {one.shape} and {labels.shape}"
            )
        xs.append(one)
        ys.append(labels)
        count += len(one)
        if max_samples is not None and count >= max_samples:
            break
    if count == 0:
        raise ValueError("`x_or_dataset` must hold at least one example. Received: none")
    return np.concatenate(xs)[:max_samples], np.concatenate(ys)[:max_samples]


def _batches(dataset: Any, max_samples: int | None) -> Iterator[Any]:
    if isinstance(dataset, keras.utils.PyDataset):
        endless = dataset.num_batches is None
        batches = (dataset[place] for place in (itertools.count() if endless else range(dataset.num_batches)))
    elif isinstance(dataset, Iterable):
        # TensorFlow says -1 of a data set without end.
        endless = hasattr(dataset, "cardinality") and int(dataset.cardinality()) == -1
        batches = (batch for batch in dataset)
    else:
        raise ValueError(
            "`x_or_dataset` must be an array, a tensor, a tf.data.Dataset or a keras.utils.PyDataset. "
            f"Received: {type(dataset).__name__}"
        )
    if endless and max_samples is None:
        raise ValueError("`max_samples` must be given for a data set without end. Received: max_samples=None")
    yield from batches
