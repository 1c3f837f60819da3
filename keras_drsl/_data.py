"""Inputs and labels in any form, as arrays."""

import hashlib
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array


def to_array(x: Any) -> Array:
    """Return a tensor, a list or an array as an array."""
    return np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)


def to_labels(y: Any) -> Array:
    """Return labels as an array, or raise `ValueError` unless they are numbers."""
    labels = to_array(y)
    if labels.dtype == object and all(isinstance(label, numbers.Real) for label in labels.ravel()):
        labels = np.array(labels.tolist())  # as pandas holds them
    if not (np.issubdtype(labels.dtype, np.number) or labels.dtype == bool):
        first = labels.ravel()[:1].tolist()
        raise ValueError(f"`y` must hold numbers: class ids 0, 1, 2, ... in place of names. Received: {first!r:.60}")
    return labels


Pack = Callable[[Any], Array]


def to_arrays(name: str, x: Any, y: Any, pack: Pack | None = None) -> tuple[Array, Array]:
    """Return inputs and labels as arrays.

    Args:
        name: What an error calls the inputs.
        x: Inputs, shape `(count, ...)`.
        y: Their labels, shape `(count, ...)`.
        pack: What makes one array of several inputs, or None for one input.

    Raises:
        ValueError: If either is not one array, or they have other numbers of rows.
    """
    if y is None:
        raise ValueError(f"`y` must hold the true labels where `{name}` is an array. Received: y=None")
    _check_one_array(name, y)
    # A list of images is one array; a list of arrays of images is not.
    num_labels = len(y) if hasattr(y, "__len__") and getattr(y, "ndim", True) else None
    if pack is not None:
        x = pack(x)
    elif not isinstance(x, list | tuple) or len(x) != num_labels:
        _check_one_array(name, x)
    try:
        x, y = to_array(x), to_array(y)
    except ValueError as error:
        raise ValueError(f"`{name}` and `y` must hold rows of equal length. Received: {error}") from error
    y = to_labels(y)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        hint = " For one example, give `x[None]` and `[label]`." if y.size == 1 else ""
        raise ValueError(f"`y` must hold one label for each input.{hint} Received: {_shapes(x, y, pack)}")
    return x, y


def _shapes(x: Array, y: Array, pack: Pack | None) -> str:
    """Return the shapes of inputs and labels, for an error; of packed inputs their number."""
    inputs = f"inputs of shape {x.shape}" if pack is None else f"{len(x)} examples"
    return f"{inputs}, labels of shape {y.shape}"


def digest(*arrays: Array) -> str:
    """Return the SHA-256 of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def content_keys(x: Array) -> Array:
    """Return one number per input that depends on its values only, uint64, shape `(count,)`."""
    rows = np.ascontiguousarray(x, dtype="float32") + np.float32(0)  # turns -0.0 into 0.0
    keys = [hashlib.sha256(row.tobytes()).digest()[:8] for row in rows]
    return np.frombuffer(b"".join(keys), dtype="<u8").astype("uint64")


def class_ids(y: Any, count: int, num_classes: int, *, allow_ties: bool = False) -> Array:
    """Return labels of any form as class ids `(count,)`, int32.

    Args:
        y: Class ids `(count,)` or `(count, 1)`, or one-hot labels or label distributions `(count, num_classes)`.
        count: The number of examples.
        num_classes: The number of classes.
        allow_ties: Whether a distribution may have its largest value at several classes. The first one is returned.

    Raises:
        ValueError: If the labels have another shape or are no classes, or a row of labels does not sum to 1, has
            negative values, or has its largest value at several classes.
    """
    y = to_labels(y)
    if y.ndim == 2 and y.shape[1] == num_classes > 1:
        y = _largest_labels(y, allow_ties)
    elif y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (count,):
        raise ValueError(
            f"`y` must have shape ({count},) or ({count}, 1) with class ids, or ({count}, {num_classes}) with a number "
            f"for each class. Received: y.shape={y.shape}"
        )
    is_class = np.isin(y, np.arange(num_classes))
    if not is_class.all():
        raise ValueError(f"`y` must hold class ids in [0, {num_classes}). Received: {y[~is_class][0]}")
    ids: Array = y.astype("int32")
    return ids


def _largest_labels(y: Array, allow_ties: bool) -> Array:
    """Return the class with the largest label in each row of one-hot labels or label distributions."""
    values = np.asarray(y, dtype="float64")
    is_distribution = (values >= 0).all(axis=1) & np.isclose(values.sum(axis=1), 1.0, rtol=0, atol=0.01)
    names_one_class = (values == values.max(axis=1, keepdims=True)).sum(axis=1) == 1
    wrong = np.flatnonzero(~(is_distribution & (names_one_class | allow_ties)))
    if len(wrong):
        row = np.array2string(values[wrong[0]], threshold=10)
        raise ValueError(
            "`y` must name one class in each row: its values are not negative, sum to 1, and have one maximum. For "
            f'several labels per example, give task="multilabel". Received: row {wrong[0]} of {row}'
        )
    ids: Array = values.argmax(axis=1)
    return ids


def position_ids(y: Any, logits: Array, ignore_class: int | None = None) -> Array:
    """Return the labels of a model of positions as class ids, -1 where a position does not count, int32.

    Args:
        y: Class ids `(count, ...)` or `(count, ..., 1)`, or one-hot `(count, ..., C)`. Negative ids do not count.
        logits: The logits, shape `(count, positions, C)`.
        ignore_class: Another class id that does not count, or None.

    Returns:
        An array `(count, positions)`.

    Raises:
        ValueError: If the labels have another number of positions, are no classes, or none of an example counts.
    """
    y = to_labels(y)
    count, positions, num_classes = logits.shape
    if y.size == count * positions * num_classes and y.shape[-1] == num_classes and y.ndim > 2:
        y = _largest_labels(y.reshape(-1, num_classes), False)
    if y.size != count * positions or len(y) not in (count, count * positions):
        raise ValueError(
            f"`y` must hold one label for each of the {positions} positions of each of the {count} inputs. "
            f"Received: y.shape={y.shape}"
        )
    # Before a label becomes -1: labels of 8 bits cannot hold it.
    ids = y.reshape(count, positions).astype("int64" if np.issubdtype(y.dtype, np.integer) else y.dtype)
    is_class = np.isin(ids, np.arange(num_classes)) | (ids < 0) | (ids == ignore_class)
    if not is_class.all():
        raise ValueError(
            f"`y` must hold class ids in [0, {num_classes}), or negative ones where a position does not count. "
            f"Received: {ids[~is_class][0]}"
        )
    ids = np.where((ids < 0) | (ids == ignore_class), -1, ids).astype("int32")
    empty = np.flatnonzero((ids < 0).all(axis=1))
    if len(empty):
        raise ValueError(f"`y` must have a label that counts for each input. Received: none for input {empty[0]}")
    return ids


def read_labels(y: Any, logits: Array, ignore_class: int | None = None) -> Array:
    """Return labels as class ids `(count,)`, or `(count, positions)` for logits `(count, positions, C)`."""
    return class_ids(y, len(logits), logits.shape[1]) if logits.ndim == 2 else position_ids(y, logits, ignore_class)


def binary_labels(y: Any) -> Array:
    """Return the labels of a task of several, 0 or 1, int32, shape `(count, labels)`, or raise `ValueError`."""
    y = to_labels(y)
    if y.ndim != 2 or not np.isin(y, (0, 1)).all():
        received = f"shape {y.shape}" if y.ndim != 2 else f"a value of {y[~np.isin(y, (0, 1))][0]}"
        raise ValueError(
            f'`y` must hold 0 or 1 for each label, shape (count, labels), for task="multilabel". Received: {received}'
        )
    labels: Array = y.astype("int32")
    return labels


class Examples(NamedTuple):
    """The examples that are evaluated.

    Attributes:
        x: Float32, shape `(count, ...)`.
        y: Labels as they were given, with `count` rows.
        ids: The position of each example in the whole data set, int64, shape `(count,)`.
        digest: The SHA-256 of the examples that these are a shard of.
        whole: The inputs and labels of the whole data set.
        files: The file of each example, or None.
        class_names: The names of the classes by id, or None.
        are_8bit: Whether the inputs were given as 8-bit integers.
        layout: The `keras_drsl.models.inputs.Layout` of several inputs or labels, or None.
        num_labels: How many rows each example has, one per label of a model of several; 1 for other tasks.
    """

    x: Array
    y: Array
    ids: Array
    digest: str
    whole: tuple[Array, Array]
    files: Array | None = None
    class_names: list[str] | None = None
    are_8bit: bool = False
    layout: Any = None
    num_labels: int = 1

    def select(self, mask: Array) -> "Examples":
        """Return the examples where a mask with a value for each is True."""
        rows = np.asarray(np.repeat(mask, self.num_labels))
        files = None if self.files is None else self.files[rows]
        return self._replace(x=self.x[rows], y=self.y[rows], ids=self.ids[rows], files=files)

    def any_label(self, of_rows: Array) -> Array:
        """Return for which examples a value is True for any of their rows."""
        return np.asarray(of_rows.reshape(-1, self.num_labels).any(axis=1))

    def with_names(self, files: list[str], class_names: list[str]) -> "Examples":
        """Return the examples with the names of all files of the data set, and of the classes."""
        return self._replace(files=np.array(files)[self.ids], class_names=class_names)


def read_examples(
    x: Any,
    y: Any,
    *,
    max_samples: int | None,
    shard: tuple[int, int] | None = None,
    pack: Pack | None = None,
    weights_mask: bool = False,
) -> Examples:
    """Return `max_samples` examples in proportion to the classes, and of these the ones of a shard `(i, n)`.

    The choice depends on the values of the inputs only, not on their order. A shard has the examples at the positions
    i, i + n, i + 2 n, ... of the data set.

    Args:
        x: Inputs, or a data set of batches `(inputs, labels)` or of dictionaries with a key `"label"` and one other.
        y: Labels of an array of inputs, or None for a data set.
        max_samples: How many examples to choose, >= 1; None for all. Of a data set that does not know its length, the
            first ones are read.
        shard: `(i, n)`, or None for all examples.
        pack: What makes one array of several inputs, or None for one input.
        weights_mask: Whether a label whose sample weight is 0 becomes -1. Otherwise weights are ignored.

    Raises:
        ValueError: If there are no examples, or inputs and labels do not fit.
    """
    if isinstance(x, np.ndarray | list | tuple | dict) or ops.is_tensor(x) or (y is not None and _is_column(x)):
        x, y = to_arrays("x_or_dataset", x, y, pack)
    else:
        if y is not None:
            raise ValueError(
                "`y` must be None where `x_or_dataset` is a data set, which holds the labels itself. "
                f"Received: x_or_dataset of {type(x).__name__}, y of {type(y).__name__}"
            )
        x, y = _read_dataset(x, max_samples, pack, weights_mask)
    if len(x) == 0:
        raise ValueError("`x_or_dataset` must hold at least one example. Received: none")
    if x.ndim < 2:
        raise ValueError(f"`x_or_dataset` must hold inputs of shape (count, ...). Received: shape {x.shape}")
    if not np.issubdtype(x.dtype, np.number):
        raise ValueError(f"`x_or_dataset` must hold numbers. Received: dtype {x.dtype}")
    are_8bit, x = x.dtype == "uint8", x.astype("float32", copy=False)
    chosen = _choose(x, y, max_samples)
    ids = chosen if shard is None else chosen[chosen % shard[1] == shard[0]]
    if len(ids) == 0:
        raise ValueError(f"`shard` must leave at least one example. Received: shard={shard} of {len(chosen)} examples")
    # Most evaluations take all examples, and need no copy of them here.
    digested = (x, y) if len(chosen) == len(x) else (x[chosen], y[chosen])
    return Examples(x[ids], y[ids], ids, digest(*digested), (x, y), are_8bit=are_8bit)


def _choose(x: Array, y: Array, count: int | None) -> Array:
    """Return the positions of `count` examples, each class in proportion, rising; all examples for None."""
    if count is None or count >= len(x):
        return np.arange(len(x))
    labels = y.argmax(axis=1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(len(y), -1)[:, 0]
    keys = content_keys(x)
    classes, sizes = np.unique(labels, return_counts=True)
    shares = count * sizes / len(x)
    counts = np.floor(shares).astype(int)
    # The examples that rounding has left go to the classes with the largest fractions.
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1
    chosen = []
    for class_id, size in zip(classes, counts, strict=True):
        members = np.flatnonzero(labels == class_id)
        chosen.append(members[np.argsort(keys[members], kind="stable")[:size]])
    return np.sort(np.concatenate(chosen))


def join_rows(tables: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Join the tables of the reports of shards, with the examples in their order.

    Args:
        tables: For each report, lists of equal length by name, one of them `"index"`.

    Raises:
        ValueError: If two reports share an example.
    """
    rows = [dict(zip(table, row, strict=True)) for table in tables for row in zip(*table.values(), strict=True)]
    rows.sort(key=lambda row: row["index"])
    if len({row["index"] for row in rows}) < len(rows):
        raise ValueError("`reports` must be of different examples. Received: two that share some")
    return {name: [row[name] for row in rows] for name in tables[0]}


def read_pool(pool: Any, pack: Pack | None = None) -> tuple[Array, Array | None]:
    """Return the inputs and labels of the argument `x_pool`. The labels are None for inputs alone.

    Args:
        pool: Inputs, a pair `(inputs, labels)`, or a data set of batches of such pairs.
        pack: What makes one array of several inputs, or None for one input.

    Raises:
        ValueError: If it holds none of these, or no example.
    """
    if isinstance(pool, tuple) and len(pool) == 2:
        x, y = (pack or to_array)(pool[0]), to_labels(pool[1])
    elif isinstance(pool, np.ndarray | list | dict) or ops.is_tensor(pool):
        x, y = (pack or to_array)(pool), None
    elif isinstance(pool, keras.utils.PyDataset | Iterable):
        x, y = _read_dataset(pool, None, pack)
    else:
        raise ValueError(
            f"`x_pool` must hold inputs, a pair (inputs, labels) or batches of pairs. Received: {type(pool).__name__}"
        )
    if x.ndim < 2 or len(x) == 0 or not np.issubdtype(x.dtype, np.number):
        raise ValueError(
            f"`x_pool` must hold at least one input, of shape (count, ...). Received: shape {x.shape}, dtype {x.dtype}"
        )
    if y is not None and len(x) != len(y):
        raise ValueError(f"`x_pool` must hold one label for each input. Received: {len(x)} inputs, {len(y)} labels")
    return x.astype("float32", copy=False), y


def first_batch(x: Any, y: Any, *, several: bool = False) -> tuple[Any, tuple[Any, Array]]:
    """Return training data and the inputs and labels that can be seen before training.

    Args:
        x: Inputs, or an iterable of batches, as `keras.Model.fit` takes them.
        y: Labels of an array of inputs, or None.
        several: Whether an example has several inputs. They are then returned in the structure in which they come.

    Returns:
        `(x, (inputs, labels))`. Of arrays, all inputs and labels are seen; of other data, the first batch. The returned
        `x` gives that batch again.

    Raises:
        ValueError: If there are no examples or no labels, or an example has several inputs.
    """
    if x is None:
        raise ValueError("`x` must hold inputs, or give batches of them. Received: x=None")
    batch: Any = (x, y)
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    elif isinstance(x, Iterator):
        batch = next(x, None)
        # Keras accepts a generator here, but no other iterator.
        x = (item for item in itertools.chain([batch], x))
    elif y is None and not hasattr(x, "shape"):
        batch = next(iter(x), None)
    inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
    inputs, labels = inputs if several else only_input(inputs), only_input(labels)
    if labels is None and inputs is not None:
        raise ValueError("`y` must hold labels, or `x` give batches `(inputs, labels)`. Received: no labels")
    if several:
        arrays = keras.tree.map_structure(lambda value: to_array(_backend.per_replica_value(value)), inputs)
        return x, (arrays, to_labels(_backend.per_replica_value(labels)))
    if isinstance(inputs, dict | list | tuple):
        raise ValueError(
            "`x` must hold one input per example, not several; otherwise let `attack_input` name the one that is "
            f"attacked. Received: {type(inputs).__name__}"
        )
    _check_one_array("x", labels)
    inputs = np.empty(0) if inputs is None else to_array(_backend.per_replica_value(inputs))
    if inputs.size == 0:
        raise ValueError("`x` must hold at least one example. Received: none")
    labels = to_labels(_backend.per_replica_value(labels))
    if inputs.ndim < 2 or labels.ndim == 0:
        raise ValueError(
            "`x` must hold inputs of shape (count, ...), or give batches of them (a tf.data.Dataset: call `.batch`). "
            f"Received: inputs of shape {inputs.shape}"
        )
    return x, (inputs, labels)


def only_input(x: Any) -> Any:
    """Return the input of an example; Keras also takes it as a list of one."""
    return x[0] if isinstance(x, list | tuple) and len(x) == 1 else x


def _check_one_array(name: str, values: Any) -> None:
    """Raise `ValueError` for a dictionary or list of arrays."""
    if isinstance(values, dict):
        received = f"a dictionary with keys {list(values)}"
    elif isinstance(values, list | tuple) and any(len(getattr(value, "shape", ())) > 1 for value in values):
        shapes = ", ".join(str(tuple(getattr(value, "shape", ()))) for value in values[:3])
        received = f"a {type(values).__name__} of {len(values)} arrays, of shapes {shapes}"
    else:
        return
    names = f": {', '.join(map(str, values))}" if isinstance(values, dict) else ""
    raise ValueError(
        f"`{name}` and `y` must hold one array of inputs and one of labels, without names. For a model with several "
        f"inputs, let `attack_input` name the one that is attacked{names}. Received: {received}"
    )


def _is_column(x: Any) -> bool:
    """Return whether an object holds one input per position, as the columns of Hugging Face's data sets do."""
    return hasattr(x, "__len__") and hasattr(x, "__getitem__") and not isinstance(x, keras.utils.PyDataset)


def _pair(batch: Any, *, several: bool, weights_mask: bool) -> tuple[Any, Any]:
    """Return the inputs, of which there may be several, and labels of a batch, or raise `ValueError`."""
    if isinstance(batch, Mapping):
        label = next((name for name in ("label", "labels") if name in batch), None)
        others = [name for name in batch if name != label]
        if label is None or not others or (len(others) > 1 and not several):
            raise ValueError(
                '`x_or_dataset` must give batches (inputs, labels), or dictionaries with a key "label" or "labels" '
                f"and one other (with `attack_input`, several). Received: a dictionary with keys {list(batch)}"
            )
        return {name: batch[name] for name in others} if several else batch[others[0]], batch[label]
    if not (isinstance(batch, tuple | list) and len(batch) in (2, 3)):
        raise ValueError(
            "`x_or_dataset` must give batches (inputs, labels), with or without sample weights, which are ignored. "
            f"Received: {type(batch).__name__}"
        )
    if weights_mask and len(batch) == 3 and batch[2] is not None:
        return batch[0], _without_weight(to_array(batch[1]), to_array(batch[2]))
    return batch[0], batch[1]


def _without_weight(y: Array, weights: Array) -> Array:
    """Return labels of positions as class ids, -1 where the weight of the position is 0.

    Weights of whole examples are ignored, as those of other tasks are.
    """
    if weights.ndim == 1:
        return y
    if weights.shape == y.shape[:-1] and y.shape[-1] > 1:
        y = y.argmax(axis=-1)
    if weights.size != y.size or weights.shape[0] != y.shape[0]:
        raise ValueError(
            "`x_or_dataset` must give one sample weight for each position, or for each example. "
            f"Received: labels of shape {y.shape}, weights of shape {weights.shape}"
        )
    return np.where(weights.reshape(y.shape) == 0, -1, y.astype("int64"))


def _read_dataset(
    dataset: Any, max_samples: int | None, pack: Pack | None = None, weights_mask: bool = False
) -> tuple[Array, Array]:
    inputs: list[Array] = []
    labels: list[Array] = []
    count = 0
    batches, is_sized = _batches(dataset, max_samples)
    for batch in batches:
        pair = _pair(batch, several=pack is not None, weights_mask=weights_mask)
        for value in pair[pack is not None :]:
            _check_one_array("x_or_dataset", value)
        x, y = (pack or to_array)(pair[0]), to_labels(pair[1])
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise ValueError(
                "`x_or_dataset` must give batches of as many labels as inputs (a tf.data.Dataset: call `.batch`). "
                f"Received: {_shapes(x, y, pack)}"
            )
        inputs.append(x)
        labels.append(y)
        count += len(x)
        if not is_sized and max_samples is not None and count >= max_samples:
            break
    if count == 0:
        raise ValueError("`x_or_dataset` must hold at least one example. Received: none")
    end = None if is_sized else max_samples
    return np.concatenate(inputs)[:end], np.concatenate(labels)[:end]


def _batches(dataset: Any, max_samples: int | None) -> tuple[Iterable[Any], bool]:
    """Return the batches of a data set, and whether their number is known."""
    if isinstance(dataset, keras.utils.PyDataset):
        endless, is_sized = dataset.num_batches is None, dataset.num_batches is not None
        positions = itertools.count() if endless else range(dataset.num_batches)
        batches: Iterable[Any] = (dataset[position] for position in positions)
    elif isinstance(dataset, Iterable):
        # TensorFlow reports a cardinality of -1 for an infinite data set, and of -2 for an unknown one.
        cardinality = int(dataset.cardinality()) if hasattr(dataset, "cardinality") else None
        endless = cardinality == -1
        is_sized = _has_length(dataset) if cardinality is None else cardinality >= 0
        batches = dataset
    else:
        raise ValueError(
            "`x_or_dataset` must be an array, a tensor, or an iterable of batches: a tf.data.Dataset, a "
            f"keras.utils.PyDataset, a torch DataLoader. Received: {type(dataset).__name__}"
        )
    if endless and max_samples is None:
        raise ValueError("`max_samples` must be given for a data set without end. Received: max_samples=None")
    return batches, is_sized


def _has_length(dataset: Any) -> bool:
    try:
        len(dataset)
    except TypeError:  # a DataLoader has a method `__len__` also where its data have no length
        return False
    return True
