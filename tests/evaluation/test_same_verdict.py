"""One function gets one verdict, in whatever form, precision, batch size and order it is given."""

import json
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import evaluate_robustness
from keras_drsl.attacks import APGD
from tests.helpers import some_short
from tests.linear import WEIGHTS, distance, inputs

EPS = 0.08


def softmax(z):
    return ops.softmax(z, axis=-1)


def halves(z):
    """Return two softmaxes of other temperatures. Their average has the order of the logits, so the same classes."""
    return [softmax(z), softmax(2 * z)]


# What a model does with its logits. None of it changes the predicted class of any input.
HEADS = {
    "logits": lambda z: z,
    "logits x 300": lambda z: 300 * z,
    "softmax op": softmax,
    "softmax layer": layers.Softmax(),
    "activation": layers.Activation("softmax"),
    "keras activation": keras.activations.softmax,
    "saturated softmax": lambda z: softmax(300 * z),
    "temperature": lambda z: softmax(z / 3),
    "average op": lambda z: sum(halves(z)) / 2,
    "average layer": lambda z: layers.Average()(halves(z)),
    "stacked mean": lambda z: ops.mean(ops.stack(halves(z)), axis=0),
    "weighted": lambda z: 0.3 * halves(z)[0] + 0.7 * halves(z)[1],
    "saturated average": lambda z: sum(halves(300 * z)) / 2,
}


class End(layers.Layer):
    """A layer that applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


class Subclassed(keras.Model):
    """A model that is not a graph of layers."""

    def __init__(self, head):
        super().__init__()
        self.dense = layers.Dense(3)
        self.head = head

    def call(self, x):
        return self.head(self.dense(x))


def functional(head):
    x = keras.Input((4,))
    return keras.Model(x, head(layers.Dense(3)(x)))


def sequential(head):
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), End(head)])


def nested(head):
    return keras.Sequential([keras.Input((4,)), keras.Sequential([functional(head)])])


class Wrapped(keras.Model):
    """A functional model inside another model."""

    def __init__(self, head):
        super().__init__()
        self.inner = functional(head)

    def call(self, x):
        return self.inner(x)


FORMS = {
    "functional": functional,
    "sequential": sequential,
    "nested": nested,
    "subclassed": Subclassed,
    "wrapped": Wrapped,
    "training": lambda head: keras_drsl.AdversarialTraining(functional(head), EPS),
}


# The cells that run on all backends in each run of the tests.
SHORT = [
    ("softmax op", "subclassed"),
    ("average layer", "training"),
    ("weighted", "wrapped"),
    ("saturated average", "nested"),
]
CELLS = [
    pytest.param(head, form, marks=pytest.mark.short if (head, form) in SHORT else pytest.mark.more)
    for head in HEADS
    for form in FORMS
]


@pytest.mark.parametrize(("head", "form"), CELLS)
def test_each_form_of_a_linear_model_is_exact(head, form):  # B2, B3, B6
    x, y = inputs(40)
    sizes = distance(x, y, "inf")
    clear = np.abs(sizes - EPS) > 0.005
    x, y, sizes = x[clear][:16], y[clear][:16], sizes[clear][:16]
    model = FORMS[form](HEADS[head])
    model(x)
    kernel = next(variable for variable in model.trainable_variables if variable.shape == WEIGHTS.shape)
    kernel.assign(WEIGHTS)
    attack = APGD(EPS, loss="margin", targeted=True, steps=10)
    checks = ["outputs", "independent_rows"]
    report = evaluate_robustness(model, x, y, eps=EPS, attacks=[attack], checks=checks, verbose=0)
    assert 4 <= (sizes > EPS).sum() <= 12
    assert [name is None for name in report.per_example["broken_by"]] == (sizes > EPS).tolist()
    assert report.clean_accuracy == 1.0
    assert report.trustworthy
    assert report.settings["outputs"] == ("logits" if "logits" in head else "softmax")


FIXTURES = Path(__file__).parents[1] / "fixtures"
ATTACKS = {"attacks": ["pgd_margin", partial(APGD, loss="margin", targeted=True, targets=3, steps=20)], "checks": []}


@pytest.fixture(scope="module")
def digits():
    """Return a trained convolutional model that ends in a softmax, and 100 images with labels."""
    pytest.importorskip("sklearn")
    model = keras.models.load_model(FIXTURES / "digits_0.1.keras", compile=False)
    _, (x, y) = keras_drsl.datasets.load("digits")
    return model, x[:100], y[:100]


def robust(model, x, y, **options):
    report = evaluate_robustness(model, x, y, eps=0.12, verbose=0, **ATTACKS, **options)
    return np.array([name is None for name in report.per_example["broken_by"]])


@pytest.fixture(scope="module")
def verdicts(digits):
    """Return which images are robust, as the running backend finds."""
    return robust(*digits)


@pytest.mark.short
def test_all_backends_give_the_stored_verdicts(verdicts):
    # Written on TensorFlow by tests/fixtures/make_verdicts.py.
    stored = np.array(json.loads((FIXTURES / "digits_verdicts.json").read_text()))
    assert 20 <= stored.sum() <= 80
    assert (verdicts != stored).sum() <= 1


class Called(keras.Model):
    """A model that calls the layers of another one, and returns logits or probabilities."""

    def __init__(self, model, *, softmax):
        super().__init__()
        self.inner = model.layers if softmax else model.layers[:-1]

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def shared_functional(model):
    x = keras.Input((8, 8, 1))
    z = x
    for layer in model.layers[:-1]:
        z = layer(z)
    return keras.Model(x, ops.softmax(z))


OTHER_FORMS = {
    "functional op": shared_functional,
    "nested": lambda model: keras.Sequential([keras.Input((8, 8, 1)), model]),
    "subclassed": lambda model: Called(model, softmax=True),
    "logits": lambda model: Called(model, softmax=False),
    "average with itself": lambda model: Mean(model),
}


class Mean(keras.Model):
    """The average of a model with itself."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def call(self, x):
        return (self.inner(x) + self.inner(x)) / 2


@pytest.mark.parametrize("form", some_short(OTHER_FORMS, more=[*OTHER_FORMS][2:]))
def test_other_forms_of_a_trained_model_agree(digits, verdicts, form):
    model, x, y = digits
    np.testing.assert_array_equal(robust(OTHER_FORMS[form](model), x, y), verdicts)


def in_precision(model, policy):
    """Return a copy of a model that computes in another precision."""
    keras.config.set_dtype_policy(policy)
    try:
        config = model.get_config()
        for layer in config["layers"]:
            layer["config"].pop("dtype", None)
        copy = keras.Sequential.from_config(config)
    finally:
        keras.config.set_dtype_policy("float32")
    copy.set_weights(model.get_weights())
    return copy


# Batch size, order and precision, each pair of values at least once. `make test` has one case of equal precision, and
# one of small batches in half precision, on some of the images.
@pytest.mark.parametrize(
    ("batch_size", "order", "policy", "count"),
    [
        (256, "shuffled", "float32", 100),
        pytest.param(256, "sorted", "mixed_float16", 100, marks=pytest.mark.more),
        pytest.param(256, "given", "mixed_bfloat16", 100, marks=pytest.mark.more),
        pytest.param(7, "given", "float32", 100, marks=pytest.mark.more),
        pytest.param(7, "shuffled", "mixed_float16", 100, marks=pytest.mark.more),
        (7, "sorted", "mixed_bfloat16", 50),
        pytest.param(1, "sorted", "float32", 20, marks=pytest.mark.more),
        pytest.param(1, "sorted", "float32", 100, marks=pytest.mark.more),
        pytest.param(1, "given", "mixed_float16", 100, marks=pytest.mark.more),
        pytest.param(1, "shuffled", "mixed_bfloat16", 100, marks=pytest.mark.more),
    ],
)
def test_batches_order_and_precision_do_not_matter(digits, verdicts, batch_size, order, policy, count):
    model, x, y = digits
    x, y, verdicts = x[:count], y[:count], verdicts[:count]
    model = model if policy == "float32" else in_precision(model, policy)
    rows = np.arange(len(x))
    if order != "given":
        rows = np.argsort(y, kind="stable") if order == "sorted" else np.random.default_rng(0).permutation(len(x))
    found = robust(model, x[rows], y[rows], batch_size=batch_size)
    changed = int((found != verdicts[rows]).sum())
    if batch_size == 256 and policy == "float32":
        assert changed == 0
    elif policy == "float32":
        assert changed <= 1
    assert abs(int(found.sum()) - int(verdicts.sum())) <= 1
