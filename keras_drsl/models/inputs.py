"""Several inputs of a model as one array, of which attacks change a part.

Attacks, checks and evaluation know inputs of one array, some features of which may not change. So the input that is
attacked keeps its axes, and the other inputs of an example follow along its last axis, as features that may not change.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl._data import to_array
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.state import preserve_state
from keras_drsl.threat import ThreatModel

EMBEDDINGS = "embeddings"  # as `attack_input`: what the only embedding layer of a model gives
LARGEST_INTEGER = 2**24  # float32 holds all integers up to it
BATCH_SIZE = 256  # how many examples are embedded together


class Part(NamedTuple):
    """Describe one input of a model.

    Attributes:
        name: The key in a dictionary of inputs, or the position in a list.
        shape: The shape of the input of one example.
        dtype: Its type.
    """

    name: str | int
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Hold where the inputs of a model lie in an array.

    Attributes:
        kind: What the model takes: `"dict"`, `"list"` or `"one"` input.
        parts: The inputs in the order in which the model lists them.
        attacked: The position in `parts` of the input that is attacked; None for what an embedding layer gives.
        shape: The shape of what is attacked, of one example.
        num_labels: How many labels each example has, of which the last feature names one; 0 without this feature.
    """

    kind: str
    parts: tuple[Part, ...]
    attacked: int | None
    shape: tuple[int, ...]
    num_labels: int = 0

    @property
    def num_appended(self) -> int:
        """How many features follow along the last axis of what is attacked."""
        return -(-sum(self._sizes) // self._num_rows)

    @property
    def has_fixed_inputs(self) -> bool:
        """Whether the model has inputs that are not attacked, beside those that its embeddings are made of."""
        return self.attacked is not None and len(self.parts) > 1

    @property
    def _fixed(self) -> list[Part]:
        return [part for position, part in enumerate(self.parts) if position != self.attacked]

    @property
    def _sizes(self) -> list[int]:
        """How many features each fixed input has, and 1 for the label, which follows them."""
        return [math.prod(part.shape) for part in self._fixed] + [1] * (self.num_labels > 0)

    @property
    def _num_rows(self) -> int:
        """How often the last axis of what is attacked repeats: a feature that is appended to it has so many numbers."""
        return math.prod(self.shape[:-1])

    def pack(self, inputs: Any, attacked: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """Return one tensor `(batch, ...)` of the inputs of a batch.

        Args:
            inputs: The inputs, as the model takes them.
            attacked: What an embedding layer gives, where that is attacked.
            label: The label of each row, shape `(batch,)`, if the layout has labels.
        """
        values = [inputs] if self.kind == "one" else [inputs[part.name] for part in self.parts]
        if self.attacked is not None:
            attacked = values.pop(self.attacked)
        attacked = ops.cast(ops.convert_to_tensor(attacked), "float32")
        rows = ops.shape(attacked)[0]
        if self.num_labels:
            values.append(label)
        flat = [
            ops.reshape(ops.cast(ops.convert_to_tensor(value), "float32"), (rows, size))
            for value, size in zip(values, self._sizes, strict=True)
        ]
        if not flat:
            return attacked
        appended = ops.concatenate(flat, axis=1)
        missing = self.num_appended * self._num_rows - appended.shape[1]
        appended = ops.pad(appended, ((0, 0), (0, missing)))
        return ops.concatenate([attacked, ops.reshape(appended, (rows, *self.shape[:-1], self.num_appended))], axis=-1)

    def unpack(self, x: Tensor) -> tuple[Any, Tensor, Tensor | None]:
        """Return the inputs, as the model takes them, what is attacked, and the label of each row or None."""
        attacked, values, label = x[..., : self.shape[-1]], [], None
        if self.num_appended:
            flat = ops.reshape(x[..., self.shape[-1] :], (-1, self.num_appended * self._num_rows))
            ends = list(itertools.accumulate(self._sizes))
            for part, size, end in zip(self._fixed, self._sizes, ends, strict=False):
                values.append(ops.cast(ops.reshape(flat[:, end - size : end], (-1, *part.shape)), part.dtype))
            label = ops.cast(flat[:, ends[-1] - 1], "int32") if self.num_labels else None
        if self.attacked is not None:
            values.insert(self.attacked, attacked)
        if self.kind == "one":
            return values[0], attacked, label
        names = [part.name for part in self.parts]
        inputs = dict(zip(names, values, strict=True)) if self.kind == "dict" else values
        return inputs, attacked, label

    def extend(self, threat: ThreatModel) -> ThreatModel:
        """Return the threat model of the array, for one of what is attacked."""
        return threat.append_fixed(self.shape[-1], self.num_appended)

    def attacked_part(self, x: Array) -> Array:
        """Return what is attacked in an array `(count, ...)`."""
        return x[..., : self.shape[-1]]

    def name_in(self, name: str) -> str:
        """Return what an error calls the part of some inputs that is attacked; `name` is what it calls the inputs."""
        if self.attacked is None:
            return f"{name}, embedded"
        return name if self.kind == "one" else f"{name}[{self.parts[self.attacked].name!r}]"

    def labels(self, x: Array) -> Array:
        """Return the label of each row, 0 in a layout without labels, shape `(count,)`."""
        if not self.num_labels:
            return np.zeros(len(x), int)
        flat = x[..., self.shape[-1] :].reshape(len(x), self.num_appended * self._num_rows)
        labels: Array = flat[:, sum(self._sizes) - 1].astype(int)
        return labels

    def repeat_for_labels(self, x: Array, num_labels: int) -> tuple["Layout", Array]:
        """Return one row per label of each example, and the layout of such rows.

        Args:
            x: The examples in this layout, shape `(count, ...)`.
            num_labels: How many labels each has.
        """
        layout = dataclasses.replace(self, num_labels=num_labels)
        parts = []
        for start in range(0, len(x), BATCH_SIZE):
            few = np.repeat(x[start : start + BATCH_SIZE], num_labels, axis=0)
            inputs, attacked, _ = self.unpack(ops.convert_to_tensor(few))
            labels = np.tile(np.arange(num_labels), len(few) // num_labels)
            parts.append(ops.convert_to_numpy(layout.pack(inputs, attacked, labels)))
        return layout, np.concatenate(parts)


def layout_of(x: Array) -> Layout:
    """Return the layout of a model with one input, for inputs `(count, ...)`."""
    shape = tuple(x.shape[1:])
    return Layout("one", (Part(0, shape, "float32"),), 0, shape)


class Inputs:
    """Put the inputs of a model into one array.

    Args:
        model: The model.
        attack_input: The name or position of the input that is attacked; `"embeddings"` or the name of an embedding
            layer for what that layer gives.
        preprocessing: What is in front of the model, or None.

    Attributes:
        layout: Where the inputs lie, from the first call on.
        are_8bit: Whether the input that is attacked was given as 8-bit integers.

    Raises:
        ValueError: If there is no such layer.
    """

    def __init__(
        self, model: keras.Model, attack_input: str | int, preprocessing: Callable[[Any], Any] | None = None
    ) -> None:
        self._model = model
        self._attack_input = attack_input
        self._preprocessing = preprocessing
        self.embedding = find_embedding(model, attack_input)
        self.layout: Layout | None = None
        self.are_8bit = False

    def pack(self, inputs: Any, name: str = "x_or_dataset") -> Array:
        """Return the inputs of some examples as one array, float32, shape `(count, ...)`.

        Args:
            inputs: The inputs as the model takes them.
            name: What an error calls them.

        Raises:
            ValueError: If none of them has the name, or they are not arrays of numbers of one length.
        """
        given = _by_name(inputs, self._model, is_embedded=self.embedding is not None)
        arrays = {name: _to_numbers(name, value) for name, value in given.items()}
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            received = ", ".join(f"{name}: {array.shape}" for name, array in arrays.items())
            raise ValueError(f"The inputs of `model` must have one length. Received: {received}")
        if not self._model.built:
            with suppress(Exception):  # a model that cannot be called is refused later
                self._model(keras.tree.map_structure(_symbol, inputs), training=False)
        attacked = None if self.embedding is None else self._embed(inputs, counts.pop())
        layout = self._describe(inputs, arrays, attacked)
        if self.layout is None:
            self.layout = layout
        elif layout != self.layout:
            raise ValueError(f"`{name}` must hold inputs {_shapes(self.layout)}. Received: {_shapes(layout)}")
        values: Any = list(arrays.values())
        values = {"dict": arrays, "list": values, "one": values[0]}[layout.kind]
        return np.asarray(ops.convert_to_numpy(layout.pack(values, attacked)))

    def _describe(self, inputs: Any, arrays: dict[Any, Array], attacked: Array | None) -> Layout:
        names = list(arrays)
        kind = "dict" if isinstance(inputs, Mapping) else "list" if isinstance(inputs, list | tuple) else "one"
        position = None
        if attacked is None:
            wanted = self._attack_input
            if isinstance(wanted, int) and kind == "list" and 0 <= wanted < len(names):
                position = wanted
            elif wanted in names:
                position = names.index(wanted)
            else:
                listed = ", ".join(sorted(map(repr, names)))
                layers = [repr(layer.name) for layer in embedding_layers(self._model)]
                or_layer = f", or one of the embedding layers: {', '.join(layers)}" if layers else ""
                raise ValueError(
                    f"`attack_input` must name one of the inputs: {listed}{or_layer}. Received: attack_input={wanted!r}"
                )
            attacked = arrays[names[position]]
            if attacked.ndim < 2:
                raise ValueError(
                    f"The input {wanted!r} of `model` must have shape (count, ...). Received: shape {attacked.shape}"
                )
            self.are_8bit = attacked.dtype == "uint8"
        # The model takes lists by position, whatever the names of its inputs.
        keys = range(len(names)) if kind == "list" else names
        parts = tuple(
            Part(key, tuple(array.shape[1:]), "float32" if index == position else _kept_type(array))
            for index, (key, array) in enumerate(zip(keys, arrays.values(), strict=True))
        )
        return Layout(kind, parts, position, tuple(attacked.shape[1:]))

    def attacked(self, inputs: Any, packed: Array) -> Array:
        """Return what is attacked of inputs, shape `(count, ...)`; for embeddings, of the packed ones.

        Args:
            inputs: The inputs as the model takes them.
            packed: Some of them as one array.
        """
        assert self.layout is not None
        if self.layout.attacked is None:
            return self.layout.attacked_part(packed)
        return np.asarray(inputs[self.layout.parts[self.layout.attacked].name])

    def pack_tensors(self, inputs: Any) -> Tensor:
        """Return the inputs of a batch as one tensor, in a program, once `layout` is known."""
        assert self.layout is not None
        return self.layout.pack(inputs, None if self.embedding is None else self._given_by_embedding(inputs))

    def refresh(self, x: Array, layout: Layout) -> Array:
        """Return inputs with what the embedding layer gives now, as after a step of training.

        Args:
            x: The inputs, shape `(count, ...)`.
            layout: Where they lie.
        """
        inputs, _, _ = layout.unpack(ops.convert_to_tensor(x))
        return np.concatenate([self._embed(inputs, len(x)), x[..., layout.shape[-1] :]], axis=-1)

    def _embed(self, inputs: Any, count: int) -> Array:
        """Return what the embedding layer gives for inputs, float32, shape `(count, ...)`."""
        parts = []
        with preserve_state(self._model, self._preprocessing):
            for start in range(0, count, BATCH_SIZE):
                batch = keras.tree.map_structure(lambda value: value[start : start + BATCH_SIZE], inputs)  # noqa: B023
                given = self._given_by_embedding(keras.tree.map_structure(ops.convert_to_tensor, batch))
                parts.append(ops.convert_to_numpy(ops.cast(given, "float32")))
        return np.concatenate(parts)

    def _given_by_embedding(self, inputs: Any) -> Tensor:
        """Return what the embedding layer gives for the inputs of a batch, shape `(batch, ...)`."""
        given: list[Tensor] = []

        def keep(outputs: Tensor) -> Tensor:
            given.append(outputs)
            return outputs

        assert self.embedding is not None
        with changed_embedding(self.embedding, keep):
            self._model(inputs if self._preprocessing is None else self._preprocessing(inputs), training=False)
        if len(given) != 1:
            raise ValueError(
                "`attack_input` must name an embedding layer that `model` calls once. Received: "
                f"{self.embedding.name!r}, which it calls {len(given)} times"
            )
        return given[0]


def check_only_input(model: keras.Model | None) -> None:
    """Raise `ValueError` for a model that is known to have several inputs."""
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if len(names) > 1:
        raise ValueError(
            f"`attack_input` must name one of the inputs of `model`: {', '.join(map(repr, names))}. "
            "Received: attack_input=None"
        )


def _by_name(inputs: Any, model: keras.Model, *, is_embedded: bool) -> dict[Any, Any]:
    """Return the inputs by name or, where they have none, by position."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if isinstance(inputs, list | tuple):
        are_names = len(set(names)) == len(names) == len(inputs)
        return dict(zip(names if are_names else range(len(inputs)), inputs, strict=True))
    if is_embedded:
        return {0: inputs}
    if len(names) > 1:
        raise ValueError(
            f"`x` must hold all inputs of `model`: {', '.join(names)}. Received: one of type {type(inputs).__name__}"
        )
    raise ValueError(
        "`attack_input` must be left out for a model with one input, or name an embedding layer. Received: inputs of "
        f"type {type(inputs).__name__}"
    )


def _symbol(value: Any) -> keras.KerasTensor:
    """Return the symbol of an input of any number of rows."""
    array = np.asarray(value)
    return keras.KerasTensor((None, *array.shape[1:]), dtype=_kept_type(array))


def _to_numbers(name: Any, value: Any) -> Array:
    """Return an input as an array that float32 holds exactly, if it is of integers."""
    array = to_array(value)
    if array.ndim == 0 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(
            f"The input {name!r} of `model` must hold numbers, as token ids in place of text. "
            f"Received: shape {array.shape}, dtype {array.dtype}"
        )
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ValueError(f"The input {name!r} of `model` must hold finite numbers. Received: NaN or infinite ones")
    if np.issubdtype(array.dtype, np.integer) and array.size and np.abs(array).max() > LARGEST_INTEGER:
        raise ValueError(
            f"The input {name!r} of `model` must hold integers up to 2^24. Received: {np.abs(array).max()}"
        )
    return array


def _kept_type(array: Array) -> str:
    """Return the type that an input has when the model is called."""
    if array.dtype == bool:
        return "bool"
    return "int32" if np.issubdtype(array.dtype, np.integer) else "float32"


def _shapes(layout: Layout) -> str:
    return ", ".join(f"{part.name!r} of shape {part.shape} and type {part.dtype}" for part in layout.parts)


def embedding_layers(model: keras.Model) -> list[keras.layers.Embedding]:
    """Return the embedding layers of a model."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)]


def find_embedding(model: keras.Model, attack_input: str | int | None) -> keras.layers.Embedding | None:
    """Return the embedding layer that an argument `attack_input` names, or None if it names an input.

    Raises:
        ValueError: If it is `"embeddings"`, and the model has no embedding layer or several.
    """
    layers = embedding_layers(model)
    if attack_input != EMBEDDINGS:
        is_input = attack_input in [tensor.name for tensor in getattr(model, "inputs", None) or []]
        layers = [] if is_input else [layer for layer in layers if layer.name == attack_input]
        if not layers:
            return None
    if len(layers) != 1:
        listed = ", ".join(repr(layer.name) for layer in layers) or "none"
        raise ValueError(
            f"`attack_input` must name one of the embedding layers of `model`, which need different names: {listed}. "
            f"Received: attack_input={attack_input!r}"
        )
    return layers[0]


_lock = threading.Lock()  # held while a layer is made changeable
# By the id of an embedding layer, the function that changes what it gives. Each thread has its own.
_changes: ContextVar[Mapping[int, Any] | None] = ContextVar("_changes", default=None)


@contextmanager
def changed_embedding(layer: keras.layers.Embedding, change: Any) -> Iterator[None]:
    """Let a function change what an embedding layer gives in this thread.

    Args:
        layer: The layer.
        change: Maps what the layer gives to what takes its place.
    """
    with _lock:
        if not hasattr(layer.call, "_is_changeable"):
            _make_changeable(layer)
    token = _changes.set({**(_changes.get() or {}), id(layer): change})
    try:
        yield
    finally:
        _changes.reset(token)


def _make_changeable(layer: keras.layers.Embedding) -> None:
    """Let calls of a layer look for a change. Without one, they do what they did; other threads see no difference."""
    plain = layer.call

    def call(inputs: Tensor, *arguments: Any, **options: Any) -> Tensor:
        outputs = plain(inputs, *arguments, **options)
        change = (_changes.get() or {}).get(id(layer))
        # Some layers also map hidden states back to tokens.
        is_reverse = options.get("reverse", arguments[0] if arguments else False)
        return outputs if change is None or is_reverse else change(outputs)

    call._is_changeable = True  # type: ignore[attr-defined]
    # Keras would track an attribute that it is told of.
    object.__setattr__(layer, "call", call)


def replace_embedding(attacked: Tensor, training: bool | None) -> Any:
    """Return the function that puts attacked embeddings in place of those of a layer.

    In training, the gradient of the loss flows to the weights of the layer as well.
    """

    def change(outputs: Tensor) -> Tensor:
        given = ops.cast(attacked, outputs.dtype)
        return outputs + ops.stop_gradient(given - outputs) if training else given

    return change
