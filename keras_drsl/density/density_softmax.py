"""A classifier whose probabilities become less sure where the density of its features is low."""

import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_drsl import _validation
from keras_drsl._data import to_array
from keras_drsl._typing import Tensor
from keras_drsl.density.real_nvp import RealNVP
from keras_drsl.models.state import check_model, keep_counters

SMALLEST_SCALE = 0.001


@keras.saving.register_keras_serializable(package="keras_drsl")
class DensitySoftmax(keras.Model):
    """Divide the logits of a classifier by what a density says about its features.

    Use it where a model must not be sure of inputs unlike its training data. It makes no model robust: the scale is
    above 0 and changes no prediction.

    `fit` trains in three stages: the model, with a penalty on how its features change; the density of its features;
    and the last layer again, on scaled features. Then the `DensitySoftmax` is a Keras model like others: it predicts,
    is evaluated and saved.

    Shapes: those of the model.

    Formula: `outputs = activation(s(x) (W h + b))`, with `h` the features, the input of the last layer, and

    - `s(x) = exp((log q(h) - largest) / (largest - smallest))`, limited to between 0.001 and 1: with a smaller scale,
      float32 would no longer tell the probabilities apart.
    - `q`: the density, a `RealNVP`; `largest`, `smallest`: its largest and smallest `log q(h)` on the training data.

    The first stage minimizes `L + lipschitz (|h(x + d) - h(x)| / |d| - 1)^2`, averaged over the batch, with `L` the
    loss given to `compile` and `d` small random noise: features then change about as fast as inputs.

    Note:

    - It shares the weights of the model: `fit` trains the model too.
    - Before `fit`, `s` is 1.

    Args:
        model: A Sequential or functional model with one input, that ends in a `Dense` layer, linear or a softmax.
        lipschitz: The weight of the penalty, a number >= 0.
        couplings: As in `RealNVP`.
        width: As in `RealNVP`.
        **options: As in `keras.Model`.

    Raises:
        ValueError: If the model does not end so, or an argument is out of its range.

    Example:

    >>> from keras_drsl.density import DensitySoftmax
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3, "softmax")])
    >>> careful = DensitySoftmax(model)
    >>> careful.compile("adam", "sparse_categorical_crossentropy")
    >>> x, y = np.random.default_rng(0).random((64, 8)).astype("float32"), np.arange(64) % 3
    >>> history = careful.fit(x, y, epochs=2, density_epochs=2, head_epochs=1, verbose=0)
    >>> bool((careful.predict(x, verbose=0).argmax(1) == model.predict(x, verbose=0).argmax(1)).all())
    True

    Reference: Bui and Liu, "Density-Softmax: Efficient Test-time Model for Uncertainty Estimation and Robustness under
    Distribution Shifts", arXiv:2302.06495.
    """

    def __init__(
        self, model: keras.Model, *, lipschitz: float = 0.01, couplings: int = 4, width: int = 16, **options: Any
    ) -> None:
        super().__init__(**options)
        check_model("model", model)
        self.model = model
        self.lipschitz = _validation.check_non_negative("lipschitz", lipschitz)
        self.head = _last_dense(model)
        self.features = keras.Model(model.inputs, self.head.input)
        self.density = RealNVP(self.features.output_shape[-1], couplings=couplings, width=width)
        # The smallest and the largest log-density of the training data; equal ones mean a scale of 1.
        self._limits = self.add_weight(name="limits", shape=(2,), initializer="zeros", trainable=False)
        self.built = True

    def scale(self, features: Tensor) -> Tensor:
        """Return `s` for features `(batch, size)`, shape `(batch, 1)`."""
        return self._scale_of(self.density(features))

    def _scale_of(self, log_density: Tensor) -> Tensor:
        smallest, largest = self._limits[0], self._limits[1]
        width = ops.where(largest > smallest, largest - smallest, 1.0)
        share = ops.clip((log_density - largest) / width, math.log(SMALLEST_SCALE), 0.0)
        return ops.expand_dims(ops.exp(ops.where(largest > smallest, share, 0.0)), -1)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Return the outputs for inputs `(batch, ...)`."""
        features = self.features(inputs, training=training)
        return self._outputs(features, self.scale(features))

    def _outputs(self, features: Tensor, scale: Tensor) -> Tensor:
        logits = ops.matmul(features, self.head.kernel)
        logits = logits + self.head.bias if self.head.use_bias else logits
        return self.head.activation(scale * logits)

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        epochs: int = 10,
        density_epochs: int = 10,
        head_epochs: int = 2,
        batch_size: int = 64,
        verbose: Any = "auto",
        **options: Any,
    ) -> dict[str, keras.callbacks.History]:
        """Train in three stages.

        Args:
            x: Inputs, shape `(count, ...)`.
            y: Labels, as the loss takes them.
            epochs: The epochs of the first stage, >= 0.
            density_epochs: Those of the density, >= 0.
            head_epochs: Those of the last layer, >= 0.
            batch_size: The size of a batch.
            verbose: As in `keras.Model.fit`.
            **options: More arguments of `keras.Model.fit`, for the first stage.

        Returns:
            The histories by stage: `"model"`, `"density"` and `"head"`.

        Raises:
            ValueError: If it was not compiled, an argument is out of its range, or the density is not finite on the
                training data.
        """
        if not self.compiled:
            raise ValueError("Call `compile` with an optimizer and a loss first.")
        stages = {"epochs": epochs, "density_epochs": density_epochs, "head_epochs": head_epochs}
        for name, value in stages.items():
            _validation.check_integer(name, value, at_least=0)
        _validation.check_integer("batch_size", batch_size, at_least=1)
        x = to_array(x).astype("float32")
        shared = {"batch_size": batch_size, "verbose": verbose}
        first = _Penalized(self.features, self.head, self.lipschitz)
        first.compile(_fresh(self.optimizer), self.loss)
        histories = {"model": first.fit(x, y, epochs=epochs, **shared, **options)}
        features = self.features.predict(x, batch_size=batch_size, verbose=0)
        self.density.adapt(features)
        self.density.compile(keras.optimizers.Adam(0.003), RealNVP.loss)
        histories["density"] = self.density.fit(features, np.zeros(len(x)), epochs=density_epochs, **shared)
        log_density = self.density.predict(features, batch_size=batch_size, verbose=0)
        if not np.isfinite(log_density).all():
            raise ValueError("The density must be finite on the training data. Received: NaN or infinite values")
        self._limits.assign([log_density.min(), log_density.max()])
        scale = ops.convert_to_numpy(self._scale_of(ops.convert_to_tensor(log_density)))
        last = _Head(self)
        last.compile(_fresh(self.optimizer), self.loss)
        histories["head"] = last.fit(np.concatenate([features, scale], axis=1), y, epochs=head_epochs, **shared)
        return histories

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving."""
        own = {"lipschitz": self.lipschitz, "couplings": self.density.couplings, "width": self.density.width}
        config: dict[str, Any] = super().get_config() | {"model": keras.saving.serialize_keras_object(self.model)} | own
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DensitySoftmax":
        """Make a model from what `get_config` returned."""
        return cls(**config | {"model": keras.saving.deserialize_keras_object(config["model"])})


class _Penalized(keras.Model):
    """The first stage: the model with a penalty on the change of its features."""

    def __init__(self, features: keras.Model, head: keras.Layer, lipschitz: float) -> None:
        super().__init__(name="penalized")
        self.features, self.head, self.lipschitz = features, head, lipschitz
        self._noise = keras.random.SeedGenerator(0)

    def call(self, inputs: Tensor, training: bool | None = None) -> Any:
        x = ops.convert_to_tensor(inputs)
        rewind = keep_counters(self.features)
        features = self.features(x, training=training)
        if not training or not self.lipschitz:
            return self.head(features), ops.zeros_like(features[:, 0])
        delta = 1e-2 * keras.random.normal(ops.shape(x), dtype=x.dtype, seed=self._noise)
        rewind()  # layers must draw the same random numbers for both
        moved = self.features(x + delta, training=training) - features
        ratio = _length(moved) / _length(ops.reshape(delta, (ops.shape(delta)[0], -1)))
        return self.head(features), ops.square(ratio - 1)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        outputs, penalty = y_pred
        return super().compute_loss(x, y, outputs, sample_weight, training) + self.lipschitz * ops.mean(penalty)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        results: dict[str, Any] = super().compute_metrics(x, y, y_pred[0], sample_weight)
        return results


class _Head(keras.Model):
    """The last stage: the last layer on features and their scale, side by side."""

    def __init__(self, whole: DensitySoftmax) -> None:
        super().__init__(name="head")
        self.head = whole.head
        self._outputs = whole._outputs
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        return self._outputs(inputs[:, :-1], inputs[:, -1:])


def _length(x: Tensor) -> Tensor:
    # The square root has no derivative at 0.
    return ops.sqrt(ops.sum(ops.square(x), axis=-1) + 1e-12)


def _fresh(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return an optimizer with the same settings and no state."""
    return type(optimizer).from_config(optimizer.get_config())


def _last_dense(model: keras.Model) -> layers.Dense:
    """Return the layer that makes the output of a model, or raise `ValueError` unless it is a Dense layer."""
    last = (getattr(model, "layers", None) or [None])[-1]
    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    is_head = (
        len(inputs) == len(outputs) == 1
        and type(last) is layers.Dense
        and any(last.activation is known for known in (keras.activations.linear, keras.activations.softmax))
        and last.output is outputs[0]
        and len(last.input.shape) == 2
        and last.input.shape[1] > 1
    )
    if not is_head:
        raise ValueError(
            "`model` must be a built Sequential or functional model with one input that ends in a Dense layer of two "
            "or more features, linear or a softmax. "
            f"Received: {type(model).__name__} that ends in {type(last).__name__}"
        )
    return last
