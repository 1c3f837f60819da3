"""A normalizing flow: a density that is fitted to vectors."""

import math
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_drsl import _validation
from keras_drsl._typing import Array, Tensor


@keras.saving.register_keras_serializable(package="keras_drsl")
class RealNVP(keras.Model):
    """Compute the log-density of vectors, by coupling layers on a standard normal distribution.

    Use it to say how near vectors lie to those that it was fitted to: compile it with `RealNVP.loss`, and call `adapt`
    before `fit`.

    Shapes: vectors `(batch, size)` give log-densities `(batch,)`.

    Formula: each coupling layer maps the halves `(a, b)` of a vector to `(b exp(s(a)) + t(a), a)`, with networks `s`,
    limited to `[-2, 2]`, and `t`. `log q(h) = log N(f(h)) + sum of all s - sum_k log d_k`, with `f` all layers, behind
    a normalization of each number to mean 0 and standard deviation 1, by `d`, its standard deviation.

    Args:
        size: The length of the vectors, an integer of 2 or more.
        couplings: How many coupling layers there are, >= 1.
        width: How many units the hidden layer of each network has, >= 1.
        **options: As in `keras.Model`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> from keras_drsl.density import RealNVP
    >>> flow = RealNVP(2)
    >>> vectors = np.random.default_rng(0).normal(3, 2, (64, 2)).astype("float32")
    >>> flow.adapt(vectors)
    >>> flow.compile("adam", RealNVP.loss)
    >>> history = flow.fit(vectors, np.zeros(64), verbose=0)
    >>> flow(vectors).shape == (64,)
    True

    Reference: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", arXiv:1605.08803.
    """

    def __init__(self, size: int, *, couplings: int = 4, width: int = 16, **options: Any) -> None:
        super().__init__(**options)
        self.size = _validation.check_integer("size", size, at_least=2)
        self.couplings = _validation.check_integer("couplings", couplings, at_least=1)
        self.width = _validation.check_integer("width", width, at_least=1)
        self._mean = self.add_weight(name="mean", shape=(size,), initializer="zeros", trainable=False)
        self._deviation = self.add_weight(name="deviation", shape=(size,), initializer="ones", trainable=False)
        self._networks = []
        first, second = self.size // 2, self.size - self.size // 2
        for _ in range(self.couplings):
            network = keras.Sequential(
                [
                    keras.Input((first,)),
                    layers.Dense(self.width, activation="tanh"),
                    # A flow begins as the identity.
                    layers.Dense(2 * second, kernel_initializer="zeros"),
                ]
            )
            self._networks.append(network)
            first, second = second, first
        self.built = True

    def adapt(self, vectors: Array) -> None:
        """Take over mean and standard deviation of each number.

        Args:
            vectors: Shape `(count, size)`.
        """
        vectors = np.asarray(vectors, "float64")
        self._mean.assign(vectors.mean(axis=0))
        # A number that never changes has no density; a small deviation keeps it finite.
        self._deviation.assign(np.maximum(vectors.std(axis=0), 1e-3))

    def call(self, vectors: Tensor, training: bool | None = None) -> Tensor:
        """Return the log-density of vectors `(batch, size)`, shape `(batch,)`."""
        z = (vectors - self._mean) / self._deviation
        log_volume = -ops.sum(ops.log(self._deviation))
        for network in self._networks:
            size = network.input_shape[-1]
            a, b = z[:, :size], z[:, size:]
            scale, shift = ops.split(network(a, training=training), 2, axis=-1)
            scale = 2 * ops.tanh(scale / 2)
            z = ops.concatenate([b * ops.exp(scale) + shift, a], axis=-1)
            log_volume = log_volume + ops.sum(scale, axis=-1)
        return log_volume - ops.sum(ops.square(z), axis=-1) / 2 - self.size / 2 * math.log(2 * math.pi)

    @staticmethod
    def loss(y_true: Tensor, log_density: Tensor) -> Tensor:
        """Return the negative log-likelihood. The labels are not used.

        Args:
            y_true: Anything.
            log_density: What the model returned, shape `(batch,)`.
        """
        return -log_density

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving."""
        own = {"size": self.size, "couplings": self.couplings, "width": self.width}
        config: dict[str, Any] = super().get_config() | own
        return config
