import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import evaluate_robustness, robustness_curve
from keras_drsl.attacks import PGD, Attack, Square
from keras_drsl.models import Classifier, find_logits, fingerprint
from keras_drsl.models.state import preserve_state
from tests.backends import BACKEND, on_tensorflow, on_torch
from tests.helpers import few_of, some_short
from tests.linear import WEIGHTS, distance, inputs, linear_model


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


class Rounded(keras.Model):
    """Probabilities in steps."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return ops.round(ops.softmax(self.head(x)) * 1000) / 1000


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


@pytest.mark.parametrize("build", [average_op, ensemble])
@pytest.mark.short
def test_averages_have_exact_logarithms(build):  # B2, B3
    x, _ = inputs(20)
    model = build()
    model.set_weights([200 * weight for weight in model.get_weights()])
    found = find_logits(model, x, None)
    assert found.outputs == "softmax"
    kernels = [np.asarray(weight, "float64") for weight in model.get_weights() if weight.ndim == 2]
    assert np.abs(x @ kernels[0]).max() > 100
    logs = []
    for kernel in kernels:
        z = x @ kernel
        z = z - z.max(axis=1, keepdims=True)
        logs.append(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
    largest = np.maximum(*logs)
    expected = largest + np.log(sum(np.exp(log - largest) for log in logs) / 2)
    np.testing.assert_allclose(found.classifier.logits(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("build", [Rounded, Guarded])
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


@on_tensorflow
@pytest.mark.parametrize(
    ("build", "jit_compile"),
    few_of(
        [Subclassed, Computed, average_op, Rounded],
        [False, True],
        keep=[(Subclassed, False), (average_op, True), (Rounded, False)],
    ),
)
def test_logits_are_found_inside_a_function_of_tensorflow(build, jit_compile):
    import tensorflow as tf

    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = build()
            self.compiled = tf.function(lambda x: self.inner(x), jit_compile=jit_compile)

        def call(self, x):
            return self.compiled(x)

    x, _ = inputs(20)
    model = Compiled()
    model(x)
    expected, found = find_logits(model.inner, x), find_logits(model, x)
    assert found.outputs == expected.outputs == ("probabilities" if build is Rounded else "softmax")
    np.testing.assert_allclose(found.classifier.logits(x), expected.classifier.logits(x), rtol=1e-5, atol=1e-6)


@on_tensorflow
def test_logits_are_found_while_functions_run_eagerly():
    import tensorflow as tf

    x, _ = inputs(20)
    model = nested()
    expected = find_logits(model, x).classifier.logits(x)
    again = keras.models.clone_model(model)  # it keeps no compiled program
    again.set_weights(model.get_weights())
    tf.config.run_functions_eagerly(True)
    try:
        found = find_logits(again, x)
        assert found.outputs == "softmax"
        np.testing.assert_allclose(found.classifier.logits(x), expected, atol=1e-5)
    finally:
        tf.config.run_functions_eagerly(False)


def test_log_probabilities_replace_missing_logits():
    x, _ = inputs(20)
    model = Rounded()
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


@pytest.mark.parametrize("build", [sequential, pytest.param(Wrapped, marks=pytest.mark.short)])
def test_two_threads_evaluate_one_model_ten_times(build):  # B8
    x, y = inputs(24)
    model = build()
    model(x)
    options = {"eps": 0.1, "attacks": ["fgsm_ce", "pgd_margin"], "suite": "quick", "verbose": 0}
    expected = keras_drsl.evaluate_robustness(model, x, y, **options)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            calls = [pool.submit(keras_drsl.evaluate_robustness, model, x, y, **options) for _ in range(2)]
            for report in (call.result() for call in calls):
                assert report.per_example == expected.per_example
                assert report.checks == expected.checks


def test_equal_probabilities_follow_their_logits():
    x, y = inputs(10)[0], np.zeros(10, int)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, dtype="float16"), layers.Softmax(dtype="float16")])
    model.layers[0].set_weights([np.zeros((4, 2)), np.array([0.0, 1e-4])])  # so both probabilities are 0.5 in float16
    assert find_logits(model, x).misclassifies(x, y, 10).all()
    report = evaluate_robustness(model, x, y, eps=0.1, attacks=["noise"], checks=["clean_accuracy"], verbose=0)
    assert report.clean_accuracy == report.checks[0].value == 1.0  # the model's own answer
    assert report.robust_accuracy == 0.0


class Stateful(keras.Model):
    """A model that counts its calls, and changes its moving statistics and a random state in each."""

    def __init__(self):
        super().__init__()
        self.normalize = layers.BatchNormalization()
        self.dense = layers.Dense(3)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int32")
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        self.calls.assign_add(1.0)
        self.count.assign_add(1)
        noise = keras.random.normal(ops.shape(x), seed=self.seed)
        return self.dense(self.normalize(x + 0.01 * noise, training=True)) + 0.01 * self.calls

    def held(self):
        return [ops.convert_to_numpy(variable).tolist() for variable in self.variables]


class Fails(Attack):
    def run(self, classifier, batch):
        classifier(ops.convert_to_tensor(batch.x))
        raise RuntimeError("no")


EVALUATIONS = {
    "find_logits": lambda model, x, y: find_logits(model, x),
    "attack": lambda model, x, y: PGD(0.1, steps=2)(model, x, y),
    "evaluation": lambda model, x, y: evaluate_robustness(model, x, y, eps=0.1, suite="quick", verbose=0),
    "curve": lambda model, x, y: robustness_curve(model, x, y, eps=[0, 0.1], suite="quick", verbose=0),
    "undefended": lambda model, x, y: evaluate_robustness(
        linear_model(), x, y, undefended=model, eps=0.1, suite="quick", attacks=["fgsm_ce"], verbose=0
    ),
    "failing attack": lambda model, x, y: Fails(0.1)(model, x, y),
    "failing evaluation": lambda model, x, y: evaluate_robustness(
        model, x, y, eps=0.1, attacks=[Fails(0.1)], verbose=0
    ),
}


@pytest.mark.parametrize("name", some_short(EVALUATIONS, "attack", "failing evaluation", more=["evaluation", "curve"]))
def test_all_that_a_model_holds_is_put_back(name):  # B1
    x, y = inputs(20)
    model = Stateful()
    model(x)
    before = model.held()
    with pytest.raises(RuntimeError, match="no") if "failing" in name else nullcontext():
        EVALUATIONS[name](model, x, y)
    assert model.held() == before
    model(x)
    assert model.held() != before


def test_a_model_that_was_never_called_is_put_back():  # B1
    x, y = inputs(20)
    model = Stateful()
    evaluate_robustness(model, x, y, eps=0.1, attacks=["fgsm_ce"], checks=[], verbose=0)
    assert model.held()[:3] == [0.0, 0, [0, 0]]
    assert ops.convert_to_numpy(model.normalize.moving_mean).tolist() == [0.0] * 4
    assert ops.convert_to_numpy(model.normalize.moving_variance).tolist() == [1.0] * 4


class Native(keras.Model):
    """A model that counts its calls in a variable of the backend, which Keras does not list."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            self.count = tf.Variable(0.0)
        else:
            import torch

            self.register_buffer("count", torch.zeros(()))

    def call(self, x):
        if BACKEND == "tensorflow":
            self.count.assign_add(1.0)
        else:
            self.count += 1
        return self.dense(x) + self.count


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no variables of its own")
@pytest.mark.short
def test_variables_of_the_backend_are_put_back():  # B1
    x, y = inputs(20)
    model = Native()
    model(x)
    before = float(model.count)
    report = evaluate_robustness(model, x, y, eps=0.1, attacks=["fgsm_ce"], checks=["deterministic"], verbose=0)
    assert float(model.count) == before
    assert not report.trustworthy


@on_tensorflow
def test_variables_of_tensorflow_in_containers_are_put_back():  # B1
    import tensorflow as tf

    model = Native()
    model.more, model.source = {"a": [tf.Variable(1)]}, tf.random.Generator.from_seed(0)
    model(inputs(2)[0])
    before = model.source.state.numpy()
    with preserve_state(model):
        model.more["a"][0].assign(5)
        model.source.normal(())
    assert int(model.more["a"][0]) == 1
    np.testing.assert_array_equal(model.source.state.numpy(), before)


@pytest.mark.short
def test_overlapping_calls_restore_what_the_first_one_found():  # B1
    model = Stateful()
    model(inputs(2)[0])
    before = model.held()
    first, second = preserve_state(model), preserve_state(Classifier(model))
    first.__enter__()
    model(inputs(2)[0])
    second.__enter__()
    model(inputs(2)[0])
    first.__exit__(None, None, None)
    assert model.held() != before
    second.__exit__(None, None, None)
    assert model.held() == before


@on_torch
@pytest.mark.short
def test_an_answer_written_in_place_is_no_softmax():
    class InPlace(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            p = ops.softmax(self.dense(x))
            p[x[:, 0] > 0.5] = ops.convert_to_tensor([1.0, 0.0, 0.0])
            return p

    x = inputs(20)[0]
    found = find_logits(InPlace(), x)
    assert found.outputs == "probabilities"
    assert not found.misclassifies(x, found.model.logits(x).argmax(1), 20).any()


def test_a_monitor_leaves_the_state_as_it_is():  # B1
    x, y = inputs(20)
    model = Stateful()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model(x)
    monitor = keras_drsl.RobustnessMonitor(x, y, eps=0.1)
    monitor.set_model(model)
    monitor.set_params({"epochs": 1})
    before = model.held()
    monitor.on_train_begin()
    monitor.on_epoch_end(0, {})
    assert monitor.report is not None
    assert model.held() == before


def one_output(outputs):
    x = keras.Input((4,))
    return keras.Model(x, outputs(layers.Dense(3)(x)))


def stateful_rnn():
    return keras.Sequential([keras.Input(batch_shape=(5, 4)), layers.Reshape((4, 1)), layers.LSTM(3, stateful=True)])


class Recurrent(keras.Model):
    """A recurrent model with a state, whose batch size is that of the first call."""

    def __init__(self):
        super().__init__()
        self.recurrent = layers.SimpleRNN(3, stateful=True)

    def call(self, x):
        return self.recurrent(x[:, :, None])


def two_inputs():
    first, second = keras.Input((4,)), keras.Input((4,))
    return keras.Model([first, second], layers.Dense(3)(first + second))


# Models that cannot be attacked, and what the error says.
UNUSUAL = {
    # The first message is that of an attack by itself, which takes a model as it is.
    "dictionary": (
        lambda: one_output(lambda z: {"a": z, "b": z}),
        "`model` must have one output.*keys .'a', 'b'|`output` must name one of the outputs of `model`: 'a', 'b'",
    ),
    "list": (
        lambda: one_output(lambda z: [z, z]),
        "`model` must have one output. Received: outputs of type list|`output` must name one .* of `model`: 0, 1",
    ),
    "a matrix": (
        lambda: keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Reshape((2, 3))]),
        r"outputs of shape \(batch, classes >= 2\).* Received: \(1, 2, 3\)",
    ),
    "two inputs": (
        two_inputs,
        "`attack_input` must name one of|`model` must take batches .* It has 2 inputs. Received: ValueError",
    ),
    "stateful": (stateful_rnn, "`model` must take batches of any size.*'lstm.*' is stateful"),
    "stateful subclass": (Recurrent, "`model` must take batches of any size.*'simple_rnn.*' is stateful"),
    "one image": (
        lambda: keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(3)]),
        r"It takes inputs of shape \(4, 4, 1\). For one input, give `x\[None\]`",
    ),
    "another shape": (lambda: keras.Sequential([keras.Input((5,)), layers.Dense(3)]), r"here inputs of shape \(1, 4\)"),
}


@pytest.mark.parametrize("name", some_short(UNUSUAL, "a matrix", "stateful"))
def test_unusual_models_are_one_clear_error(name):  # B9
    x, y = inputs(10)
    build, message = UNUSUAL[name]
    model = build()
    calls = [
        lambda: evaluate_robustness(model, x, y, eps=0.1, verbose=0),
        lambda: robustness_curve(model, x, y, eps=[0.1], verbose=0),
        lambda: PGD(0.1)(model, x, y),
        lambda: find_logits(model, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "Exception encountered" not in str(caught.value)
        assert "\n" not in str(caught.value)


# Inputs and labels in a form that is not taken, and what the error says.
UNUSUAL_DATA = {
    "dictionary": (
        lambda x, y: ({"pixels": x}, y),
        r"one array of inputs.*Received: a dictionary with keys \['pixels'\]",
    ),
    "list": (lambda x, y: ([x], y), r"one array of inputs.*Received: a list of 1 arrays, of shapes \(10, 4\)"),
    "pair": (lambda x, y: ((x, x), y), r"one array of inputs.*Received: a tuple of 2 arrays"),
    "labels by name": (lambda x, y: (x, {"class": y}), r"a dictionary with keys \['class'\]"),
    "labels in a list": (lambda x, y: (x, [keras.utils.to_categorical(y, 3)]), r"a list of 1 arrays"),
    "one input": (
        lambda x, y: (x[0], y[0]),
        r"`y` must hold one label for each input. For one example, give `x\[None\]`",
    ),
    "one input, a list of one label": (lambda x, y: (x[0], y[:1]), r"For one example, give `x\[None\]`"),
    "ragged": (lambda x, y: ([[0.1, 0.2], [0.3]], y[:2]), "rows of equal length"),
    "ragged labels": (lambda x, y: (x[:2].tolist(), [[0, 1], [2]]), "rows of equal length"),
    "names": (lambda x, y: (x, ["cat"] * 10), r"class ids"),
}


@pytest.mark.parametrize("name", UNUSUAL_DATA)
def test_unusual_data_are_one_clear_error(name):  # B9
    convert, message = UNUSUAL_DATA[name]
    model = linear_model()
    x, y = convert(*inputs(10))
    calls = [
        lambda: evaluate_robustness(model, x, y, eps=0.1, verbose=0),
        lambda: robustness_curve(model, x, y, eps=[0.1], verbose=0),
        lambda: PGD(0.1)(model, x, y),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("wrap", [lambda x: x, list, tuple])
def test_lists_of_inputs_and_one_hot_labels_are_taken(wrap):
    x, y = inputs(10)
    labels = keras.utils.to_categorical(y, 3)
    reports = [
        evaluate_robustness(linear_model(), inputs, labels, eps=0.1, attacks=["fgsm_ce"], checks=[], verbose=0)
        for inputs in (wrap(x), wrap(x.tolist()))
    ]
    assert [report.per_example["label"] for report in reports] == [y.tolist()] * 2


@pytest.mark.short
def test_functions_that_return_arrays_are_refused():  # B9
    x, y = inputs(10)
    model = linear_model()
    for function in (model.predict, lambda x: model.predict(x, verbose=0), lambda x: np.asarray(x) @ WEIGHTS):
        with pytest.raises(ValueError, match="`logits_fn` must return a tensor.*not its `predict`.*NumPy array"):
            PGD(0.1)(function, x, y)


@pytest.fixture
def float64():
    """Make float64 the default float type of Keras."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # Keras keeps the first one
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    "name", some_short(["pgd_ce", "apgd_t_dlr", "square", "noise"], "square", more=["pgd_ce", "noise"])
)
@pytest.mark.parametrize("norm", some_short(["inf", 2], more=[2]))
def test_float64_gives_the_exact_verdict(float64, name, norm):  # B7
    x, y = inputs(24, WEIGHTS[:, :2])
    model = linear_model(WEIGHTS[:, :2], layers.Softmax())
    assert model.compute_dtype == "float64"
    sizes = distance(x, y, norm, WEIGHTS[:, :2])
    x, y, sizes = (values[np.abs(sizes - 0.1) > 0.03] for values in (x, y, sizes))
    attack = Square(0.1, norm=norm, queries=300) if name == "square" else name
    report = evaluate_robustness(model, x, y, eps=0.1, norm=norm, suite="quick", attacks=[attack], verbose=0)
    found = [by is None for by in report.per_example["broken_by"]]
    if name == "noise":  # which finds some of them
        assert not np.any((sizes > 0.1) & ~np.array(found))
    else:
        assert found == (sizes > 0.1).tolist()


@pytest.mark.parametrize("method", some_short(["pgd", "trades", "consistency"], more=["pgd"]))
def test_float64_trains(float64, method):  # B7
    x, y = inputs(20)
    model = keras_drsl.AdversarialTraining(linear_model(), 0.1, method=method, steps=1)
    model.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()
