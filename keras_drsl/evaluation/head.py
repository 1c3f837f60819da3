"""The logits of a model whose outputs may be probabilities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl._inputs import logits_behind
from keras_drsl.attacks.classifier import Classifier, is_wrong, looks_like_probabilities
from keras_drsl.spread import class_values


class Head(NamedTuple):
    """How a model's logits are reached.

    Attributes:
        classifier: maps inputs to logits, with the model's own weights. Attacks follow them.
        model: maps inputs to the model's own outputs. These are what counts.
        kind: "logits" if the model returns them, "softmax" if they were found behind its softmax, "probabilities" if
            they were not, and their logarithms stand in.
    """

    classifier: Classifier
    model: Classifier
    kind: str

    def is_wrong(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which inputs the model itself misclassifies, shape `(batch,)`."""
        return is_wrong(self.model.logits(x), y)


def find_logits(model: keras.Model, x: np.ndarray, from_logits: bool | None = None) -> Head:
    """Find the logits of a model, behind its softmax if it ends with one; its `classifier` is what attacks take.

    Args:
        model: a classifier.
        x: a few inputs to try it on.
        from_logits: what its outputs are said to be; None to look.

    Raises:
        ValueError: if the outputs are neither logits nor probabilities, or not what `from_logits` says.
    """
    own = Classifier(model)
    outputs = own.logits(x)
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(f"`model` must return outputs of shape (batch, classes >= 2). Received: {outputs.shape}")
    if not np.isfinite(outputs).all():
        weights = [weight.path for weight in model.weights if not np.isfinite(ops.convert_to_numpy(weight)).all()]
        cause = f" Weights that are not finite: {', '.join(weights[:3])}." if weights else ""
        raise ValueError(f"`model` must return finite outputs. Received: NaN or infinite ones.{cause}")
    probabilities = looks_like_probabilities(outputs)
    if from_logits and probabilities:
        raise ValueError(
            "`from_logits=True`, but the outputs of `model` look like probabilities: they are not negative and sum to "
            "1. Leave `from_logits=None` and the logits behind them are found where they can be."
        )
    if from_logits is False and not probabilities:
        raise ValueError(
            "`from_logits=False`, but the outputs of `model` are no probabilities. "
            f"Received: values from {outputs.min():g} to {outputs.max():g}, sums from {outputs.sum(1).min():g} to "
            f"{outputs.sum(1).max():g}"
        )
    if not probabilities:
        return Head(own, own, "logits")
    # Some inputs that are not like the data, too: what only looks like the logits behind there differs here.
    tried = np.concatenate([x, np.random.default_rng(0).uniform(x.min(), x.max(), x.shape).astype("float32")])
    outputs = own.logits(tried)
    for candidate in _candidates(model):
        classifier = Classifier(candidate)
        try:
            logits = classifier.logits(tried)
        except (TypeError, ValueError, AttributeError):
            continue
        if not looks_like_probabilities(logits) and _gives(logits, outputs):
            return Head(classifier, own, "softmax")
    classifier = Classifier(_Function(model.variables, lambda x: log_of(model(x, training=False))))
    return Head(classifier, own, "probabilities")


def counters_of(model: keras.Model) -> list:
    """The variables that random numbers are drawn from."""
    return [one for one in model.variables if "float" not in one.dtype]


@contextmanager
def unchanged(*models: keras.Model | None) -> Iterator[None]:
    """Puts the state of the models' random numbers back, whatever happens."""
    counters = [one for model in models if model is not None for one in counters_of(model)]
    before = [ops.convert_to_numpy(one) for one in counters]
    try:
        yield
    finally:
        for one, value in zip(counters, before, strict=True):
            one.assign(value)


class _Function:
    """A function with the variables it reads."""

    def __init__(self, variables: list, function: Callable) -> None:
        self.variables = variables
        self._function = function

    def __call__(self, x: Any) -> Any:
        return self._function(x)


def _gives(logits: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether the softmax of the logits is what the model returns, in small probabilities as well."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    told = probabilities > 1e-4
    return np.allclose(log_p[told], np.log(probabilities[told]), atol=2e-2)


def _candidates(model: keras.Model) -> Iterator[Callable]:
    """Functions that may be the model without its softmax."""
    try:
        without = _without_softmax(model)
    except (AttributeError, ValueError, IndexError):  # not a graph of layers, or not built
        without = None
    if without is not None:
        yield without
    yield _Function(model.variables, lambda x: _behind_output(model, x))
    for layer in reversed(model.layers):
        if getattr(layer, "activation", None) is keras.activations.softmax:
            yield _made_linear(model, layer)


def _without_softmax(model: keras.Model) -> Callable | None:
    """The model up to the softmax its graph of layers ends with, or None if it ends with none."""
    last = next(layer for layer in reversed(model.layers) if _makes(layer, model))
    if isinstance(last, keras.Model):
        inner, outer = _without_softmax(last), keras.Model(model.inputs[0], last.input)
        return inner and _Function(model.variables, lambda x: Classifier(inner)(outer(x, training=False)))
    if isinstance(last, keras.layers.Softmax):
        return keras.Model(model.inputs[0], last.input)
    if getattr(last, "activation", None) is keras.activations.softmax:
        return _made_linear(model, last)
    return None


def _makes(layer: keras.Layer, model: keras.Model) -> bool:
    """Whether the layer makes the model's output."""
    return isinstance(model, keras.Sequential) or layer.output is model.outputs[0]


def _made_linear(model: keras.Model, layer: keras.Layer) -> _Function:
    """The model with the layer's softmax left out while it is called."""

    @contextmanager
    def linear() -> Iterator[None]:
        layer.activation = keras.activations.linear
        try:
            yield
        finally:
            layer.activation = keras.activations.softmax

    def call(x: Any) -> Any:
        with linear():
            return model(x, training=False)

    return _Function(model.variables, call)


def _behind_output(model: keras.Model, x: Any) -> Any:
    return logits_behind(model(x, training=False), False, -1)[0]


def log_of(probabilities: Any) -> Any:
    """Their logarithms in float32, finite."""
    return class_values(ops.cast(probabilities, "float32"), from_logits=False, space="log_softmax")
