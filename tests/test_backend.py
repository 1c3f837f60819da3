import ast
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import _backend
from tests.backends import BACKEND, on_jax, values
from tests.helpers import run_python, some_short
from tests.losses.cases import small_data, small_model

FOLDER = Path(keras_drsl.__file__).parent / "_backend"


def public_definitions(module):
    """Map the public functions of a module to their arguments: those that it defines, and imports as its own."""
    names = {}
    for node in ast.parse((FOLDER / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names[node.name] = ast.unparse(node.args)
        elif isinstance(node, ast.ImportFrom) and node.module == "keras_drsl._backend._common":
            shared = public_definitions("_common")
            names |= {alias.name: shared[alias.name] for alias in node.names if alias.asname == alias.name}
    return names


@pytest.mark.short
def test_all_backends_define_the_same_functions():
    tensorflow = public_definitions("tensorflow")
    assert public_definitions("jax") == tensorflow
    assert public_definitions("torch") == tensorflow
    assert set(tensorflow) < set(vars(_backend))


def test_no_backend_asks_which_backend_runs():
    for module in ("tensorflow", "jax", "torch"):
        assert "config.backend" not in (FOLDER / f"{module}.py").read_text()


def test_name_is_that_of_the_running_backend():
    assert BACKEND == _backend.NAME


def test_other_backends_are_an_error():
    done = run_python("import keras; keras.config.backend = lambda: 'numpy'; import keras_drsl", check=False)
    assert "needs `KERAS_BACKEND` to be 'tensorflow', 'jax' or 'torch'. Received: KERAS_BACKEND='numpy'" in done.stderr


def test_require_tensorflow_names_the_feature():
    if BACKEND == "tensorflow":
        _backend.require_tensorflow("cleverhans")
        return
    received = f"Received: KERAS_BACKEND={BACKEND}"
    with pytest.raises(RuntimeError, match=f"cleverhans needs `KERAS_BACKEND=tensorflow`. {received}"):
        _backend.require_tensorflow("cleverhans")


class Subclassed(keras.Model):
    """Apply a function to logits; the model is not a graph of layers."""

    def __init__(self, logits, function):
        super().__init__()
        self.logits = logits
        self.function = function

    def call(self, x):
        return self.function(self.logits(x))


class Noise(layers.Layer):
    """Add noise, also at inference. The random numbers change in each call."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + 0.3 * keras.random.normal(ops.shape(x), seed=self.seed)


def functional(layer_or_function):
    def build(logits):
        x = keras.Input((3,))
        return keras.Model(x, layer_or_function(logits(x)))

    return build


def nested(logits):
    x = keras.Input((3,))
    return keras.Model(x, keras.Sequential([keras.Sequential([logits, layers.Softmax()])])(x))


# How to end a model that computes logits in a softmax.
SOFTMAX_MODELS = {
    "dense": lambda logits: small_model(activation="softmax"),
    "sequential": lambda logits: keras.Sequential([logits, layers.Softmax()]),
    "activation": lambda logits: keras.Sequential([logits, layers.Activation("softmax")]),
    "functional": functional(layers.Softmax()),
    "functional op": functional(ops.softmax),
    "nested": nested,
    "subclassed": lambda logits: Subclassed(logits, layers.Softmax()),
    "subclassed op": lambda logits: Subclassed(logits, lambda z: ops.softmax(z, axis=1)),
    "subclassed activation": lambda logits: Subclassed(logits, keras.activations.softmax),
    "cast": lambda logits: Subclassed(logits, lambda z: ops.cast(ops.cast(ops.softmax(z), "float16"), "float32")),
}


def heads(combine):
    """Return a builder of a model that combines the softmaxes of three heads on given logits."""

    def build(logits):
        return Subclassed(logits, lambda z: combine([ops.softmax(z), ops.softmax(-z), ops.softmax(2 * z + 1)]))

    return build


def hand_made(z):
    e = ops.exp(z)
    return e / ops.sum(e, axis=-1, keepdims=True)


SHARES = [0.2, 0.3, 0.5]
SIZES = np.array(SHARES, "float32")


def gated(p):
    gates = ops.softmax(p[0][:, :3], axis=-1)
    return ops.sum(gates[:, :, None] * ops.stack(p, axis=1), axis=1)


# Operations on three softmaxes. The second value is the weights of the average in NumPy.
AVERAGES = {
    "sum": (lambda p: (p[0] + p[1] + p[2]) / 3, None),
    "python sum": (lambda p: sum(p) / len(p), None),
    "reciprocal": (lambda p: (1 / 3) * (p[0] + p[1] + p[2]), None),
    "weighted": (lambda p: 0.2 * p[0] + p[1] * 0.3 + p[2] / 2, SHARES),
    "layer": (lambda p: layers.Average()(p), None),
    "stack": (lambda p: ops.mean(ops.stack(p), axis=0), None),
    "stack last": (lambda p: ops.mean(ops.stack(p, axis=-1), axis=-1), None),
    "keepdims": (lambda p: ops.squeeze(ops.mean(ops.stack(p, axis=1), axis=1, keepdims=True), axis=1), None),
    "concatenated": (lambda p: ops.mean(ops.reshape(ops.concatenate(p, axis=1), (-1, 3, 4)), axis=1), None),
    "weights": (lambda p: ops.sum(ops.multiply(ops.stack(p), SIZES[:, None, None]), axis=0), SHARES),
    "einsum": (lambda p: ops.einsum("k,kbc->bc", SIZES, ops.stack(p)), SHARES),
    "tensordot": (lambda p: ops.tensordot(ops.convert_to_tensor(SIZES), ops.stack(p), axes=1), SHARES),
    "matmul": (lambda p: ops.matmul(ops.stack(p, axis=-1), SIZES[:, None])[:, :, 0], SHARES),
    "dot": (lambda p: ops.dot(ops.stack(p, axis=-1), SIZES), SHARES),
    "average": (lambda p: ops.average(ops.stack(p, axis=-1), axis=-1, weights=ops.convert_to_tensor(SIZES)), SHARES),
    "dot layer": (
        lambda p: layers.Dot(1)([ops.stack(p, axis=1), ops.broadcast_to(ops.convert_to_tensor(SIZES), (20, 3))]),
        SHARES,
    ),
    "normalized": (lambda p: (p[0] + p[1] + p[2]) / ops.sum(p[0] + p[1] + p[2], axis=-1, keepdims=True), None),
    "transposed": (lambda p: ops.transpose((ops.transpose(p[0] + p[1] + p[2])) / 3), None),
    "scaled": (lambda p: p[2] * 1.0 + 0.0, [0, 0, 1]),
    "slices": (lambda p: (ops.concatenate(p, 0)[:20] + ops.concatenate(p, 1)[:, 4:8] + p[2]) / 3, None),
    "detached": (lambda p: (ops.stop_gradient(p[0]) + p[1] + p[2]) / 3, None),
    "half": (lambda p: ops.cast(ops.cast(p[0] + p[1] + p[2], "float16"), "float32") / 3, None),
}
SHORT_AVERAGES = ("sum", "weighted", "layer", "stack", "matmul", "slices", "half", "detached")


# Other ends of a model of probabilities, and the logarithms of these.
def product_of_many(z):
    """Return a product of experts, each step of which uses the last one twice."""
    p = ops.softmax(z)
    for _ in range(24):
        p = p * ops.ones_like(p)
        p = p / ops.sum(p, axis=1, keepdims=True)
    p = p * ops.softmax(z)
    return p / ops.sum(p, axis=1, keepdims=True)


OTHER_ENDS = {
    "temperature": (lambda z: ops.softmax(z / 5), lambda z: z / 5),
    "hand-made": (hand_made, lambda z: z),
    "exp": (lambda z: ops.exp(ops.log_softmax(z)), lambda z: z),
    "sigmoids": (
        lambda z: ops.concatenate([1 - ops.sigmoid(z[:, :1]), ops.sigmoid(z[:, :1])], axis=1),
        lambda z: np.concatenate([0 * z[:, :1], z[:, :1]], axis=1),
    ),
    "with an unused class": (
        lambda z: ops.concatenate([ops.softmax(z), ops.zeros_like(z[:, :1])], axis=1),
        lambda z: np.concatenate([log_softmax(z), np.full_like(z[:, :1], -1e3)], axis=1),
    ),
    "product of many": (product_of_many, lambda z: 2.0 * z),
    "smoothed": (lambda z: 0.9 * ops.softmax(z) + 0.025, lambda z: np.log(0.9 * np.exp(log_softmax(z)) + 0.025)),
    "transition": (
        lambda z: ops.matmul(ops.softmax(z), np.float32(0.6) * np.eye(4, dtype="float32") + np.float32(0.1)),
        lambda z: np.log(0.6 * np.exp(log_softmax(z)) + 0.1),
    ),
}

OTHER_MODELS = {
    "logits": lambda logits: logits,
    "difference": lambda logits: Subclassed(logits, lambda z: 1 - ops.softmax(z)),
    "guarded": lambda logits: Subclassed(logits, lambda z: ops.maximum(ops.softmax(z), 0.05)),
    "rounded": lambda logits: Subclassed(logits, lambda z: ops.round(10 * ops.softmax(z)) / 10),
    "constant": lambda logits: Subclassed(logits, lambda z: ops.ones((20, 4)) / 4),
}


def log_softmax(z):
    shifted = np.asarray(z, "float64") - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def direct_log(z, weights):
    """Return the logarithm of the average of the three heads as a tensor."""
    logs = ops.stack([ops.log_softmax(z), ops.log_softmax(-z), ops.log_softmax(2 * z + 1)])
    shares = ops.convert_to_tensor(np.array(weights or [1 / 3] * 3, "float32"))
    return ops.logsumexp(logs + ops.log(shares)[:, None, None], axis=0)


def log_of_average(z, weights):
    """Return the logarithm of the average of the three heads, from logarithms in float64."""
    weights = np.array(weights or [1 / 3] * 3)
    logs = np.stack([log_softmax(z), log_softmax(-z), log_softmax(2 * z + 1)])[weights > 0]
    terms = logs + np.log(weights[weights > 0])[:, None, None]
    largest = terms.max(axis=0)
    return largest + np.log(np.exp(terms - largest).sum(axis=0))


def inference(model):
    return lambda x: model(x, training=False)


def compile_function(function, variables):
    return _backend.compile_function(function, variables, lambda seconds: None)


def input_gradient(function, variables, x):
    """Compute the gradient of a function of the logits with respect to the input, in a compiled program."""

    def program(x):
        return _backend.value_and_gradient(lambda x: (ops.sum(ops.square(function(x)), axis=-1), ()), x)[2]

    return values(compile_function(program, variables)(x))


class TestLogitsBehind:
    @pytest.mark.short
    @pytest.mark.parametrize("name", SOFTMAX_MODELS)
    def test_returns_the_logits_and_their_gradient(self, name):
        x, _ = small_data()
        logits = small_model(activation=None)
        model = SOFTMAX_MODELS[name](logits)
        model(x)
        found = _backend.logits_behind(inference(model))
        expected = values(logits(x))
        np.testing.assert_allclose(values(found(ops.convert_to_tensor(x))), expected, rtol=1e-6)
        compiled = compile_function(found, model.variables)
        np.testing.assert_allclose(values(compiled(x)), expected, rtol=1e-6)
        grad = input_gradient(inference(logits), logits.variables, x)
        np.testing.assert_allclose(input_gradient(found, model.variables, x), grad, rtol=1e-5, atol=1e-6)
        # The model itself is as it was.
        np.testing.assert_allclose(values(model(x)).sum(axis=1), 1.0, rtol=1e-3)

    @pytest.mark.short
    @pytest.mark.parametrize("name", OTHER_MODELS)
    def test_refuses_other_outputs(self, name):
        x, _ = small_data()
        model = OTHER_MODELS[name](small_model(activation=None))
        model(x)
        found = _backend.logits_behind(inference(model))
        for function in (found, compile_function(found, model.variables)):
            with pytest.raises(LookupError, match="does not end in softmaxes"):
                function(ops.convert_to_tensor(x))

    @pytest.mark.parametrize("name", some_short(AVERAGES, *SHORT_AVERAGES, more=set(AVERAGES) - set(SHORT_AVERAGES)))
    def test_averages_are_exact_where_they_underflow(self, name):  # B2
        x, _ = small_data()
        logits = small_model(activation=None)
        logits.set_weights([100 * weight for weight in logits.get_weights()])
        combine, weights = AVERAGES[name]
        model = heads(combine)(logits)
        z = values(logits(x))
        assert np.abs(z).max() > 150  # so most probabilities are 0 in float32
        expected = log_of_average(z.astype("float64"), weights)
        found = _backend.logits_behind(inference(model))
        np.testing.assert_allclose(values(found(ops.convert_to_tensor(x))), expected, rtol=1e-5, atol=1e-4)
        compiled = compile_function(found, model.variables)
        np.testing.assert_allclose(values(compiled(x)), expected, rtol=1e-5, atol=1e-4)
        if name not in ("dot layer", "slices"):  # which are of 20 rows
            one_row = values(found(ops.convert_to_tensor(x[:1])))
            np.testing.assert_allclose(one_row, expected[:1], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(values(model(x)), np.exp(expected), atol=1e-2 if name == "half" else 1e-4)
        if name != "detached":  # its gradient is that without `stop_gradient`
            grad = input_gradient(lambda x: direct_log(logits(x), weights), model.variables, x)
            assert (np.abs(grad).max(axis=1) > 1).mean() > 0.3
            np.testing.assert_allclose(input_gradient(found, model.variables, x), grad, rtol=1e-3, atol=1e-3)

    @pytest.mark.short
    @pytest.mark.parametrize("name", OTHER_ENDS)
    def test_other_ends_have_logarithms(self, name):
        x, _ = small_data()
        logits = small_model(activation=None)
        end, expected = OTHER_ENDS[name]
        model = Subclassed(logits, end)
        model(x)
        found = values(compile_function(_backend.logits_behind(inference(model)), model.variables)(x))
        assert np.isfinite(found).all()
        expected = log_softmax(expected(values(logits(x))))
        # A probability of 0 has a finite logarithm below all others.
        np.testing.assert_allclose(log_softmax(found).clip(-500), expected.clip(-500), rtol=1e-4, atol=1e-5)

    @pytest.mark.short
    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    @pytest.mark.parametrize("dtype", ["float32", None])
    def test_takes_mixed_precision(self, policy, dtype):
        x, _ = small_data()
        logits = small_model(activation=None, dtype=policy)
        model = keras.Sequential([logits, layers.Activation("softmax", dtype=dtype or policy)])
        found = compile_function(_backend.logits_behind(inference(model)), model.variables)
        got = values(ops.cast(found(x), "float32"))
        np.testing.assert_allclose(got, values(ops.cast(logits(x), "float32")), rtol=1e-2, atol=1e-2)

    @pytest.mark.short
    def test_takes_new_weights_in_each_call(self):
        x, _ = small_data()
        logits = small_model(activation=None)
        model = keras.Sequential([logits, layers.Softmax()])
        compiled = compile_function(_backend.logits_behind(inference(model)), model.variables)
        before = values(compiled(x))
        logits.set_weights([2 * weight for weight in logits.get_weights()])
        assert np.abs(values(compiled(x)) - before).max() > 0.1
        np.testing.assert_allclose(values(compiled(x)), values(logits(x)), rtol=1e-6)

    @pytest.mark.short
    def test_random_numbers_change_in_each_call(self):
        x, _ = small_data()
        noise, logits = Noise(), small_model(activation=None)
        noisy = keras.Sequential([keras.Input((3,)), noise, logits])
        model = keras.Sequential([noisy, layers.Softmax()])
        found = _backend.logits_behind(inference(model))
        results = []
        for function in (found, inference(noisy)):
            noise.seed.state.assign([0, 0])
            twice = compile_function(lambda x, function=function: (function(x), function(x)), model.variables)
            results.append([values(output) for output in twice(x)])
        np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
        assert np.abs(results[0][0] - results[0][1]).max() > 0.1
        # Called eagerly, it changes the random state as the model does.
        noise.seed.state.assign([0, 0])
        eager = values(found(ops.convert_to_tensor(x)))
        np.testing.assert_allclose(eager, results[0][0], rtol=1e-6)
        assert values(noise.seed.state).any()

    @pytest.mark.short
    def test_works_in_a_loop_of_steps(self):
        x, _ = small_data()
        logits = small_model(activation=None)
        model = keras.Sequential([logits, layers.Softmax()])
        results = []
        for function in (inference(logits), _backend.logits_behind(inference(model))):

            def step(rows, size, function=function):
                total = lambda x: (ops.sum(ops.square(function(x)), axis=-1), ())
                return {"x": rows["x"] + size * _backend.value_and_gradient(total, rows["x"])[2]}

            program = _backend.multi_step(step, model.variables, lambda seconds: None)
            results.append(values(program({"x": x}, np.full(3, 0.1, "float32"))["x"]))
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5)

    @pytest.mark.short
    def test_threads_do_not_disturb_each_other(self):
        x, _ = small_data()
        logits = small_model(activation=None)
        model = keras.Sequential([logits, layers.Softmax()])
        tensor = ops.convert_to_tensor(x)
        expected, probabilities = values(logits(x)), values(model(x))
        found = _backend.logits_behind(inference(model))
        calls = [(found, expected), (found, expected), (inference(model), probabilities)]
        wrong = []

        def run(function, result):
            for _ in range(20):
                if not np.allclose(values(function(tensor)), result, atol=1e-5):
                    wrong.append(function)

        threads = [threading.Thread(target=run, args=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.short
    @on_jax
    @pytest.mark.parametrize("custom_jvp", [False, True])
    def test_goes_into_functions_that_jax_compiles(self, custom_jvp):
        import jax

        x, _ = small_data()
        logits = small_model(activation=None)
        model = keras.Sequential([logits, layers.Softmax()])
        inner = jax.jit(lambda x: (x, model(x)))
        before = jax.config.jax_softmax_custom_jvp
        jax.config.update("jax_softmax_custom_jvp", custom_jvp)
        try:
            for function in (lambda x: jax.jit(inner)(x)[1], jax.checkpoint(inference(model))):
                got = _backend.logits_behind(function)(x)
                np.testing.assert_allclose(got, values(logits(x)), rtol=1e-6)
        finally:
            jax.config.update("jax_softmax_custom_jvp", before)


@on_jax
def test_programs_run_within_others():
    import jax

    double = compile_function(lambda x: 2 * x, [])
    assert float(jax.jit(double)(3.0)) == 6.0
    assert float(jax.jit(jax.grad(double))(3.0)) == 2.0
    assert float(double(np.float32(3.0))) == 6.0
