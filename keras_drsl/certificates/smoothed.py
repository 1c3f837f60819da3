"""A classifier of inputs with random noise, as a Keras model."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _validation
from keras_drsl._data import to_array
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.state import check_model


@keras.saving.register_keras_serializable(package="keras_drsl")
class SmoothedClassifier(keras.Model):
    """Classify inputs with normal noise added, in training and at inference.

    Use it to train a model for `keras_drsl.certify`, and to attack what was certified:
    `evaluate_robustness(SmoothedClassifier(model, sigma), ..., expectation_draws=16)` attacks the average over draws.

    Shapes: those of the model.

    Note:

    - It shares the weights of the model. `SmoothedClassifier(model, sigma).fit(...)` trains the model on noise.
    - Each call draws new noise. `votes` counts the classes over many draws.
    - What `certify` certifies is the vote. Attacks find points where the average of the probabilities is wrong, so
      count the votes at these points: see the example.

    Args:
        model: A classifier of one input.
        sigma: The standard deviation of the noise, a number >= 0, in the units of the inputs.
        seed: The seed of the noise; None for a random one.

    Raises:
        ValueError: If `model` is no Keras model or `sigma` no number >= 0.

    Example:

    The certified accuracy is at most the true one, and the share of right votes at attacked points is at least that:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> smoothed = keras_drsl.SmoothedClassifier(model, sigma=0.25, seed=0)
    >>> x, y = np.random.default_rng(0).random((10, 8)), np.arange(10) % 3
    >>> report = keras_drsl.evaluate_robustness(
    ...     smoothed, x, y, eps=0.1, norm=2, suite="quick", checks=[], expectation_draws=4, keep_examples=True,
    ...     verbose=0)
    >>> attacked = (smoothed.votes(report.x_adv, draws=200).argmax(axis=1) == y).mean()
    >>> certified = keras_drsl.certify(model, x, y, sigma=0.25, draws=200, verbose=0).accuracy(0.1)
    >>> bool(certified <= attacked)
    True
    """

    def __init__(self, model: keras.Model, sigma: float, *, seed: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        check_model("model", model)
        self.model = model
        self.sigma = _validation.check_non_negative("sigma", sigma)
        self.seed = None if seed is None else _validation.check_integer("seed", seed)
        self._generator = keras.random.SeedGenerator(seed)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Return the outputs of the model for inputs with new noise."""
        x = ops.convert_to_tensor(inputs)
        x = x if keras.backend.is_float_dtype(x.dtype) else ops.cast(x, self.compute_dtype)
        noise = keras.random.normal(ops.shape(x), stddev=self.sigma, dtype=x.dtype, seed=self._generator)
        return self.model(x + noise, training=training)

    def votes(self, x: Array, *, draws: int = 1_000, batch_size: int = 256) -> Array:
        """Count how often the model returns each class for inputs with noise.

        Args:
            x: Inputs, shape `(count, ...)`.
            draws: How many draws there are for each input.
            batch_size: How many inputs are classified together.

        Returns:
            Integers, shape `(count, C)`, whose rows sum to `draws`. A draw whose outputs are NaN counts for no class.

        Raises:
            ValueError: If an argument is out of its range, or the model has a single unit.
        """
        draws = _validation.check_integer("draws", draws, at_least=1)
        batch_size = _validation.check_integer("batch_size", batch_size, at_least=1)
        x = to_array(x)
        rows = np.repeat(np.arange(len(x)), draws)
        shape = np.shape(self.predict_on_batch(x[rows[:1]]))
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"`model` must return a unit for each class, (batch, C >= 2). Received: outputs of {shape}"
            )
        counts = np.zeros((len(x), shape[1]), int)
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            outputs = np.asarray(self.predict_on_batch(x[some]))
            are_numbers = ~np.isnan(outputs).any(axis=1)
            np.add.at(counts, (some[are_numbers], outputs.argmax(axis=1)[are_numbers]), 1)
        return counts

    def get_config(self) -> dict[str, Any]:
        """Return all arguments, for saving."""
        own = {"model": keras.saving.serialize_keras_object(self.model), "sigma": self.sigma, "seed": self.seed}
        config: dict[str, Any] = super().get_config() | own
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SmoothedClassifier":
        """Make a classifier from what `get_config` returned."""
        return cls(**config | {"model": keras.saving.deserialize_keras_object(config["model"])})
