import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_drsl.evaluation.head import find_logits, fingerprint
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
    weights[0][0, 0] += 1e-6
    model.set_weights(weights)
    assert fingerprint(model) != before
