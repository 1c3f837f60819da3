"""Train a model with a vocabulary-sized head without ever holding its logits."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Tensor
from keras_drsl._validation import check_integer
from keras_drsl.losses import DRSLoss, PRSLoss
from keras_drsl.losses.base import reduce_values, strength_of
from keras_drsl.losses.linear_drs import largest_others, linear_values
from keras_drsl.losses.prs import recentralization
from keras_drsl.predictions import ClassIds, match_weights, read_class_ids


class LinearHeadTraining(keras.Model):
    """Train a classifier whose last layer has as many outputs as a vocabulary has words, without storing its logits.

    Use it where the logits of a batch are the largest tensor of a training step. It shares the weights of the model:
    compile and fit it, then use, evaluate and save the model itself. The weights become those that `fit` of the model
    computes, up to rounding.

    The last layer is a `keras.layers.Dense` without an activation or with a softmax, or a tied embedding as
    `keras.layers.ReversibleEmbedding`, which keras-hub's language models end in. Its logits are computed `chunk_size`
    classes at a time, once for the loss and once more for the gradient.

    Note:

    - Metrics of `compile` would need the logits, and are refused. The logs have the loss.
    - `call`, `predict` and the outputs of this object are the inputs of the last layer.
    - Labels are class ids, one per position.
    - Sample weights and `class_weight` are used as in `fit` of the model.

    Args:
        model: A functional or sequential model, or one of keras-hub without a preprocessor.
        loss: A `keras_drsl.DRSLoss` in log space, a `keras_drsl.PRSLoss`, or Keras's
            `SparseCategoricalCrossentropy`. Where the model returns logits, it has `from_logits=True`.
        chunk_size: How many classes to compute at a time, an integer >= 1. Memory grows with `positions x chunk_size`.
        name: The name of the model.

    Raises:
        ValueError: If the model does not end in such a layer, the loss is another one, or the loss and the model do not
            agree on logits; and in `compile` for a loss or metrics.
        RuntimeError: On PyTorch.

    Example:

    >>> model = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(1000, 8), keras.layers.Dense(1000)])
    >>> training = keras_drsl.training.LinearHeadTraining(model, loss=keras_drsl.DRSLoss(from_logits=True))
    >>> training.compile(optimizer="adam")
    >>> history = training.fit(np.ones((4, 5)), np.ones((4, 5)), verbose=0)
    >>> model.predict(np.ones((1, 5)), verbose=0).shape
    (1, 5, 1000)

    Reference: as `keras_drsl.linear_drs_loss`.
    """

    def __init__(self, model: keras.Model, loss: Any, *, chunk_size: int = 8192, name: str | None = None) -> None:
        if not _backend.HAS_XLA:
            raise RuntimeError(f"`LinearHeadTraining` needs TensorFlow or JAX. Received: KERAS_BACKEND={_backend.NAME}")
        head = _find_head(model)
        super().__init__(name=name, dtype=model.dtype_policy)
        self.model = model
        inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        self._features = keras.Model(inputs, head.features)
        self._head_loss = _HeadLoss(head, loss, check_integer("chunk_size", chunk_size, at_least=1))

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Return the input of the last layer, shape `(..., D)`."""
        return self._features(inputs, training=training)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, metrics: Any = None, **options: Any) -> None:
        """Prepare `fit` as `keras.Model.compile` does, with the same arguments except loss and metrics."""
        if loss is not None:
            raise ValueError(f"`loss` must be given to LinearHeadTraining itself. Received: loss={loss!r}")
        for key, value in (("metrics", metrics), ("weighted_metrics", options.get("weighted_metrics"))):
            if value:
                raise ValueError(f"`{key}` need the logits, which are not computed. Received: {key}={value!r}")
        super().compile(optimizer=optimizer, loss=self._head_loss, **options)

    def save(self, *arguments: Any, **options: Any) -> None:
        """Save the plain model, with the arguments of `keras.Model.save`."""
        self.model.save(*arguments, **options)

    def get_config(self) -> dict[str, Any]:
        """Raise `NotImplementedError`: only the plain model can be saved."""
        raise NotImplementedError("Save the plain model: `save` does.")


class _Head(NamedTuple):
    """The last layer of a model.

    Attributes:
        layer: A `Dense` or `ReversibleEmbedding`.
        features: Its input, of a functional model.
        classes: The number of classes.
        has_softmax: Whether a softmax follows.
    """

    layer: keras.layers.Layer
    features: keras.KerasTensor
    classes: int
    has_softmax: bool

    @property
    def weights(self) -> tuple[Tensor, Tensor | None, bool]:
        """The kernel, the bias or None, and whether the kernel has the shape `(C, D)`."""
        layer = self.layer
        if isinstance(layer, keras.layers.Dense):
            bias = None if layer.bias is None else ops.convert_to_tensor(layer.bias)
            return ops.convert_to_tensor(layer.kernel), bias, False
        if layer.tie_weights:
            return ops.convert_to_tensor(layer.embeddings), None, True
        return ops.convert_to_tensor(layer.reverse_embeddings), None, False


def _find_head(model: Any) -> _Head:
    """Return the last layer of a model, or raise `ValueError` where it is none that is known."""
    outputs = getattr(model, "outputs", None)
    if not isinstance(model, keras.Model) or not outputs:
        raise ValueError(
            "`model` must be a functional model, or a sequential one with a known input shape. "
            f"Received: {type(model).__name__}"
        )
    if len(outputs) != 1:
        raise ValueError(f"`model` must have one output. Received: a model of {len(outputs)}")
    operation, features = _made_by(outputs[0])
    has_softmax = isinstance(operation, keras.layers.Softmax) and operation.axis in (-1, len(outputs[0].shape) - 1)
    has_softmax = has_softmax or (
        isinstance(operation, keras.layers.Activation) and operation.activation is keras.activations.softmax
    )
    if has_softmax:
        operation, features = _made_by(features)
    reversible = getattr(keras.layers, "ReversibleEmbedding", None)
    is_known = any(
        kind is not None and isinstance(operation, kind) and type(operation).call is kind.call
        for kind in (keras.layers.Dense, reversible)
    )
    activation = getattr(operation, "activation", keras.activations.linear)
    if activation is keras.activations.softmax and not has_softmax:
        has_softmax, activation = True, keras.activations.linear
    computes_more = (
        activation is not keras.activations.linear
        or getattr(operation, "logit_soft_cap", None)
        or getattr(operation, "activity_regularizer", None) is not None
        or getattr(operation, "quantization_mode", None) is not None
    )
    if not is_known or computes_more:
        raise ValueError(
            "`model` must end in a Dense layer without an activation or with a softmax, or in a ReversibleEmbedding "
            "without a soft cap, and neither be quantized nor have an activity regularizer. "
            f"Received: a model that ends in {type(operation).__name__} {operation.name!r}"
        )
    return _Head(operation, features, outputs[0].shape[-1], has_softmax)


def _made_by(output: keras.KerasTensor) -> tuple[keras.Operation, keras.KerasTensor]:
    """Return the operation that made a tensor of a functional model, and its first input."""
    operation, node, _ = output._keras_history
    inputs = operation._inbound_nodes[node].input_tensors
    return operation, inputs[0] if inputs else None


class _HeadLoss(keras.losses.Loss):
    """A loss of features and labels: that of the logits which a head makes of the features.

    Args:
        head: The head.
        loss: The loss of its logits.
        chunk_size: How many classes to compute at a time.
    """

    def __init__(self, head: _Head, loss: Any, chunk_size: int) -> None:
        loss = keras.losses.get(loss)
        # Subclasses may have other formulas.
        if type(loss) not in (DRSLoss, PRSLoss, keras.losses.SparseCategoricalCrossentropy):
            raise ValueError(
                f"`loss` must be a DRSLoss, a PRSLoss or Keras's SparseCategoricalCrossentropy. Received: loss={loss!r}"
            )
        config = loss.get_config()
        if isinstance(loss, DRSLoss) and loss.space != "log_softmax":
            raise ValueError(f"`loss` must measure the spread in log space. Received: space={loss.space!r}")
        if bool(config["from_logits"]) == head.has_softmax:
            needed = (
                "probabilities, so `from_logits` must be False" if head.has_softmax else "logits: `from_logits=True`"
            )
            raise ValueError(f"`model` returns {needed} in `loss`. Received: from_logits={config['from_logits']}")
        if isinstance(loss, PRSLoss) and loss.end > head.classes - 1:
            raise ValueError(
                f"`end` of the loss must be at most the number of non-true classes, {head.classes - 1}. "
                f"Received: end={loss.end}"
            )
        super().__init__(name=loss.name, reduction=loss.reduction)
        self._head, self._loss, self._chunk_size = head, loss, chunk_size
        self._ignore_class = config.get("ignore_class")

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Compute the reduced loss of class ids and features, shape `(..., D)`."""
        if not isinstance(self._head.layer, keras.layers.Dense):
            y_pred = ops.copy(y_pred)  # the logits of an embedding have no mask
        kernel, bias, transposed = self._head.weights
        options: dict[str, Any] = {"chunk_size": self._chunk_size, "transposed": transposed}
        labels = read_class_ids(y_true, y_pred, self._head.classes, ignore_class=self._ignore_class)
        loss = self._loss
        if isinstance(loss, DRSLoss):
            kind: dict[str, Any] = {"spread": loss.spread, "label_smoothing": loss.label_smoothing}
            values = linear_values(labels, y_pred, kernel, bias, loss.lam, **kind, **options)
        else:
            values = linear_values(labels, y_pred, kernel, bias, 0.0, **options)
        if sample_weight is not None:
            sample_weight, values = match_weights(sample_weight, values)
        if isinstance(loss, PRSLoss):
            if sample_weight is not None:
                # Keras would not broadcast weights before it divides by their sum.
                sample_weight = sample_weight + ops.zeros_like(values)
            values = values + self._penalty(labels, y_pred, sample_weight, options)
        return reduce_values(loss, values, labels.valid, sample_weight)

    def _penalty(self, labels: ClassIds, features: Tensor, weights: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Return the penalty of `PRSLoss` for each token, 0 for those that are ignored."""
        loss, (kernel, bias, transposed) = self._loss, self._head.weights
        if labels.valid is not None:
            # Features of ignored tokens are arbitrary.
            features = ops.where(ops.expand_dims(labels.valid, -1), features, ops.zeros_like(features))
        dtype = "float64" if keras.backend.standardize_dtype(features.dtype) == "float64" else "float32"
        places = largest_others(labels, features, kernel, bias, loss.end, **options)[:, loss.start :]
        columns = ops.take(kernel, places, axis=0 if transposed else 1)
        columns = columns if transposed else ops.moveaxis(columns, 0, -1)
        rows = ops.cast(ops.reshape(features, (-1, 1, features.shape[-1])), dtype)
        logits = ops.sum(ops.cast(columns, dtype) * rows, axis=-1)
        if bias is not None:
            logits = logits + ops.cast(ops.take(bias, places), dtype)
        means = ops.reshape(ops.mean(logits, axis=-1), ops.shape(features)[:-1])
        by_weight = loss.reduction == "mean_with_sample_weight"
        penalty = strength_of(loss.lam, dtype) * recentralization(means, labels.valid, weights, count_weights=by_weight)
        return penalty if labels.valid is None else ops.where(labels.valid, penalty, 0.0)
