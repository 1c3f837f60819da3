"""D5: what an evaluation compiles serves the next one, and never a model that has changed since."""

import copy
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl.models import find_logits
from tests.backends import needs_xla

X = np.random.default_rng(0).random((24, 6)).astype("float32")
Y = np.arange(24) % 3


@keras.saving.register_keras_serializable("tests")
class Traced(keras.layers.Layer):
    """A layer that counts how often a program that calls it is made."""

    count = 0

    def call(self, x):
        try:
            np.asarray(x)
        except Exception:  # a tensor without values
            type(self).count += 1
        return x


@pytest.fixture
def model():
    return make_model()


def make_model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="tanh"), Traced(), keras.layers.Dense(3, activation="softmax")]
    return keras.Sequential([keras.Input((6,)), *layers])


def outcome(model, **options):
    options = {"attacks": ["fgsm_margin"], "checks": []} | options
    return keras_drsl.evaluate_robustness(model, X, Y, eps=0.05, verbose=0, **options).per_example["broken_by"]


@pytest.mark.short
@needs_xla
def test_a_second_evaluation_compiles_nothing(model):
    options = {"attacks": ["fgsm_ce"], "checks": ["gradients"]}
    first = outcome(model, **options)
    count = Traced.count
    assert count > 0
    assert outcome(model, **options) == first
    keras_drsl.robustness_curve(model, X, Y, eps=[0.05], verbose=0, **options)
    assert Traced.count == count


@pytest.mark.short
def test_new_weights_are_seen(model):
    before = outcome(model)
    model.layers[-1].set_weights([-weights for weights in model.layers[-1].get_weights()])
    assert outcome(model) != before
    np.testing.assert_allclose(find_logits(model, X).model.logits(X), ops.convert_to_numpy(model(X)), atol=1e-6)


def change_activation(model):
    model.layers[0].activation = keras.activations.relu


def change_last_layer(model):
    model.pop()
    model.add(keras.layers.Dense(3, activation="softmax"))


def make_logits(model):
    model.layers[-1].activation = keras.activations.linear


@pytest.mark.short
@pytest.mark.parametrize("change", [change_activation, change_last_layer, make_logits])
def test_a_changed_model_is_compiled_anew(model, change):
    outcome(model)
    change(model)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert outcome(model) == outcome(twin)
    found = find_logits(model, X)
    assert found.outputs == ("logits" if change is make_logits else "softmax")
    np.testing.assert_allclose(found.model.logits(X), ops.convert_to_numpy(model(X)), atol=1e-6)


class Defended(keras.Model):
    def __init__(self):
        super().__init__()
        self.defend = False
        self.options = {"levels": [1.0]}
        self.dense = keras.layers.Dense(3, activation="softmax")

    def call(self, x):
        levels = self.options["levels"][0]
        return self.dense(ops.round(x * levels) / levels if self.defend else x)


@pytest.mark.short
def test_a_change_that_clean_inputs_do_not_show_is_seen():
    keras.utils.set_random_seed(0)
    x, model = np.round(X), Defended()
    y = ops.convert_to_numpy(model(x)).argmax(1)

    def robust():
        options = {"eps": 0.4, "attacks": ["pgd_margin"], "checks": [], "verbose": 0}
        return keras_drsl.evaluate_robustness(model, x, y, **options).robust_accuracy

    undefended = robust()
    model.defend = True
    assert robust() == 1.0 > undefended
    model.options["levels"][0] = 1000.0
    logits = find_logits(model, x).classifier.logits
    assert np.abs(logits(x + 0.1) - logits(x)).max() > 1e-3
    model.defend = False
    assert robust() == undefended


def test_an_evaluated_model_is_saved_and_copied_as_before(model, tmp_path):
    model.save(tmp_path / "before.keras")
    outcome(model)
    model.save(tmp_path / "after.keras")
    for name in ("before", "after"):
        again = keras.models.load_model(tmp_path / f"{name}.keras")
        np.testing.assert_array_equal(ops.convert_to_numpy(again(X)), ops.convert_to_numpy(model(X)))
    twin = copy.deepcopy(model)
    twin.layers[-1].set_weights([np.zeros((8, 3)), np.array([1.0, 0, 0])])
    np.testing.assert_allclose(ops.convert_to_numpy(find_logits(twin, X).model(X)).argmax(1), 0)


def test_an_evaluated_model_leaves_no_memory():
    model = make_model()
    outcome(model)
    layers = weakref.ref(model.layers[0])
    del model
    keras.backend.clear_session()
    gc.collect()
    assert layers() is None
