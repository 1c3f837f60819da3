import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_drsl.attacks.classifier import fingerprint
from keras_drsl.evaluation.head import find_logits
from tests.backends import BACKEND
from tests.linear import WEIGHTS, inputs, linear_model


def set_weights(layer):
    layer.set_weights([WEIGHTS * 30, np.zeros(3)])


def sequential():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])


def softmax_layer():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Softmax()])


def activation_layer():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Activation("softmax")])


def functional():
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(3, activation="softmax")(layers.Reshape((4,))(x)))


def nested():
    x = keras.Input((4,))
    return keras.Model(x, softmax_layer()(layers.Reshape((4,))(x)))


def twice_nested():
    return keras.Sequential([keras.Input((4,)), keras.Sequential([keras.Input((4,)), softmax_layer()])])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, activation="softmax")

    def call(self, x):
        return self.head(x)


class Computed(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return ops.softmax(self.head(x))


class Spoiled(keras.Model):
    """Probabilities that no softmax ends with."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return ops.softmax(self.head(x)) * 1.0 + 0.0


def ensemble():
    """Two heads whose probabilities are averaged: neither's logits are those of the whole."""
    x = keras.Input((4,))
    return keras.Model(x, layers.Average()([layers.Dense(3, activation="softmax")(x) for _ in range(2)]))


class Guarded(keras.Model):
    """A softmax whose small values are cut off."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, activation="softmax")

    def call(self, x):
        p = self.head(x)
        p = ops.where(p < 0.05, 0.0, p)
        return p / ops.sum(p, axis=-1, keepdims=True)


@pytest.mark.parametrize("build", [ensemble, Guarded])
def test_what_only_looks_like_the_logits_is_not_taken_for_them(build):
    x, _ = inputs(20)
    model = build()
    model(x)
    model.set_weights([3 * weight for weight in model.get_weights()])
    assert find_logits(model, x, None).kind == "probabilities"


@pytest.mark.parametrize(
    "build", [sequential, softmax_layer, activation_layer, functional, nested, twice_nested, Subclassed, Computed]
)
def test_logits_are_found_behind_a_softmax(build):
    x, _ = inputs(20)
    model = build()
    model(x)
    weights = model.get_weights()
    model.set_weights([WEIGHTS * 30, weights[1] * 0])
    head = find_logits(model, x, None)
    if build is Computed and BACKEND != "tensorflow":
        # Only a TensorFlow graph can be asked what made a tensor.
        assert head.kind == "probabilities"
        return
    assert head.kind == "softmax"
    np.testing.assert_allclose(head.classifier.logits(x), x @ (WEIGHTS * 30), rtol=1e-4, atol=1e-4)
    model.set_weights([WEIGHTS * 10, weights[1] * 0])
    np.testing.assert_allclose(head.classifier.logits(x), x @ (WEIGHTS * 10), rtol=1e-4, atol=1e-4)


def test_where_they_are_not_log_probabilities_stand_in():
    x, _ = inputs(20)
    model = Spoiled()
    model(x)
    head = find_logits(model, x, None)
    assert head.kind == "probabilities"
    outputs = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(head.classifier.logits(x), np.log(outputs), rtol=1e-4, atol=1e-5)


def test_logits_are_taken_as_they_are():
    x, _ = inputs(20)
    assert find_logits(linear_model(), x, None).kind == "logits"
    assert find_logits(linear_model(), x, True).kind == "logits"
    assert find_logits(softmax_layer(), x, False).kind == "softmax"


def test_the_fingerprint_is_that_of_the_weights(tmp_path):
    model = softmax_layer()
    before = fingerprint(model)
    model.save(tmp_path / "model.keras")
    assert fingerprint(keras.models.load_model(tmp_path / "model.keras")) == before
    weights = model.get_weights()
    other = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Softmax(axis=1)])
    other.set_weights(weights)
    assert fingerprint(other) != before  # the same weights in other layers
    weights[0][0, 0] += 1e-6
    model.set_weights(weights)
    assert fingerprint(model) != before
