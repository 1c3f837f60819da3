"""The networks of the studies, and how images of CIFAR-10 are fed to them."""

import math

import keras
import numpy as np

NAMES = ("cnn", "cnn_gelu", "small_resnet", "resnet18")


def build(name, shape, noise=0):
    """Return a network of that name for 10 classes, which returns logits; the CNN with Gaussian noise on its inputs."""
    if name.startswith("cnn"):
        return small_cnn(shape, noise, activation="gelu" if name == "cnn_gelu" else "relu")
    return preact_resnet(shape, *((16, 1) if name == "small_resnet" else (64, 2)))


def small_cnn(shape, noise=0, classes=10, activation="relu"):
    """Return two convolutions and two dense layers; small images are pooled once only."""
    model = keras.Sequential([keras.Input(shape)])
    if noise > 0:
        model.add(keras.layers.GaussianNoise(noise))
    for filters, pool in zip((32, 64), [2, 2] if shape[0] > 16 else [1, 2], strict=True):
        model.add(keras.layers.Conv2D(filters, 3, padding="same", activation=activation))
        model.add(keras.layers.MaxPooling2D(pool))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(128, activation=activation))
    model.add(keras.layers.Dense(classes, name="logits"))
    return model


def preact_resnet(shape, width, blocks):
    """Return a residual network with pre-activations: four stages of `blocks` blocks; with 64 and 2, PreAct-ResNet-18.

    Reference: He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.
    """
    # Weight decay of 5e-4 that passes through the momentum, as in common recipes; that of the optimizer would not.
    decay = keras.regularizers.L2(2.5e-4)

    def convolution(x, filters, size, strides=1):
        options = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
        return keras.layers.Conv2D(filters, size, strides, kernel_regularizer=decay, **options)(x)

    def activation(x):
        return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))

    def block(x, filters, strides):
        active = activation(x)
        changes = strides != 1 or x.shape[-1] != filters
        shortcut = convolution(active, filters, 1, strides) if changes else x
        x = convolution(activation(convolution(active, filters, 3, strides)), filters, 3)
        return keras.layers.Add()([x, shortcut])

    inputs = keras.Input(shape)
    x = convolution(inputs, width, 3)
    for stage in range(4):
        for number in range(blocks):
            x = block(x, width * 2**stage, 2 if stage > 0 and number == 0 else 1)
    x = keras.layers.GlobalAveragePooling2D()(activation(x))
    return keras.Model(inputs, keras.layers.Dense(10, kernel_regularizer=decay)(x))


class CroppedAndFlipped(keras.utils.PyDataset):
    """Give batches in random order, each image moved by up to four pixels and flipped or not."""

    def __init__(self, x, y, batch_size, seed):
        super().__init__()
        self.x = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        self.y, self.batch_size = y, batch_size
        self.size = x.shape[1]
        self.random = np.random.default_rng(seed)
        self.on_epoch_end()

    @property
    def num_batches(self):
        return math.ceil(len(self.y) / self.batch_size)

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.y))

    def __getitem__(self, number):
        rows = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        size = np.arange(self.size)
        top, left = self.random.integers(0, 9, (2, len(rows), 1))
        columns = np.where(self.random.random((len(rows), 1)) < 0.5, size, size[::-1])
        across = (left + columns)[:, None, :]
        return self.x[rows[:, None, None], (top + size)[:, :, None], across], self.y[rows]


class UpAndDown(keras.optimizers.schedules.LearningRateSchedule):
    """Raise the learning rate to a peak in the first two fifths of the steps, and lower it to 0 in the others."""

    def __init__(self, peak, steps):
        self.peak, self.steps = peak, steps

    def __call__(self, step):
        share = keras.ops.cast(step, "float32") / self.steps
        return self.peak * keras.ops.minimum(share / 0.4, (1 - share) / 0.6)

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps}
