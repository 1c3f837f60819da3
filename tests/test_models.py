import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl.attacks import PGD
from keras_drsl.models import find_logits, fingerprint
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


def functional_op():
    x = keras.Input((4,))
    return keras.Model(x, ops.softmax(layers.Dense(3)(x)))


class Wrapped(keras.Model):
    """A softmax model inside another model."""

    def __init__(self):
        super().__init__()
        self.inner = softmax_layer()

    def call(self, x):
        return self.inner(x)


class Spoiled(keras.Model):
    """Probabilities after further operations on a softmax."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return ops.softmax(self.head(x)) * 1.0 + 0.0


def average_op():
    """Two softmax models whose outputs are averaged by operators."""
    x = keras.Input((4,))
    first, second = softmax_layer(), softmax_layer()
    return keras.Model(x, (first(x) + second(x)) / 2)


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


@pytest.mark.parametrize("build", [average_op, ensemble, Guarded])
@pytest.mark.short
def test_false_logits_are_not_taken(build):
    x, _ = inputs(20)
    model = build()
    model(x)
    model.set_weights([3 * weight for weight in model.get_weights()])
    assert find_logits(model, x, None).outputs == "probabilities"


@pytest.mark.parametrize(
    "build",
    [
        *(sequential, softmax_layer, activation_layer, functional, functional_op, nested, twice_nested),
        *(Subclassed, Computed, Wrapped),
    ],
)
@pytest.mark.short
def test_logits_are_found_behind_a_softmax(build):
    x, _ = inputs(20)
    model = build()
    model(x)
    weights = model.get_weights()
    model.set_weights([WEIGHTS * 30, weights[1] * 0])
    found = find_logits(model, x, None)
    assert found.outputs == "softmax"
    np.testing.assert_allclose(found.classifier.logits(x), x @ (WEIGHTS * 30), rtol=1e-4, atol=1e-4)
    model.set_weights([WEIGHTS * 10, weights[1] * 0])
    np.testing.assert_allclose(found.classifier.logits(x), x @ (WEIGHTS * 10), rtol=1e-4, atol=1e-4)


def test_log_probabilities_replace_missing_logits():
    x, _ = inputs(20)
    model = Spoiled()
    model(x)
    found = find_logits(model, x, None)
    assert found.outputs == "probabilities"
    outputs = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(found.classifier.logits(x), np.log(outputs), rtol=1e-4, atol=1e-5)


def test_logit_outputs_are_taken_as_they_are():
    x, _ = inputs(20)
    assert find_logits(linear_model(), x, None).outputs == "logits"
    assert find_logits(linear_model(), x, True).outputs == "logits"
    assert find_logits(softmax_layer(), x, False).outputs == "softmax"


def test_the_fingerprint_tells_models_apart(tmp_path):
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


@pytest.mark.short
def test_adversarial_training_has_the_logits_of_its_model():
    x, _ = inputs(20)
    model = keras_drsl.AdversarialTraining(softmax_layer(), 0.1)
    found = find_logits(model, x)
    assert found.outputs == "softmax"
    np.testing.assert_allclose(found.classifier.logits(x), find_logits(model.model, x).classifier.logits(x), atol=1e-6)


@pytest.mark.parametrize("build", [sequential, Subclassed])
def test_other_threads_may_call_the_model_meanwhile(build):
    x, y = inputs(40)
    model = build()
    expected = ops.convert_to_numpy(model(x))
    wrong, done = [], threading.Event()

    def call():
        while not done.is_set():
            wrong.append(not np.allclose(ops.convert_to_numpy(model(x)), expected, atol=1e-5))

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(3):
            found = find_logits(model, x)
            assert found.outputs == "softmax"
            PGD(0.1, steps=3)(found.classifier, x, y)
    finally:
        done.set()
        caller.join()
    assert wrong
    assert not any(wrong)


def test_two_evaluations_of_one_model_in_two_threads_agree():
    x, y = inputs(40)
    model = sequential()
    options = {"eps": 0.1, "suite": "quick", "verbose": 0}
    expected = keras_drsl.evaluate_robustness(model, x, y, **options).per_example
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(keras_drsl.evaluate_robustness, model, x, y, **options) for _ in range(2)]
        assert [call.result().per_example for call in calls] == [expected] * 2
