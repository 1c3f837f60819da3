"""A training with a backup, which a test stops and resumes."""

import os
import signal

import keras
import numpy as np

import keras_drsl


class StoppedError(Exception):
    """The training was stopped."""


def fail():
    raise StoppedError


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Stop(keras.callbacks.Callback):
    """Count the epochs, and stop in the second step of the third."""

    def __init__(self, stop):
        super().__init__()
        self.stop = stop
        self.epochs = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs += 1

    def on_train_batch_end(self, batch, logs=None):
        if self.epochs == 3 and batch == 1 and self.stop is not None:
            self.stop()


def train(folder, stop=None):
    """Train with a backup in a folder. Return the weights and the number of epochs that were run."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(24, 4)).astype("float32"), rng.integers(0, 3, 24)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dropout(0.3, seed=0), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    robust = keras_drsl.AdversarialTraining(model, 0.1, steps=2, warmup_epochs=3)
    robust.compile(keras.optimizers.Adam(0.01), keras_drsl.DRSLoss(from_logits=True))
    stopped = Stop(stop)
    backup = keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"))
    robust.fit(x, y, epochs=5, batch_size=8, shuffle=False, verbose=0, callbacks=[backup, stopped])
    return model.get_weights(), stopped.epochs
