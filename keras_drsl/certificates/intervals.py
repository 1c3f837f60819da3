"""Certificates by interval bound propagation: bounds of all outputs for all inputs in a box."""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_drsl import _validation
from keras_drsl._data import class_ids, read_examples, to_array
from keras_drsl._typing import Array, Numbers, Tensor
from keras_drsl.certificates.report import CertificateReport
from keras_drsl.models.fingerprint import provenance
from keras_drsl.models.state import check_model
from keras_drsl.predictions import shapes_match
from keras_drsl.threat import ThreatModel

HALVINGS = 20  # a radius is exact to a millionth of the range
_ACTIVATIONS = keras.activations
RISING = (
    *(_ACTIVATIONS.linear, _ACTIVATIONS.relu, _ACTIVATIONS.relu6, _ACTIVATIONS.leaky_relu, _ACTIVATIONS.elu),
    *(_ACTIVATIONS.selu, _ACTIVATIONS.softplus, _ACTIVATIONS.sigmoid, _ACTIVATIONS.log_sigmoid, _ACTIVATIONS.tanh),
    *(_ACTIVATIONS.hard_sigmoid, _ACTIVATIONS.softsign, _ACTIVATIONS.exponential, _ACTIVATIONS.celu),
    _ACTIVATIONS.hard_tanh,
)
CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
# Each output rises with each input, or does not change.
MONOTONE = (
    *(layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Identity, layers.ActivityRegularization),
    *(layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D),
    *(layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D),
    *(layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D),
    *(layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D),
    *(layers.Flatten, layers.Reshape, layers.Permute, layers.RepeatVector),
    *(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D),
    *(layers.Cropping1D, layers.Cropping2D, layers.Cropping3D),
    *(layers.Add, layers.Average, layers.Maximum, layers.Minimum, layers.Concatenate),
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.AlphaDropout, layers.GaussianDropout, layers.GaussianNoise),
)
# Each output depends on one input, and rises or falls with it.
OF_ONE_INPUT = (layers.BatchNormalization, layers.Rescaling, layers.Normalization)


def interval_bounds(model: keras.Model, lower: Array, upper: Array, *, batch_size: int = 256) -> tuple[Array, Array]:
    """Compute bounds of the logits of a model for all inputs between two limits.

    Use it for small networks, and for those that are trained for such bounds: each layer makes them wider.

    Formula: a box is its centre `c` and its half width `r`. An affine layer maps it to `W c + b` and `|W| r`, a rising
    function to its values at both ends.

    Note:

    - A softmax at the end of the model is left out: the bounds are those of its logits.
    - They are computed in float32 and not rounded outwards: errors of rounding may exceed them.

    Args:
        model: A Sequential or functional model with one input and one output, of the layers Dense, Conv, pooling,
            batch normalization, dropout, Flatten and the like, Add and Concatenate, and activations of Keras that only
            rise. It holds no other model.
        lower: The smallest inputs, shape `(count, ...)`.
        upper: The largest inputs, of the same shape.
        batch_size: How many boxes are computed together.

    Returns:
        The smallest and the largest logits, each of shape `(count, C)`.

    Raises:
        ValueError: If a layer has no such bounds, or the limits do not fit.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> low, high = keras_drsl.certificates.interval_bounds(model, np.zeros((1, 2)), np.ones((1, 2)))
    >>> float(low[0, 0]), float(high[0, 0])
    (0.0, 2.0)

    Reference: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
    arXiv:1810.12715.
    """
    batch_size = _validation.check_integer("batch_size", batch_size, at_least=1)
    boxes = interval_model(model)
    lower, upper = to_array(lower).astype("float32"), to_array(upper).astype("float32")
    expected = tuple(model.inputs[0].shape[1:])
    if lower.ndim != len(expected) + 1 or not shapes_match(lower.shape[1:], expected) or not len(lower):
        raise ValueError(f"`lower` must hold inputs of shape (count, *{expected}). Received: shape {lower.shape}")
    if lower.shape != upper.shape:
        raise ValueError(f"`upper` must have the shape of `lower`, {lower.shape}. Received: {upper.shape}")
    if not (lower <= upper).all():
        raise ValueError("`upper` must be at least `lower` everywhere. Received: smaller values")
    return _bounds(boxes, lower, upper, batch_size)


def certify_interval(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    clip_min: Numbers | None = None,
    clip_max: Numbers | None = None,
    batch_size: int = 256,
    max_samples: int | None = None,
    shard: tuple[int, int] | None = None,
) -> CertificateReport:
    """Prove within which L-inf radius a model is right, for each example, by `interval_bounds`.

    Use it beside attacks on a small network: no attack can succeed within the radius. Here the model itself is
    certified, without noise and without a probability of error. For most networks that were not trained for such
    bounds the radii are far below the true ones.

    Note:

    - A radius is about inputs within the valid range only.
    - Bounds are computed in float32 and not rounded outwards: errors of rounding may exceed them.

    Args:
        model: As in `interval_bounds`, with an output per class, two or more.
        x_or_dataset: Inputs, shape `(count, ...)`; or a data set of batches `(inputs, labels)`.
        y: The labels of an array of inputs: class ids or one-hot.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        batch_size: How many boxes are computed together.
        max_samples: As in `evaluate_robustness`.
        shard: As in `evaluate_robustness`.

    Returns:
        A `CertificateReport`. A radius is exact to a millionth of the valid range, below.

    Raises:
        ValueError: If a layer has no such bounds, the model has one output unit, inputs lie outside the valid range, or
            labels do not match.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> report = keras_drsl.certificates.certify_interval(model, np.full((1, 2), 0.5), [0])
    >>> report.radii.shape
    (1,)
    """
    check_model("model", model)
    batch_size = _validation.check_integer("batch_size", batch_size, at_least=1)
    max_samples = _validation.check_max_samples(max_samples)
    # The radius is not used.
    threat = ThreatModel.from_arguments(np.finfo(float).tiny, "inf", clip_min, clip_max)
    examples = read_examples(x_or_dataset, y, max_samples=max_samples, shard=_validation.check_shard(shard))
    threat.validate("x_or_dataset", examples.whole[0])
    boxes = interval_model(model)
    if model.outputs[0].shape[1] < 2:
        raise ValueError(f"`model` must have a unit for each class. Received: outputs {tuple(model.outputs[0].shape)}")
    logits, _ = _bounds(boxes, examples.x, examples.x, batch_size)
    labels = class_ids(examples.y, len(examples.x), logits.shape[1])
    span = float(np.max(threat.span))
    low, high = np.zeros(len(labels)), np.full(len(labels), span)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        radius = middle.reshape(-1, *[1] * (examples.x.ndim - 1)).astype("float32")
        lower, upper = (np.clip(examples.x + sign * radius, threat.clip_min, threat.clip_max) for sign in (-1, 1))
        is_right = _are_right(*_bounds(boxes, lower, upper, batch_size), labels)
        low, high = np.where(is_right, middle, low), np.where(is_right, high, middle)
    low[~_are_right(logits, logits, labels)] = 0.0
    settings = {"method": "interval", "norm": "inf", "clip_min": threat.to_dict()["clip_min"]}
    settings |= {"clip_max": threat.to_dict()["clip_max"], "batch_size": batch_size, "max_samples": max_samples}
    per_example = {
        "index": examples.ids.tolist(),
        "label": labels.tolist(),
        "prediction": logits.argmax(axis=1).tolist(),
        "radius": low.tolist(),
    }
    return CertificateReport(settings | {"shard": shard and [*shard]}, per_example, provenance(model, examples.digest))


def _are_right(lower: Array, upper: Array, labels: Array) -> Array:
    """Return where the smallest logit of the true class is above the largest one of all others."""
    is_true = np.arange(lower.shape[1]) == labels[:, None]
    return np.asarray(lower[is_true] > np.where(is_true, -np.inf, upper).max(axis=1))


def _bounds(boxes: keras.Model, lower: Array, upper: Array, batch_size: int) -> tuple[Array, Array]:
    pairs = np.stack([lower, upper], axis=1)
    parts = [boxes.predict_on_batch(pairs[i : i + batch_size]) for i in range(0, len(pairs), batch_size)]
    outputs = np.concatenate([np.asarray(part) for part in parts])
    return outputs[:, 0], outputs[:, 1]


def interval_model(model: keras.Model) -> keras.Model:
    """Return a model that maps pairs of limits `(batch, 2, ...)` to pairs `(batch, 2, C)`, with the same weights.

    Args:
        model: As in `interval_bounds`.

    Raises:
        ValueError: If a layer has no such bounds.
    """
    check_model("model", model)
    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    # A model of the same layers that is not compiled: Keras would compile its clone again.
    graph = keras.Model(inputs[0], outputs[0]) if len(inputs) == len(outputs) == 1 else None
    if graph is None or type(model) not in (keras.Sequential, type(graph)) or len(outputs[0].shape) != 2:
        raise ValueError(
            "`model` must be a built Sequential or functional model with one input and one output (batch, C). "
            f"Received: {type(model).__name__}"
        )
    return keras.models.clone_model(
        graph,
        input_tensors=keras.Input((2, *inputs[0].shape[1:]), dtype=inputs[0].dtype),
        clone_function=lambda layer: _Bounds(layer, is_last=_makes(layer, outputs[0])),
    )


def _makes(layer: keras.Layer, output: Any) -> bool:
    """Return whether a layer is called once, and returns an output."""
    try:
        return layer.output is output
    except (AttributeError, ValueError):
        return False


class _Bounds(keras.Layer):
    """A layer that maps boxes `(batch, 2, ...)` to boxes."""

    def __init__(self, layer: keras.Layer, *, is_last: bool) -> None:
        super().__init__(name=layer.name)
        self._layer = layer
        self._rule = _rule(layer, is_last)

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Tensor:
        lower, upper = (keras.tree.map_structure(lambda x, i=i: x[:, i], inputs) for i in (0, 1))
        return ops.stack(self._rule(self._layer, lower, upper), axis=1)


def _rule(layer: keras.Layer, is_last: bool) -> Any:
    """Return the function of a layer and both ends of a box, or raise `ValueError` if there is none."""
    function = getattr(layer, "activation", _ACTIVATIONS.linear)
    is_softmax = function is _ACTIVATIONS.softmax or isinstance(layer, layers.Softmax)
    # By identity: a function of the same name may compute something else.
    has_rule = is_last if is_softmax else any(function is known for known in RISING)
    if isinstance(layer, layers.LeakyReLU | layers.ReLU):
        has_rule = layer.negative_slope >= 0
    if isinstance(layer, layers.ELU):
        has_rule = layer.alpha >= 0
    if getattr(layer, "padding", None) == "causal" or getattr(layer, "quantization_mode", None):
        has_rule = False
    kinds = [
        (layers.Dense, _dense),
        (CONVOLUTIONS, _convolution),
        (layers.DepthwiseConv2D, _depthwise),
        (OF_ONE_INPUT, _of_one_input),
        (layers.Softmax, lambda layer, *ends: ends),
        (layers.Activation, _activation),
        (MONOTONE, _monotone),
    ]
    for kind, rule in kinds:
        # Not derived classes, which may compute something else.
        if has_rule and type(layer) in (kind if isinstance(kind, tuple) else (kind,)):
            return rule
    name = getattr(function, "__name__", type(function).__name__)
    what = f" with activation {name!r}" if function is not _ACTIVATIONS.linear else ""
    raise ValueError(
        f"`model` must consist of layers that have interval bounds. Received: layer {layer.name!r}, a "
        f"{type(layer).__name__}{what}"
    )


def _monotone(layer: keras.Layer, lower: Any, upper: Any) -> tuple[Tensor, Tensor]:
    return layer(lower), layer(upper)


def _of_one_input(layer: keras.Layer, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    ends = layer(lower), layer(upper)
    return ops.minimum(*ends), ops.maximum(*ends)


def _activation(layer: keras.Layer, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    function = layer.activation
    return (lower, upper) if function is keras.activations.softmax else (function(lower), function(upper))


def _affine(layer: keras.Layer, lower: Tensor, upper: Tensor, product: Any, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of a box behind a product with the kernel, the bias and the activation."""
    centre, half_width = product((lower + upper) / 2, kernel), product((upper - lower) / 2, ops.abs(kernel))
    if layer.use_bias:
        shape = [1] * len(centre.shape)
        shape[1 if getattr(layer, "data_format", "") == "channels_first" else -1] = -1
        centre = centre + ops.reshape(layer.bias, shape)
    return _activation(layer, centre - half_width, centre + half_width)


def _dense(layer: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return _affine(layer, lower, upper, ops.matmul, ops.convert_to_tensor(layer.kernel))


def _convolution(layer: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return _affine(layer, lower, upper, layer.convolution_op, ops.convert_to_tensor(layer.kernel))


def _depthwise(layer: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    def product(x: Tensor, kernel: Tensor) -> Tensor:
        return ops.depthwise_conv(x, kernel, layer.strides, layer.padding, layer.data_format, layer.dilation_rate)

    return _affine(layer, lower, upper, product, ops.convert_to_tensor(layer.kernel))
