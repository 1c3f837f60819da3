"""A function of logits with the programs that are compiled for it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.calls import add_calls
from keras_drsl.models.heads import Head
from keras_drsl.models.state import owner
from keras_drsl.predictions import SUM_TOLERANCE

MAX_PROGRAMS = 64  # a classifier keeps; the suite "standard" needs about 20


class Classifier:
    """Logits in float32, and the programs compiled for them, each once.

    Use it where several attacks work on one model. A program that one attack has compiled serves another attack with
    other values of `eps`, `steps` or `restarts`.

    Args:
        logits_fn: A `keras.Model`, or any function that maps inputs `(batch, ...)` to **logits** `(batch, C)`, or
            `(batch, positions, C)` for a function that classifies each position. A Keras model is called as at
            inference, and its weights are read in each call. On JAX, the weights of a function are read in the first
            call only, unless the function is a method of a Keras layer or has an attribute `variables`, the list of its
            Keras variables.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> classifier = keras_drsl.models.Classifier(model)
    >>> classifier.logits(np.ones((4, 8), "float32")).shape
    (4, 10)
    """

    def __init__(self, logits_fn: Callable[[Tensor], Tensor]) -> None:
        self.logits_fn = logits_fn
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._checked_shape: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_programs": {}}  # compiled programs belong to this process

    @property
    def variables(self) -> list[keras.Variable]:
        """The Keras variables that the logits are computed from, as far as they are known."""
        owner = getattr(self.logits_fn, "__self__", self.logits_fn)
        return list(getattr(owner, "variables", ()))

    @property
    def expectation_draws(self) -> int:
        """Over how many calls of a random model its probabilities are averaged; 1 for any other function."""
        draws: int = getattr(self.logits_fn, "expectation_draws", 1)
        return draws

    @property
    def reads_current_weights(self) -> bool:
        """Whether compiled programs see weights that changed after compilation."""
        return _backend.READS_WEIGHTS_EACH_CALL or bool(self.variables)

    @classmethod
    def of(cls, logits_fn: "Callable[[Tensor], Tensor] | Classifier") -> "Classifier":
        """Return the classifier itself, or a new one of a function or model."""
        return logits_fn if isinstance(logits_fn, cls) else cls(logits_fn)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the logits of a tensor `(batch, ...)` as at inference, shape `(batch, C)`."""
        return ops.cast(self.logits_fn(x, **self._at_inference), "float32")

    @property
    def _at_inference(self) -> dict[str, Any]:
        return {"training": False} if isinstance(self.logits_fn, keras.Layer) else {}

    def compile(self, function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """Compile `function(classifier, *tensors, **static)` to a function of the tensors.

        The program is kept for the same function and static values, which must be hashable. So pass a function of the
        module: a lambda or a nested function is another one in each call, and is compiled anew.
        """
        return self._keep(
            (function, *sorted(static.items())), _backend.compile_function, partial(function, self, **static)
        )

    def compile_steps(self, step: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """Compile `step(classifier, rows, *tensors, **static)` to a function of the rows and of stacked tensors.

        The function runs one step per element of the tensors' first axis.
        """
        return self._keep(("steps", step, *sorted(static.items())), _backend.multi_step, partial(step, self, **static))

    def _keep(self, key: Any, compile_: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the program of a key, and compile it if there is none. New ones replace the oldest ones."""
        program = self._programs.get(key)
        if program is None:
            program = compile_(function, self.variables, lambda seconds: add_calls(compile_seconds=seconds))
            while len(self._programs) >= MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = program
        return program

    def count_gradients(self, number: int) -> None:
        """Count inputs whose gradient was computed, for the cost in reports.

        An attack that computes gradients in a compiled program calls it with their number.
        """
        add_calls(gradients=int(number) * self.expectation_draws)

    def count_queries(self, number: int) -> None:
        """Count inputs whose logits were computed without a gradient, for the cost in reports.

        `logits` calls it itself. An attack that computes logits in a compiled program calls it with their number.
        """
        add_calls(queries=int(number) * self.expectation_draws)

    def check(self, x: Array) -> None:
        """Raise `ValueError` unless the function maps batches of any size to tensors of shape `(batch, C >= 2)`.

        Args:
            x: Some inputs, shape `(batch, ...)`. A second call with inputs of one shape returns at once.
        """
        if self._checked_shape == x.shape[1:]:
            return
        model = self.logits_fn.model if isinstance(self.logits_fn, Head) else self.logits_fn
        name = "model" if isinstance(model, keras.Model) else "logits_fn"
        # Two sizes: recurrent layers with a state, and some others, take one size only.
        for batch in (x[:1], x[[0, 0]]):
            try:
                outputs = self.logits_fn(ops.convert_to_tensor(batch), **self._at_inference)
            except Exception as error:
                raise ValueError(
                    f"`{name}` must take batches of any size, here inputs of shape {batch.shape}."
                    f"{_unusual(model, batch)} Received: {type(error).__name__}: {_reason(error)}"
                ) from error
            per_position = getattr(self.logits_fn, "per_position", not isinstance(self.logits_fn, keras.Layer))
            _check_one_output(name, outputs, len(batch), per_position=per_position)
        self._checked_shape = x.shape[1:]

    def logits(self, x: Array) -> Array:
        """Compute the logits of an array `(batch, ...)`, shape `(batch, C)`."""
        if isinstance(self.logits_fn, keras.Layer) and not self.logits_fn.built:
            self(ops.convert_to_tensor(x[:1]))
        rows = np.arange(_backend.bucket_size(len(x)))
        logits = self.compile(_forward)(x[np.minimum(rows, len(x) - 1)])
        self.count_queries(len(x))
        return np.asarray(ops.convert_to_numpy(logits))[: len(x)]

    def logits_in_batches(self, x: Array, batch_size: int) -> Array:
        """Compute the logits of an array of any length, `batch_size` rows at a time, shape `(count, C)`."""
        return np.concatenate([self.logits(x[start : start + batch_size]) for start in range(0, len(x), batch_size)])


def _reason(error: Exception) -> str:
    """Return the line of an error that says what went wrong, without the frame that Keras puts around it."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("Exception encountered")), "no message")


def _unusual(function: Any, batch: Array) -> str:
    """Return a sentence on what keeps a model from taking batches of one input each, or an empty text."""
    inputs = getattr(function, "inputs", None) or []
    if len(inputs) > 1:
        return f" It has {len(inputs)} inputs."
    layers = function._flatten_layers() if isinstance(function, keras.Layer) else []
    stateful = [layer.name for layer in layers if getattr(layer, "stateful", False) and layer is not function]
    if stateful:
        return f" Its layer {stateful[0]!r} is stateful: give a copy of the model with `stateful=False`."
    if inputs and inputs[0].shape[0] is not None:
        return f" It was built for batches of {inputs[0].shape[0]}."
    if inputs:
        hint = " For one input, give `x[None]`." if len(inputs[0].shape) > batch.ndim else ""
        return f" It takes inputs of shape {inputs[0].shape[1:]}.{hint}"
    return ""


def _check_one_output(name: str, outputs: Any, count: int, *, per_position: bool) -> None:
    """Raise `ValueError` unless outputs are one tensor of shape `(count, C >= 2)`, or `(count, ..., C)` by position."""
    if isinstance(outputs, np.ndarray):
        raise ValueError(
            f"`{name}` must return a tensor, through which gradients flow: give the model, not its `predict`. "
            "Received: a NumPy array"
        )
    if not ops.is_tensor(outputs):
        names = f" with keys {list(outputs)}" if isinstance(outputs, dict) else ""
        raise ValueError(f"`{name}` must have one output. Received: outputs of type {type(outputs).__name__}{names}")
    shape = tuple(outputs.shape)
    if per_position and len(shape) == 3 and shape[0] == count and shape[-1] >= 2:
        return
    if len(shape) != 2 or shape[0] != count or shape[1] < 2:
        hint = " For one sigmoid unit of logit z, return the logits [0, z]." if shape == (count, 1) else ""
        hint = ' For a model of positions, give task="positions".' if len(shape) > 2 else hint
        raise ValueError(f"`{name}` must return outputs of shape (batch, classes >= 2).{hint} Received: {shape}")


def _forward(classifier: Classifier, x: Tensor) -> Tensor:
    return classifier(x)


def margins(logits: Array, y: Array) -> Array:
    """Return the largest non-true logit minus the true one, shape `(batch,)`; infinite where a logit is NaN."""
    true = np.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    others = np.where(np.arange(logits.shape[1]) == y[:, None], -np.inf, logits)
    with np.errstate(invalid="ignore"):
        margin = others.max(axis=1) - true
    return np.where(np.isnan(margin), np.inf, margin)


def is_misclassified(logits: Array, y: Array) -> Array:
    """Return where the prediction is not the true class or a logit is NaN, shape `(batch,)`.

    Of a model of positions, return where all positions that count are wrong.
    """
    if logits.ndim == 3:
        return np.asarray(count_wrong(logits, y) == num_predictions(y))
    return is_wrong(logits, y)


def severity(logits: Array, y: Array) -> Array:
    """Return how bad the answers are, to choose between points: the margin, or the share of positions that are wrong.

    Args:
        logits: Shape `(batch, C)` or `(batch, positions, C)`.
        y: Class ids, shape `(batch,)` or `(batch, positions)`.
    """
    if logits.ndim == 2:
        return margins(logits, y)
    return np.asarray(count_wrong(logits, y) / np.maximum(num_predictions(y), 1))


def num_predictions(y: Array) -> Array:
    """Return how many predictions of each row count: 1, or the number of positions whose class id is not negative."""
    return np.ones(len(y), int) if y.ndim == 1 else np.asarray((y >= 0).sum(axis=1))


def is_wrong(logits: Array, y: Array) -> Array:
    """Return for each prediction whether it is not the true class or a logit is NaN, shape `(batch, ...)`."""
    wrong: Array = (logits.argmax(axis=-1) != y) | np.isnan(logits).any(axis=-1)
    return wrong


def count_wrong(logits: Array, y: Array) -> Array:
    """Return how many positions of each row are wrong, of those whose class id is not negative, shape `(batch,)`.

    Args:
        logits: Shape `(batch, positions, C)`.
        y: Class ids, shape `(batch, positions)`.
    """
    return np.asarray((is_wrong(logits, y) & (y >= 0)).sum(axis=1))


def compute_rounding(classifier: Classifier) -> float:
    """Return the largest relative rounding error of a number in the layers of a model; float32's of any function."""
    model = owner(classifier)
    layers = model._flatten_layers() if isinstance(model, keras.Layer) else []
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
    return max((half.get(layer.compute_dtype, 2.0**-24) for layer in layers), default=2.0**-24)


def looks_like_probabilities(outputs: Array) -> bool:
    """Return whether outputs `(batch, C)` are non-negative and sum to 1, up to the rounding of half precision."""
    return bool(outputs.min() >= 0 and np.allclose(outputs.sum(axis=-1), 1.0, atol=SUM_TOLERANCE))
