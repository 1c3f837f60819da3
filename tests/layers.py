"""Layers that make a model's robustness hard to judge."""

import keras
from keras import ops


class SigmoidOf(keras.Model):
    """A model behind a sigmoid that is an operation in place of a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return ops.sigmoid(self.inner(x))


class Quantised(keras.layers.Layer):
    """Inputs rounded to steps of 0.1, with no gradient."""

    def call(self, x):
        return ops.round(x * 10) / 10


@keras.saving.register_keras_serializable(package="tests")
class Random(keras.layers.Layer):
    """Inputs with noise on them, another in each pass."""

    def __init__(self, scale=0.3, **options):
        super().__init__(**options)
        self.scale = scale
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + self.scale * keras.random.normal(ops.shape(x), seed=self.seed)

    def get_config(self):
        return super().get_config() | {"scale": self.scale}
