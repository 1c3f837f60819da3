"""
Title: Image classification that withstands small changes
Author: the keras-drsl authors
Date created: 2026/11/28
Last modified: 2026/11/28
Description: Train a classifier of digits on attacked images, and measure how robust it is.
Accelerator: GPU
"""

"""
## Introduction

A classifier with 99 % accuracy can be misled by changes that a person hardly sees. This example measures how many
images such changes mislead, and trains a model that withstands more of them. It uses keras-drsl, an add-on for Keras 3
that runs on TensorFlow, JAX and torch. Three parts of it appear here:

- `DRSLoss`, a loss that makes the wrong classes alike ([arXiv:2303.12363](https://arxiv.org/abs/2303.12363));
- `AdversarialTraining`, which wraps a model and attacks each batch before it learns from it;
- `evaluate_robustness`, which attacks a trained model in several ways, and checks whether the attacks can be trusted.
"""

"""
## Setup
"""

import keras
import numpy as np

import keras_drsl

keras.utils.set_random_seed(0)
EPS = 0.2  # by how much an attacker may change each pixel, on a scale from 0 to 1
EPOCHS = 3
TRAINING, TEST = 10_000, 200  # how many images

"""
## Data
"""

(x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
x_train = (x_train[:TRAINING, ..., None] / 255).astype("float32")
x_test = (x_test[:TEST, ..., None] / 255).astype("float32")
y_train, y_test = y_train[:TRAINING].astype("int32"), y_test[:TEST].astype("int32")

"""
## A model

It returns logits: attacks follow their gradient, and that of a softmax vanishes where the model is sure.
"""


def make_model():
    return keras.Sequential(
        [
            keras.Input(x_train.shape[1:]),
            keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


"""
## Usual training
"""

usual = make_model()
usual.compile(
    optimizer="adam",
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
usual.fit(x_train, y_train, batch_size=128, epochs=EPOCHS, verbose=2)

"""
## Training on attacked images

The wrapper shares the weights of the model. Each step attacks the batch, here with a single step along the gradient,
and learns from the attacked images. The first epochs use a smaller radius.
"""

robust = make_model()
training = keras_drsl.AdversarialTraining(
    robust, eps=EPS, method="fgsm", attack_loss="margin", warmup_epochs=EPOCHS // 2
)
training.compile(
    optimizer="adam",
    loss=keras_drsl.DRSLoss(lam=0.03, from_logits=True),
    metrics=["accuracy"],
)
training.fit(x_train, y_train, batch_size=128, epochs=EPOCHS, verbose=2)

"""
`accuracy` in the logs is that on attacked images of the training, and `clean_accuracy` that on the images as they are.

## How robust are they?

An image counts as robust if none of the attacks finds a misread image within the radius. The suite is `"standard"`, for
numbers to publish; `suite="fast"` is for work on a model.
"""

reports = {
    name: keras_drsl.evaluate_robustness(model, x_test, y_test, eps=EPS, keep_examples=True, verbose=0)
    for name, model in (("usual", usual), ("robust", robust))
}
for name, report in reports.items():
    low, high = report.confidence_interval
    print(
        f"{name}: {report.clean_accuracy:.1%} without an attack, {report.robust_accuracy:.1%} under attack "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )

"""
A robust accuracy is an upper bound, so a weak attack flatters a model. The report says whether there is a reason to
doubt it:
"""

print(reports["robust"])

"""
## The images that mislead

Each row of `x_adv` is the worst image that was found within the radius:
"""

report = reports["usual"]
changes = np.abs(report.x_adv - report.x)
print(f"largest change of a pixel: {changes.max():.3f}")
for row in range(3):
    print(f"image {row}: true {report.per_example['label'][row]}, read as {report.prediction[row]}")

"""
## What to try next

- `method="pgd"` attacks each batch in ten steps: slower, and more robust.
- `keras_drsl.RobustnessMonitor` measures the robust accuracy on validation images after each epoch.
- `keras_drsl.compare` says whether two models differ by more than chance.
"""
