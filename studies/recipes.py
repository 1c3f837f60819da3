"""How the studies train: recipes by data set, losses by name, and one function that fits a model."""

import math

import keras
import numpy as np

import keras_drsl
from studies import networks

# Training without attacks, by data set. `eps` is the radius of the attacks on the finished models.
PLAIN = {
    "digits": {"epochs": 30, "batch_size": 64, "eps": 0.15},
    "mnist": {"epochs": 4, "batch_size": 128, "eps": 0.1},
    "cifar10": {"epochs": 10, "batch_size": 128, "eps": 2 / 255},
}
# Adversarial training, by data set. No model learns from the `validation` images. With `peak`, the learning rate rises
# to it and falls to 0. With `augment`, the images are cropped and flipped at random.
ADVERSARIAL = {
    "digits": {"network": "cnn", "epochs": 30, "warmup_epochs": 10, "batch_size": 64, "eps": 0.15, "validation": 240},
    "mnist": {"network": "cnn", "epochs": 20, "warmup_epochs": 5, "batch_size": 128, "eps": 0.3, "validation": 500,
              "peak": 0.002},
    "cifar10": {"network": "small_resnet", "epochs": 30, "warmup_epochs": 0, "batch_size": 128, "eps": 8 / 255,
                "validation": 1000, "optimizer": "sgd", "peak": 0.1, "augment": True},
}  # fmt: skip


def make_loss(name, lam):
    """Return a loss of class ids and logits: `"ce"`, `"ls"` (label smoothing 0.1) or `"drs"`."""
    if name == "ce":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Without restraint, DRSLoss is the cross-entropy. Keras's own takes no label smoothing for class ids.
    options = {"lam": lam} if name == "drs" else {"lam": 0.0, "label_smoothing": 0.1}
    return keras_drsl.DRSLoss(**options, from_logits=True)


def split(data, count, seed):
    """Return all but `count` examples, drawn at random, and those."""
    order = np.random.default_rng(seed).permutation(len(data[0]))
    return tuple(part[order[count:]] for part in data), tuple(part[order[:count]] for part in data)


def fit(recipe, train, method, loss, seed, *, callbacks=(), verbose=0):
    """Train a model on images `(x, y)` by a recipe; `method` as `AdversarialTraining` takes it.

    Returns:
        The model and its history.
    """
    keras.utils.set_random_seed(seed)
    x, y = train
    model = networks.build(recipe["network"], x.shape[1:])
    names = ("steps", "step_size", "beta", "attack_loss")
    options = {name: recipe[name] for name in names if recipe.get(name) is not None}
    robust = keras_drsl.AdversarialTraining(
        model,
        recipe.get("training_eps", recipe["eps"]),
        method=method,
        warmup_epochs=recipe["warmup_epochs"],
        seed=seed,
        **options,
    )
    data = {"x": x, "y": y, "batch_size": recipe["batch_size"]}
    if recipe.get("augment"):
        data = {"x": networks.CroppedAndFlipped(x, y, recipe["batch_size"], seed)}
    rate = 0.001
    if recipe.get("peak"):
        rate = networks.UpAndDown(recipe["peak"], recipe["epochs"] * math.ceil(len(x) / recipe["batch_size"]))
    sgd = recipe.get("optimizer") == "sgd"
    average = {"use_ema": True, "ema_momentum": recipe["ema"]} if recipe.get("ema") else {}
    optimizer = keras.optimizers.SGD(rate, momentum=0.9) if sgd else keras.optimizers.Adam(rate, **average)
    robust.compile(optimizer, loss, metrics=["accuracy"])
    history = robust.fit(**data, epochs=recipe["epochs"], callbacks=list(callbacks), verbose=verbose)
    return model, history.history
