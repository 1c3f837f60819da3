"""A training with a backup, which a test kills and resumes."""

import os
import signal

import keras
import numpy as np

import keras_drsl


class Kill(keras.callbacks.Callback):
    """Count the epochs, and kill the process in the second step of the third."""

    def __init__(self, is_killed):
        super().__init__()
        self.is_killed = is_killed
        self.epochs = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs += 1

    def on_train_batch_end(self, batch, logs=None):
        if self.is_killed and self.epochs == 3 and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, is_killed=False):
    """Train with a backup in a folder. Return the weights and the number of epochs that were run."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(24, 4)).astype("float32"), rng.integers(0, 3, 24)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dropout(0.3, seed=0), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    robust = keras_drsl.AdversarialTraining(model, 0.1, steps=2, warmup_epochs=3)
    robust.compile(keras.optimizers.Adam(0.01), keras_drsl.DRSLoss(from_logits=True))
    kill = Kill(is_killed)
    backup = keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"))
    robust.fit(x, y, epochs=5, batch_size=8, shuffle=False, verbose=0, callbacks=[backup, kill])
    return model.get_weights(), kill.epochs
