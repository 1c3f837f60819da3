"""What a model returns, as the outputs of two or more classes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend, _validation
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.fingerprint import fingerprint
from keras_drsl.models.inputs import Layout, changed_embedding, replace_embedding

Unit = Literal["logit", "probability"]
TASKS = ("multiclass", "multilabel", "positions")


@dataclasses.dataclass(frozen=True)
class View:
    """Hold how a model is looked at by attacks, evaluation and training.

    Attributes:
        output: The name or position of the output that holds the classes; None for a model with one output.
        preprocessing: A Keras layer or a function that maps inputs to what the model takes, or None.
        expectation_draws: Over how many calls the probabilities of a random model are averaged, >= 1.
        attack_input: The name or position of the input that is attacked, or of an embedding layer; None for a model
            with one input.
        task: `"multiclass"`, `"multilabel"` for a model with a unit per label, or `"positions"` for one that classifies
            each position of an input: the pixels of an image, the tokens of a text.
        which: The only label that counts, or None for all.
        ignore_class: For a model of positions, the class id of those that do not count, beside negative ids; or None.
        layout: Where the inputs lie in the array that is attacked, or None for a model with one input.
        embedding: The embedding layer that is attacked, or None.
    """

    output: str | int | None = None
    preprocessing: Callable[[Tensor], Tensor] | None = None
    expectation_draws: int = 1
    attack_input: str | int | None = None
    task: str = "multiclass"
    which: int | None = None
    ignore_class: int | None = None
    layout: Layout | None = None
    embedding: keras.layers.Embedding | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from a model as it is, by name, as JSON takes it."""
        function = self.preprocessing
        name = None if function is None else getattr(function, "__qualname__", type(function).__name__)
        if isinstance(function, keras.Layer):
            name = f"{name} {fingerprint(function)[:16]}"
        draws = None if self.expectation_draws == 1 else self.expectation_draws
        values = {"output": self.output, "preprocessing": name, "expectation_draws": draws}
        values |= {"attack_input": self.attack_input, "which": self.which, "ignore_class": self.ignore_class}
        values |= {"task": None if self.task == "multiclass" else self.task}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def per_position(self) -> bool:
        """Whether each row has several predictions: those of positions, or of all labels at once as in training."""
        if self.task == "positions":
            return True
        has_label = self.which is not None or (self.layout is not None and self.layout.num_labels > 0)
        return self.task == "multilabel" and not has_label

    def check(self) -> "View":
        """Return the view, or raise `ValueError` for arguments of a wrong kind."""
        if isinstance(self.output, bool) or not isinstance(self.output, str | int | None):
            raise ValueError(f"`output` must be a name or a position. Received: output={self.output!r}")
        if self.preprocessing is not None and not callable(self.preprocessing):
            raise ValueError(
                f"`preprocessing` must be a Keras layer or a function. Received: preprocessing={self.preprocessing!r}"
            )
        _validation.check_integer("expectation_draws", self.expectation_draws, at_least=1)
        if isinstance(self.attack_input, bool) or not isinstance(self.attack_input, str | int | None):
            raise ValueError(
                f"`attack_input` must be a name or a position. Received: attack_input={self.attack_input!r}"
            )
        _validation.check_choice("task", self.task, TASKS)
        if self.which is not None:
            _validation.check_integer("which", self.which, at_least=0)
            if self.task != "multilabel":
                raise ValueError(f'`which` must be left out unless task="multilabel". Received: which={self.which!r}')
        if self.ignore_class is not None:
            _validation.check_number("ignore_class", self.ignore_class, "an integer", lambda value: value == int(value))
            if self.task != "positions":
                raise ValueError(
                    '`ignore_class` must be left out unless task="positions". '
                    f"Received: ignore_class={self.ignore_class!r}"
                )
        return self

    def replace(self, **changes: Any) -> "View":
        """Return a view with some fields changed."""
        return dataclasses.replace(self, **changes)

    def call(self, model: keras.Model, x: Tensor, training: bool | None) -> Any:
        """Return the outputs that are looked at, for inputs `(batch, ...)`."""
        return select_output(model, self.call_all(model, x, training), self.output)

    def call_all(self, model: keras.Model, x: Tensor, training: bool | None) -> Any:
        """Return all outputs of the model."""
        if self.layout is None:
            return self._call_model(model, x, training)
        inputs, attacked, _ = self.layout.unpack(x)
        if self.embedding is None:
            return self._call_model(model, inputs, training)
        with changed_embedding(self.embedding, replace_embedding(attacked, training)):
            return self._call_model(model, inputs, training)

    def _call_model(self, model: keras.Model, inputs: Any, training: bool | None) -> Any:
        return model(inputs if self.preprocessing is None else self.preprocessing(inputs), training=training)

    def random_like(self, x: Array) -> Array:
        """Return inputs `(count, ...)` with random values between the smallest and the largest of those given.

        Inputs that are not attacked keep their values.
        """
        end = x.shape[-1] if self.layout is None else self.layout.shape[-1]
        part = x[..., :end]
        random = np.random.default_rng(0).uniform(part.min(), part.max(), part.shape).astype("float32")
        return np.concatenate([random, x[..., end:]], axis=-1)


class Head:
    """A model at inference, and one of its outputs as a tensor `(batch, C >= 2)`.

    A single unit becomes two classes: the logits `[0, z]` of a logit z, or the probabilities `[1 - p, p]` of a
    probability p. Of a random model, probabilities are averaged over several calls. Where it returns logits, the
    logarithms of the average replace them.

    Args:
        model: A Keras model.
        view: How the model is looked at.
        unit: What a single unit returns, or None for a model of several units.
        returns_logits: Whether the model returns logits; used for averages only.
    """

    def __init__(
        self, model: keras.Model, view: View, unit: Unit | None = None, *, returns_logits: bool = False
    ) -> None:
        self.model = model
        self.view = view
        self.unit = unit
        self._returns_logits = returns_logits

    @property
    def expectation_draws(self) -> int:
        """Over how many calls probabilities are averaged."""
        return self.view.expectation_draws

    @property
    def per_position(self) -> bool:
        """Whether each row has several predictions: the outputs are `(batch, ..., C)`."""
        return self.view.per_position

    @property
    def settings(self) -> tuple[Any, ...]:
        """What makes this another function of the model."""
        return self.view, self.unit, self._returns_logits and self.expectation_draws > 1

    @property
    def is_model(self) -> bool:
        """Whether the outputs are those of the model itself."""
        return self.view == View() and self.unit is None

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the model, and of a layer in front of it."""
        return [*self.model.variables, *getattr(self.view.preprocessing, "variables", ())]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs for inputs `(batch, ...)`."""
        draws = self.expectation_draws
        if draws == 1:
            return self._call_once(x)
        outputs = _backend.repeat_random(lambda: self._call_once(x), draws, self.variables)
        if not self._returns_logits:
            return ops.mean(outputs, axis=0)
        log_p = ops.log_softmax(ops.cast(outputs, "float32"), axis=-1)
        return ops.logsumexp(log_p, axis=0) - math.log(draws)

    def _call_once(self, x: Tensor) -> Tensor:
        outputs = self.view.call(self.model, x, training=False)
        if self.view.task == "positions":
            outputs = in_one_axis(outputs)
        if self.unit is None:
            return outputs
        if self.view.task != "multilabel":
            return two_classes(outputs, self.unit)
        pairs = two_classes_each(outputs, self.unit)
        return pairs if self.per_position else self._of_label(pairs, x)

    def _of_label(self, pairs: Tensor, x: Tensor) -> Tensor:
        """Return the two classes of one label per row, `(batch, 2)`, of those of all labels, `(batch, labels, 2)`."""
        if self.view.which is not None:
            return pairs[:, self.view.which]
        assert self.view.layout is not None
        label = self.view.layout.unpack(x)[2]
        # Not `take_along_axis`: behind a product and a sum, the logits of probabilities are found.
        chosen = ops.one_hot(label, pairs.shape[1], dtype=pairs.dtype)
        return ops.sum(pairs * ops.expand_dims(chosen, -1), axis=1)


def in_one_axis(outputs: Tensor) -> Tensor:
    """Return outputs of positions, `(batch, ..., C)`, with one axis of positions, `(batch, positions, C)`."""
    if None in outputs.shape[1:]:
        raise ValueError(
            "`model` must return a fixed number of positions: pad the inputs of all batches to one length. "
            f"Received: outputs of shape {tuple(outputs.shape)}"
        )
    return ops.reshape(outputs, (-1, math.prod(outputs.shape[1:-1]), outputs.shape[-1]))


def two_classes(outputs: Tensor, unit: Unit) -> Tensor:
    """Return the outputs of a single unit `(batch, 1)` as those of two classes `(batch, 2)`."""
    return ops.concatenate([_other_class(outputs, unit), outputs], axis=-1)


def two_classes_each(outputs: Tensor, unit: Unit) -> Tensor:
    """Return the outputs of several units `(batch, labels)` as those of two classes each, `(batch, labels, 2)`."""
    return ops.stack([_other_class(outputs, unit), outputs], axis=-1)


def _other_class(outputs: Tensor, unit: Unit) -> Tensor:
    return ops.zeros_like(outputs) if unit == "logit" else 1 - outputs


def select_output(model: keras.Model, outputs: Any, output: str | int | None) -> Any:
    """Return one of the outputs of a model.

    Args:
        model: The model, whose functional outputs have names.
        outputs: A tensor, a dictionary, or a list or tuple.
        output: The key of a dictionary, or the name or position of an output in a list; None for one tensor.

    Raises:
        ValueError: If there is no such output, or outputs have names and `output` is None.
    """
    names = output_names(model, outputs)
    if output is None:
        if names is None:
            return outputs
        raise ValueError(f"`output` must name one of the outputs of `model`: {_listed(names)}. Received: output=None")
    if names is None:
        raise ValueError(f"`output` must be None for a model with one output. Received: output={output!r}")
    position = names.index(output) if output in names else output
    values = list(outputs.values()) if isinstance(outputs, dict) else list(outputs)
    if isinstance(position, int) and 0 <= position < len(values):
        return values[position]
    raise ValueError(f"`output` must name one of the outputs of `model`: {_listed(names)}. Received: output={output!r}")


def output_names(model: keras.Model, outputs: Any) -> list[Any] | None:
    """Return the names of several outputs, their positions where they have none; None for one tensor."""
    if isinstance(outputs, dict):
        return list(outputs)
    if not isinstance(outputs, list | tuple):
        return None
    names = getattr(model, "output_names", None) or []
    # The same layer may have made several outputs.
    are_names = len(names) == len(set(names)) == len(outputs)
    return list(names) if are_names else list(range(len(outputs)))


def _listed(names: list[Any]) -> str:
    return ", ".join(sorted(map(repr, names)))
