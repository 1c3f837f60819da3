"""What a model returns, as the outputs of two or more classes."""

from typing import Any, Literal

import keras
from keras import ops

from keras_drsl._typing import Tensor

Unit = Literal["logit", "probability"]


class Head:
    """A model at inference, and one of its outputs as a tensor `(batch, C >= 2)`.

    A single unit becomes two classes: the logits `[0, z]` of a logit z, or the probabilities `[1 - p, p]` of a
    probability p.

    Args:
        model: A Keras model.
        output: The name or position of the output, or None where the model has one.
        unit: What a single unit returns, or None for a model of several units.
    """

    def __init__(self, model: keras.Model, output: str | int | None = None, unit: Unit | None = None) -> None:
        self.model = model
        self.output = output
        self.unit = unit

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the model."""
        return list(self.model.variables)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs for inputs `(batch, ...)`."""
        outputs = select_output(self.model, self.model(x, training=False), self.output)
        return outputs if self.unit is None else two_classes(outputs, self.unit)


def two_classes(outputs: Tensor, unit: Unit) -> Tensor:
    """Return the outputs of a single unit `(batch, 1)` as those of two classes `(batch, 2)`."""
    other = ops.zeros_like(outputs) if unit == "logit" else 1 - outputs
    return ops.concatenate([other, outputs], axis=-1)


def select_output(model: keras.Model, outputs: Any, output: str | int | None) -> Any:
    """Return one of the outputs of a model.

    Args:
        model: The model, whose functional outputs have names.
        outputs: A tensor, a dictionary, or a list or tuple.
        output: The key of a dictionary, or the name or position of an output in a list; None for the only one.

    Raises:
        ValueError: If there is no such output, or several and `output` is None.
    """
    names = output_names(model, outputs)
    if output is None:
        if names is None or len(names) == 1:
            return outputs if names is None else keras.tree.flatten(outputs)[0]
        raise ValueError(f"`output` must name one of the outputs of `model`: {_listed(names)}. Received: output=None")
    if names is None:
        raise ValueError(f"`output` must be None for a model with one output. Received: output={output!r}")
    position = names.index(output) if output in names else output
    values = list(outputs.values()) if isinstance(outputs, dict) else list(outputs)
    if isinstance(position, int) and not isinstance(position, bool) and 0 <= position < len(values):
        return values[position]
    raise ValueError(f"`output` must name one of the outputs of `model`: {_listed(names)}. Received: output={output!r}")


def output_names(model: keras.Model, outputs: Any) -> list[Any] | None:
    """Return the names of several outputs, their positions where they have none; None for one tensor."""
    if isinstance(outputs, dict):
        return list(outputs)
    if not isinstance(outputs, list | tuple):
        return None
    names = getattr(model, "output_names", None) or []
    return list(names) if len(names) == len(outputs) else list(range(len(outputs)))


def _listed(names: list[Any]) -> str:
    return ", ".join(sorted(map(repr, names)))
