"""`AdversarialTraining`: expected values come from loops in NumPy and float64, or from a closed form."""

import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl.threat import ThreatModel
from tests import reference
from tests.backends import BACKEND, on_tensorflow
from tests.helpers import run_python, some_short
from tests.layers import Random
from tests.training import resume
from tests.training.cases import (
    BIAS,
    EPS,
    LAM,
    RATE,
    SLOPES,
    NumPyMLP,
    cross_entropies,
    data,
    drs_gradient,
    drs_losses,
    linear,
    smooth,
    train,
    worst_inputs,
    wrap,
)

PGD_L2 = {"norm": 2, "steps": 3, "step_size": 0.04}
# One step that ends in a corner of the ball.
ONE_STEP = {"steps": 1, "step_size": 2 * EPS}


class TestStep:
    @pytest.mark.parametrize(
        "mode",
        [
            # Other tests train in a graph and eagerly.
            pytest.param({}, marks=pytest.mark.more),
            pytest.param({"run_eagerly": True}, marks=pytest.mark.more),
            {"jit_compile": True},
            {"steps_per_execution": 2},
        ],
    )
    def test_is_equal_eager_in_a_graph_and_compiled(self, mode, start_at):
        if BACKEND == "torch" and ("jit_compile" in mode or "steps_per_execution" in mode):
            pytest.skip("not on torch")
        if BACKEND == "jax" and "run_eagerly" in mode:
            pytest.skip("Keras cannot run eagerly on JAX")
        x, y = data(24)
        start = np.random.default_rng(2).normal(size=(12, 4)) * 0.01
        start_at(start)
        model = smooth()
        expected = NumPyMLP(model.get_weights())
        for _ in range(2):
            for batch in (slice(0, 12), slice(12, 24)):
                worst = expected.attack(x[batch], y[batch], start, steps=3, step_size=0.04, eps=EPS)
                expected.step(worst, y[batch], LAM)

        weights, _ = train(model, x, y, epochs=2, compiled=mode, **PGD_L2)

        for weight, expected_weight in zip(weights, expected.weights, strict=True):
            np.testing.assert_allclose(weight, expected_weight, atol=2e-5)

    def test_weights_samples_and_classes(self, start_at):
        x, y = data()
        start = np.zeros_like(x)
        start_at(start)
        class_weight = {0: 2.0, 1: 0.5, 2: 0.0}
        sample_weight = np.array([class_weight[label] for label in y])
        for fit in ({"sample_weight": sample_weight}, {"class_weight": class_weight}):
            model = smooth()
            expected = NumPyMLP(model.get_weights())
            worst = expected.attack(x, y, start, steps=3, step_size=0.04, eps=EPS)
            expected.step(worst, y, LAM, sample_weight)
            weights, _ = train(model, x, y, fit=fit, graph=False, **PGD_L2)
            for weight, expected_weight in zip(weights, expected.weights, strict=True):
                np.testing.assert_allclose(weight, expected_weight, atol=2e-5)

    def test_takes_labels_of_any_form_and_a_softmax(self):
        x, y = data()
        expected, _ = train(linear(), x, y, graph=False, **ONE_STEP)
        cases = {
            "column": (y[:, None], {}),
            "one-hot": (reference.one_hot(y, 3).astype("float32"), {}),
            "softmax": (y, {"loss": keras_drsl.DRSLoss(LAM), "graph": True}),
            "softmax, eager": (y, {"loss": keras_drsl.DRSLoss(LAM)}),
        }
        for name, (labels, options) in cases.items():
            layers = [keras.layers.Softmax()] if "softmax" in name else []
            weights, history = train(linear(*layers), x, labels, **{"graph": False} | ONE_STEP | options)
            np.testing.assert_allclose(weights[0], expected[0], atol=1e-5, err_msg=name)
            assert set(history) == {"accuracy", "attack_strength", "clean_accuracy", "loss"}

    def test_accumulates_gradients(self, start_at):
        x, y = data(24)
        start_at(np.zeros((12, 4)))
        optimizer = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
        halves, _ = train(smooth(), x, y, optimizer=optimizer, **PGD_L2)
        start_at(np.zeros((24, 4)))
        whole, _ = train(smooth(), x, y, batch_size=24, graph=False, **PGD_L2)
        for weight, expected in zip(halves, whole, strict=True):
            np.testing.assert_allclose(weight, expected, atol=1e-5)

    def test_attack_leaves_batch_statistics_unchanged(self):
        x, y = data()
        norm = keras.layers.BatchNormalization(momentum=0.7, center=False, scale=False)
        model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(3)])
        model.layers[-1].set_weights([SLOPES, BIAS])
        train(model, x, y, steps=5, step_size=EPS)
        worst = worst_inputs(x, y)  # Before training the moving statistics are 0 and 1.
        mean, variance = (ops.convert_to_numpy(moving) for moving in (norm.moving_mean, norm.moving_variance))
        np.testing.assert_allclose(mean, 0.3 * worst.mean(0), atol=1e-5)
        np.testing.assert_allclose(variance, 0.7 + 0.3 * worst.var(0), atol=1e-5)

    def test_attack_sees_no_dropout(self):
        x, y = data()
        drops = linear(keras.layers.Dropout(0.9, seed=0))
        _, history = train(drops, x, y, step_size=2 * EPS, method="fgsm", graph=False)
        increase = cross_entropies(worst_inputs(x, y) @ SLOPES + BIAS, y) - cross_entropies(x @ SLOPES + BIAS, y)
        assert history["attack_strength"] == pytest.approx([increase.mean()], abs=1e-5)

    @pytest.mark.skipif(BACKEND == "jax", reason="a traced step shows no values")
    @pytest.mark.parametrize("norm", ["inf", 2, 1])
    def test_stays_in_ball_and_range(self, norm):
        x = np.random.default_rng(0).uniform(0, 255, (40, 4)).astype("float32")
        y = np.arange(40) % 3
        seen = []

        class Spy(keras.layers.Layer):
            def call(self, inputs, training=False):
                if training:
                    seen.append(ops.convert_to_numpy(inputs))
                return inputs

        model = keras.Sequential([keras.Input((4,)), Spy(), keras.layers.Rescaling(1 / 255), keras.layers.Dense(3)])
        threat = ThreatModel(8.0, norm=norm, clip_max=255.0)
        train(model, x, y, threat=threat, batch_size=40, graph=False)
        assert 7 < threat.size(seen[-1] - x).max() < 8.001
        assert threat.contains(seen[-1], x).all()

    @pytest.mark.parametrize(
        "policy", some_short(["mixed_float16", "mixed_bfloat16", "float64"], more=["mixed_bfloat16", "float64"])
    )
    def test_trains_in_other_precisions(self, policy, dtype_policy):
        dtype_policy(policy)
        x, y = data(48)
        _, history = train(smooth(), x, y, epochs=20, optimizer=keras.optimizers.SGD(0.1))
        assert history["loss"][-1] < history["loss"][0]
        assert min(history["attack_strength"]) > 0

    def test_attacks_confident_model_in_half_precision(self, dtype_policy):
        # Where the model is confident, the gradient of the cross-entropy at the logits underflows in float16.
        x, slopes = data(400)[0], 40 * SLOPES
        z = x @ slopes + BIAS
        x = x[z[:, 0] > z[:, 1] + 28]
        y = np.zeros(len(x), int)
        expected = ((worst_inputs(x, y, 0.2).clip(0, 1) @ slopes + BIAS).argmax(1) == 0).mean()
        assert 0.1 < expected < 0.9
        dtype_policy("mixed_float16")
        model = linear()
        model.layers[0].set_weights([slopes, BIAS])
        options = {"eps": 0.2, "batch_size": len(x), "optimizer": keras.optimizers.SGD(0.0)}
        _, history = train(model, x, y, **options)
        assert history["clean_accuracy"] == [1.0]
        assert history["accuracy"] == pytest.approx([expected], abs=0.03)

    @pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")
    def test_loop_of_an_accelerator_trains_random_model(self, monkeypatch):
        import jax

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        x, y = data()
        for norm in ("inf", 2):
            model = keras.Sequential([keras.Input((4,)), Random(0.01), linear()])
            _, history = train(model, x, y, norm=norm, epochs=2)
            assert min(history["attack_strength"]) > 0
        (kernel, _), _ = train(linear(), x, y, step_size=2 * EPS)
        worst = worst_inputs(x, y)
        upstream = drs_gradient(worst @ SLOPES + BIAS, y, LAM) / len(x)
        np.testing.assert_allclose(kernel, SLOPES - RATE * worst.T @ upstream, atol=1e-5)

    @pytest.mark.short
    def test_trains_softmax_model_random_at_inference(self):
        x, y = data()
        model = keras.Sequential([keras.Input((4,)), Random(0.01), linear(keras.layers.Softmax())])
        _, history = train(model, x, y, loss=keras_drsl.DRSLoss(LAM), epochs=2)
        assert min(history["attack_strength"]) > 0

    @on_tensorflow
    @pytest.mark.parametrize("norm", some_short(["inf", 2, 1], more=["inf", 2]))
    def test_takes_batches_of_unknown_shape(self, norm):
        import tensorflow as tf

        x, y = data()
        batches = tf.data.Dataset.from_generator(
            lambda: iter([(x[:, :, None], y)]),
            output_signature=(tf.TensorSpec((None, None, 1), "float32"), tf.TensorSpec((None,), "int32")),
        )
        layers = [keras.Input((None, 1)), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
        _, history = train(keras.Sequential(layers), batches, None, batch_size=None, norm=norm)
        assert history["attack_strength"][0] > 0


class TestFit:
    def test_repeats_itself_with_a_seed(self):
        x, y = data()
        kernels = [train(smooth(), x, y, epochs=2, steps=1, seed=seed, graph=False)[0][0] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(kernels[0], kernels[1])
        assert np.abs(kernels[0] - kernels[2]).max() > 1e-7

    def test_evaluates_and_predicts_without_attack(self):
        x, y = data()
        model = linear()
        robust = wrap(model)
        history = robust.fit(x, y, validation_data=(x, y), epochs=2, batch_size=5, verbose=0).history
        z = x @ model.get_weights()[0].astype("float64") + model.get_weights()[1]
        expected = {"loss": drs_losses(z, y).mean(), "accuracy": (z.argmax(1) == y).mean()}
        found = robust.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
        assert found == pytest.approx(expected, abs=1e-5)
        assert {name: history[f"val_{name}"][-1] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert not [name for name in history if name.startswith("val_") and "clean" in name]
        np.testing.assert_allclose(robust.predict(x, verbose=0), z, atol=1e-5)

    def test_draws_no_batch_twice(self):
        x, y = data(24)
        batches = [(x[start : start + 8], y[start : start + 8]) for start in (0, 8, 16)]
        options = {"graph": False, **ONE_STEP}
        expected, _ = train(smooth(), x, y, batch_size=8, **options)

        class Batches(keras.utils.PyDataset):
            num_batches = 3

            def __getitem__(self, index):
                return batches[index]

        sources = {"generator": (batch for batch in batches), "PyDataset": Batches()}
        if BACKEND == "tensorflow":
            import tensorflow as tf

            sources["tf.data"] = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        for name, source in sources.items():
            weights, _ = train(smooth(), source, None, batch_size=None, **options)
            np.testing.assert_allclose(weights[0], expected[0], atol=1e-6, err_msg=name)

    def test_takes_the_one_input_in_a_list(self):
        x, y = data()
        expected, _ = train(smooth(), x, y, graph=False, **ONE_STEP)
        weights, _ = train(smooth(), [x], y, graph=False, **ONE_STEP)
        np.testing.assert_array_equal(weights[0], expected[0])

    def test_train_on_batch_is_a_step_of_fit(self):
        x, y = data()
        expected, history = train(smooth(), x, y, graph=False, **ONE_STEP)
        model = smooth()
        robust = wrap(model, **ONE_STEP)
        logs = robust.train_on_batch(x, y, return_dict=True)
        assert logs == pytest.approx({name: values[0] for name, values in history.items()}, abs=1e-5)
        np.testing.assert_allclose(model.get_weights()[0], expected[0], atol=1e-6)

    def test_takes_a_threat_model_or_its_numbers(self):
        threat = ThreatModel(0.2, norm=2, clip_min=-1.0)
        robust = keras_drsl.AdversarialTraining(linear(), 0.2, norm=2, clip_min=-1.0)
        assert robust.threat == keras_drsl.AdversarialTraining(linear(), threat=threat).threat == threat
        assert keras_drsl.AdversarialTraining(linear()).threat == ThreatModel(8 / 255)

    @pytest.mark.parametrize(
        ("options", "steps", "step_size"),
        [({}, 10, 0.05), ({"steps": 2}, 2, 0.2), ({"method": "fgsm"}, 1, 0.25), ({"step_size": 0.01}, 10, 0.01)],
    )
    def test_step_size_follows_eps_and_steps(self, options, steps, step_size):
        robust = keras_drsl.AdversarialTraining(linear(), 0.2, **options)
        assert (robust.steps, robust.step_size) == (steps, pytest.approx(step_size))


class TestSaving:
    def test_saved_model_loads_without_the_package(self, tmp_path):
        x, y = data()
        model = linear()
        robust = wrap(model, steps=2, graph=False)
        checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True)
        robust.fit(x, y, verbose=0, callbacks=[checkpoint])
        robust.save(tmp_path / "robust.keras")
        for name in ("robust.keras", "best.keras"):
            with zipfile.ZipFile(tmp_path / name) as file:
                assert b"keras_drsl" not in file.read("config.json")
        code = """
        import sys, keras, numpy as np
        model = keras.models.load_model(sys.argv[1])
        np.save(sys.argv[2], model.predict(np.load(sys.argv[3]), verbose=0))
        assert "keras_drsl" not in sys.modules
        """
        np.save(tmp_path / "x.npy", x)
        run_python(code, *[tmp_path / name for name in ("robust.keras", "z.npy", "x.npy")])
        np.testing.assert_allclose(np.load(tmp_path / "z.npy"), model.predict(x, verbose=0), atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["exception", "kill"])
    def test_resumes_exactly(self, end, tmp_path):
        if end == "exception":
            with pytest.raises(resume.StoppedError):
                resume.train(tmp_path / "resumed", stop=resume.fail)
        else:
            code = "import sys; from tests.training import resume; resume.train(sys.argv[1], stop=resume.kill)"
            killed = run_python(code, tmp_path / "resumed", check=False, cwd=Path(__file__).parents[2])
            assert killed.returncode == -9, killed.stderr
        resumed, epochs = resume.train(tmp_path / "resumed")
        assert epochs == 3
        expected, epochs = resume.train(tmp_path / "whole")
        assert epochs == 5
        for weight, expected_weight in zip(resumed, expected, strict=True):
            np.testing.assert_allclose(weight, expected_weight, rtol=1e-6, atol=1e-7)


@pytest.mark.more
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no replicas on torch")
def test_two_devices_end_with_the_weights_of_one():
    code = """
    import keras, numpy as np, keras_drsl
    from contextlib import nullcontext
    from keras_drsl.training import inner_attack

    jax = keras.config.backend() == "jax"
    if jax:
        import jax
        assert len(jax.devices()) == 2
    else:
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.2, 0.8, (24, 4)).astype("float32"), rng.integers(0, 3, 24)
    inner_attack.random_delta = lambda shape, eps, norm, seed: keras.ops.zeros(shape)

    def train(devices, method):
        scope = nullcontext()
        if jax:
            data_parallel = keras.distribution.DataParallel(devices=jax.devices()) if devices == 2 else None
            keras.distribution.set_distribution(data_parallel)
        elif devices == 2:
            scope = strategy.scope()
        with scope:
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)])
            robust = keras_drsl.AdversarialTraining(
                model, 0.1, norm=2, steps=3, method=method, warmup_epochs=1, seed=0)
            loss = keras_drsl.DRSLoss(from_logits=True)
            # One device needs no graph, which takes long to build.
            options = {"run_eagerly": devices == 1 and not jax, "metrics": ["accuracy"]}
            robust.compile(keras.optimizers.SGD(0.5), loss, **options)
        data = {"x": x, "y": y, "batch_size": 8}
        if devices == 2 and not jax:
            dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
            data = {"x": strategy.experimental_distribute_dataset(dataset)}
        history = robust.fit(**data, validation_data=(x, y), epochs=2, shuffle=False, verbose=0).history
        return [np.asarray(weight) for weight in model.get_weights()], history

    if not jax:
        with strategy.scope():
            seeds = inner_attack.ReplicaSeeds(0)
        drawn = strategy.run(lambda: keras.random.uniform((5,), seed=seeds))
        first, second = map(np.asarray, strategy.experimental_local_results(drawn))
        assert np.abs(first - second).max() > 0.1

    # The loss and the penalty of MART are averaged apart.
    one, two = train(1, "mart"), train(2, "mart")
    for a, b in zip(one[0], two[0]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert one[1].keys() == two[1].keys()
    for name in one[1]:
        np.testing.assert_allclose(one[1][name], two[1][name], rtol=1e-4, atol=1e-5, err_msg=name)
    """
    run_python(code, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
