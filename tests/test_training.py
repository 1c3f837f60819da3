"""`AdversarialTraining`: expected values come from loops in NumPy and float64, or from what is known in closed form."""

import math
import os
import subprocess
import sys
import textwrap
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import training
from keras_drsl.attacks import balls
from tests import reference
from tests.backends import BACKEND, on_tensorflow
from tests.layers import Random

RATE, EPS, LAM = 0.5, 0.05, 0.3
# Two rivals of the same slope: whatever the logits, the cross-entropy rises along one direction, so the worst input in
# the ball is known.
SLOPES = np.array([[1.0, -0.6, -0.6], [-0.4, 0.9, 0.9], [0.3, -0.8, -0.8], [-0.7, 0.2, 0.2]])
BIAS = np.array([0.1, 0.4, -0.3])


def data(count=12, features=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 0.8, (count, features)).astype("float32"), rng.integers(0, 3, count)


def linear(*head):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), *head])
    model.layers[0].set_weights([SLOPES, BIAS])
    return model


def smooth():
    """Two layers and nothing with a kink, with weights from NumPy."""
    rng = np.random.default_rng(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)])
    model.set_weights([rng.normal(size=weight.shape) for weight in model.get_weights()])
    return model


def train(model, x, y, *, epochs=1, batch_size=12, loss=None, compiled=None, fit=None, **options):
    """Train without shuffling; returns the weights and the history."""
    robust = keras_drsl.AdversarialTraining(model, **{"eps": EPS} | options)
    loss = loss or keras_drsl.DRSLoss(LAM, from_logits=True)
    robust.compile(
        **{"optimizer": keras.optimizers.SGD(RATE), "loss": loss, "metrics": ["accuracy"]} | (compiled or {})
    )
    history = robust.fit(x, y, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0, **(fit or {}))
    return model.get_weights(), history.history


def share(robust):
    """The share of eps that it attacks by."""
    return float(ops.convert_to_numpy(robust._share_of_eps))


def softmax(z):
    return np.exp([reference.log_softmax(row) for row in z.tolist()])


def pull(z, y, lam):
    """The gradient of DRSLoss with respect to the logits, in closed form."""
    p, is_true = softmax(z), reference.one_hot(y, 3)
    rivals = np.where(is_true == 1, 0.0, np.log(p))
    mean = rivals.sum(1, keepdims=True) / 2
    return p - is_true + 2 * lam * np.where(is_true == 1, 0.0, rivals - mean)


def cross_entropies(z, y):
    return reference.each(reference.cross_entropy, reference.one_hot(y, 3), z)


def worst_inputs(x, y, eps=EPS, norm="inf"):
    direction = SLOPES[:, 1] - SLOPES[:, 0]
    direction = np.sign(direction) if norm == "inf" else direction / np.linalg.norm(direction)
    return x + eps * np.where(y == 0, 1, -1)[:, None] * direction


class NumPyMLP:
    """The smooth model and its training in float64."""

    def __init__(self, weights):
        self.weights = [weight.astype("float64") for weight in weights]

    def logits(self, x):
        kernel, bias, last_kernel, last_bias = self.weights
        self.hidden = np.tanh(x @ kernel + bias)
        return self.hidden @ last_kernel + last_bias

    def back(self, x, pulls):
        """The gradients of the weights and of the inputs, for those of the logits."""
        kernel, _, last_kernel, _ = self.weights
        inner = (pulls @ last_kernel.T) * (1 - self.hidden**2)
        return [x.T @ inner, inner.sum(0), self.hidden.T @ pulls, pulls.sum(0)], inner @ kernel.T

    def attack(self, x, y, start, steps, step_size, eps):
        """PGD in L2 up the cross-entropy."""
        x_adv = x + start
        for _ in range(steps):
            z = self.logits(x_adv)
            _, gradient = self.back(x_adv, softmax(z) - reference.one_hot(y, 3))
            x_adv = x_adv + step_size * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
            size = np.linalg.norm(x_adv - x, axis=1, keepdims=True)
            x_adv = x + (x_adv - x) * np.minimum(1, eps / size)
        return x_adv

    def step(self, x, y, lam, weights=None):
        pulls = pull(self.logits(x), y, lam) / len(x)
        gradients, _ = self.back(x, pulls if weights is None else pulls * weights[:, None])
        self.weights = [weight - RATE * gradient for weight, gradient in zip(self.weights, gradients, strict=True)]


def given_start(monkeypatch, start):
    monkeypatch.setattr(balls, "draw", lambda shape, eps, norm, seed: ops.convert_to_tensor(start.astype("float32")))


@pytest.fixture
def dtype_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


class TestAStep:
    @pytest.mark.parametrize("norm", ["inf", 2])
    @pytest.mark.parametrize("method", ["pgd", "fgsm"])
    def test_learns_from_the_worst_inputs_of_a_linear_model(self, method, norm):
        x, y = data()
        # From wherever it starts, one step of twice the radius along the one direction ends in the worst corner; in
        # L2 it takes many to turn towards it.
        if norm == 2 and method == "fgsm":
            pytest.skip("one step from a random start does not end at the worst point in L2")
        steps = {"steps": 60, "step_size": 0.5 * EPS} if norm == 2 else {"step_size": 2 * EPS}
        worst = worst_inputs(x, y, norm=norm)
        z, z_worst = x @ SLOPES + BIAS, worst @ SLOPES + BIAS
        pulls = pull(z_worst, y, LAM) / len(x)

        (kernel, bias), history = train(linear(), x, y, method=method, norm=norm, **steps)

        np.testing.assert_allclose(kernel, SLOPES - RATE * worst.T @ pulls, atol=1e-5)
        np.testing.assert_allclose(bias, BIAS - RATE * pulls.sum(0), atol=1e-5)
        expected = reference.each(reference.drs_loss, reference.one_hot(y, 3), z_worst, lam=LAM).mean()
        assert history["loss"] == pytest.approx([expected], abs=1e-5)
        assert history["accuracy"] == pytest.approx([(z_worst.argmax(1) == y).mean()])
        assert history["clean_accuracy"] == pytest.approx([(z.argmax(1) == y).mean()])
        rise = cross_entropies(z_worst, y) - cross_entropies(z, y)
        assert history["attack_strength"] == pytest.approx([rise.mean()], abs=1e-5)

    @pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}])
    def test_is_the_same_eager_in_a_graph_and_compiled(self, mode, monkeypatch):
        if BACKEND == "torch" and ("jit_compile" in mode or "steps_per_execution" in mode):
            pytest.skip("not on torch")
        if BACKEND == "jax" and "run_eagerly" in mode:
            pytest.skip("an eager step of JAX has no batch to look at")
        x, y = data(24)
        start = np.random.default_rng(2).normal(size=(12, 4)) * 0.01
        given_start(monkeypatch, start)
        model = smooth()
        expected = NumPyMLP(model.get_weights())
        for _ in range(2):
            for batch in (slice(0, 12), slice(12, 24)):
                worst = expected.attack(x[batch], y[batch], start, steps=3, step_size=0.04, eps=EPS)
                expected.step(worst, y[batch], LAM)

        weights, _ = train(model, x, y, epochs=2, compiled=mode, norm=2, steps=3, step_size=0.04)

        for one, other in zip(weights, expected.weights, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)

    @pytest.mark.parametrize("head", ["logits", "softmax"])
    @pytest.mark.parametrize("attack_loss", ["margin", "loss"])
    def test_attacks_another_loss(self, attack_loss, head, monkeypatch):
        # For class 1, pulling the rivals 0 and 2 apart and making 0 win ask for opposite inputs: with a large `lam` the
        # whole loss rises where the cross-entropy falls.
        x, _ = data(12)
        y = np.ones(12, int)
        given_start(monkeypatch, np.zeros_like(x))
        slopes = np.stack([np.zeros(4), SLOPES[:, 1], -2 * SLOPES[:, 1]], axis=1)
        layers = [keras.layers.Softmax()] if head == "softmax" else []
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, use_bias=False), *layers])
        model.layers[0].set_weights([slopes])
        loss = keras_drsl.DRSLoss(5.0, from_logits=head == "logits")
        still = {"optimizer": keras.optimizers.SGD(0.0)}
        _, history = train(model, x, y, loss=loss, attack_loss=attack_loss, step_size=2 * EPS, compiled=still)
        down = -EPS * np.sign(SLOPES[:, 1])
        corners = {one: (x + one * down).astype("float64") @ slopes for one in (1, -1)}
        values = {
            "margin": lambda z: np.maximum(z[:, 0], z[:, 2]) - z[:, 1],
            "loss": lambda z: reference.each(reference.drs_loss, reference.one_hot(y, 3), z, lam=5.0),
        }[attack_loss]
        best = np.where((values(corners[1]) > values(corners[-1]))[:, None], corners[1], corners[-1])
        expected = reference.each(reference.drs_loss, reference.one_hot(y, 3), best, lam=5.0).mean()
        assert history["loss"] == pytest.approx([expected], rel=1e-4)

    def test_without_attack_is_plain_training(self):
        x, y = data()
        plain = smooth()
        plain.compile(keras.optimizers.SGD(RATE), keras_drsl.DRSLoss(LAM, from_logits=True))
        plain.fit(x, y, epochs=2, batch_size=5, shuffle=False, verbose=0)
        weights, history = train(smooth(), x, y, epochs=2, batch_size=5, method="clean")
        for one, other in zip(weights, plain.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        assert history["attack_strength"] == [0.0, 0.0]
        assert history["accuracy"] == history["clean_accuracy"]

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("method", ["trades", "mart"])
    def test_adds_the_penalty_of_its_method(self, method, weighted, monkeypatch):
        x, y = data()
        attacked = (x + np.random.default_rng(3).uniform(-EPS, EPS, x.shape)).astype("float32")
        monkeypatch.setattr(
            keras_drsl.AdversarialTraining, "_search", lambda *arguments: ops.convert_to_tensor(attacked)
        )
        share = np.random.default_rng(4).uniform(0, 2, len(x)) if weighted else np.ones(len(x))

        def losses(kernel):
            z, z_adv = x @ kernel + BIAS, attacked @ kernel + BIAS
            p, q = softmax(z), softmax(z_adv)
            divergence = (p * np.log(p / q)).sum(1)
            hot = reference.one_hot(y, 3)
            if method == "trades":
                return reference.each(reference.drs_loss, hot, z, lam=LAM) + 5 * divergence
            rival = np.where(hot == 1, 0, q).max(1)
            sure = (hot * p).sum(1)
            value = reference.each(reference.drs_loss, hot, z_adv, lam=LAM)
            return value - np.log(1.0001 - rival) + 5 * divergence * (1 - sure)

        fit = {"sample_weight": share} if weighted else {}
        (kernel, _), history = train(linear(), x, y, method=method, beta=5.0, fit=fit)
        mean = lambda kernel: (share * losses(kernel)).mean()
        np.testing.assert_allclose(kernel, SLOPES - RATE * reference.gradient(mean, SLOPES), atol=1e-4)
        if BACKEND != "jax" or not weighted:
            assert history["loss"] == pytest.approx([mean(SLOPES)], abs=1e-4)

    def test_of_noise_learns_from_two_draws_and_keeps_their_leads_alike(self, monkeypatch):
        x, y = data()
        x[0], x[1] = 0, 1  # whose copies leave the range, and are not clipped
        units = np.random.default_rng(3).uniform(-1, 1, (2, *x.shape)).astype("float32")
        draws, given = EPS * units, iter(units)

        def draw(shape, eps, norm, seed):
            assert norm == "inf"
            return eps * ops.convert_to_tensor(next(given))

        monkeypatch.setattr(balls, "draw", draw)

        def losses(kernel):
            hot = reference.one_hot(y, 3)
            both = [(x + draw) @ kernel + BIAS for draw in draws]
            leads = [(z * (hot - (1 - hot) / 2)).sum(1) for z in both]
            values = [reference.each(reference.drs_loss, hot, z, lam=LAM) for z in both]
            return sum(values) / 2 + 5 * (leads[0] - leads[1]) ** 2

        options = {"method": "noise", "beta": 5.0, "compiled": {"run_eagerly": BACKEND != "jax"}}
        (kernel, _), history = train(linear(), x, y, **options)
        mean = lambda kernel: losses(kernel).mean()
        np.testing.assert_allclose(kernel, SLOPES - RATE * reference.gradient(mean, SLOPES), atol=1e-4)
        assert history["loss"] == pytest.approx([mean(SLOPES)], abs=1e-4)
        assert history["clean_accuracy"] == pytest.approx([(np.argmax(x @ SLOPES + BIAS, 1) == y).mean()])
        assert next(given, None) is None

    @pytest.mark.skipif(BACKEND == "jax", reason="a traced step shows no values")
    def test_of_trades_follows_the_divergence_to_the_edge_of_the_ball(self, monkeypatch):
        points = []
        project = balls.project

        def spy(*arguments):
            points.append(project(*arguments))
            return points[-1]

        monkeypatch.setattr(balls, "project", spy)
        x, y = data()
        train(linear(), x, y, method="trades", compiled={"run_eagerly": True})
        start, end = (ops.convert_to_numpy(points[place]) for place in (0, -1))
        assert 1e-4 < np.abs(start - x).max() < 0.01
        # The divergence rises both ways along the one direction that changes the prediction.
        both = [worst_inputs(x, np.full(len(x), one)) for one in (0, 1)]
        gaps = np.minimum(*[np.abs(end - one).max(1) for one in both])
        np.testing.assert_allclose(gaps, 0, atol=1e-5)

    @pytest.mark.parametrize("method", ["trades", "mart"])
    def test_compares_the_same_random_view_of_both_inputs(self, method, monkeypatch):
        x, y = data()
        monkeypatch.setattr(keras_drsl.AdversarialTraining, "_search", lambda self, classifier, rows, drive: rows["x"])
        losses = []
        for beta in (0.0, 100.0):
            keras.utils.set_random_seed(0)
            noisy = keras.Sequential([keras.Input((4,)), keras.layers.GaussianNoise(0.5, seed=0), linear()])
            losses.append(train(noisy, x, y, method=method, beta=beta, epochs=2)[1]["loss"])
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        assert losses[0][0] != pytest.approx(losses[0][1], abs=1e-3)

    def test_weighs_samples_and_classes(self, monkeypatch):
        x, y = data()
        start = np.zeros_like(x)
        given_start(monkeypatch, start)
        class_weight = {0: 2.0, 1: 0.5, 2: 0.0}
        share = np.array([class_weight[one] for one in y])
        for fit in ({"sample_weight": share}, {"class_weight": class_weight}):
            model = smooth()
            expected = NumPyMLP(model.get_weights())
            worst = expected.attack(x, y, start, steps=3, step_size=0.04, eps=EPS)
            expected.step(worst, y, LAM, share)
            weights, _ = train(model, x, y, fit=fit, norm=2, steps=3, step_size=0.04)
            for one, other in zip(weights, expected.weights, strict=True):
                np.testing.assert_allclose(one, other, atol=2e-5)

    def test_takes_labels_of_any_form_and_a_softmax_head(self):
        x, y = data()
        expected, _ = train(linear(), x, y)
        forms = {
            "column": ({}, y[:, None], linear()),
            "one-hot": ({}, reference.one_hot(y, 3).astype("float32"), linear()),
            "softmax": ({"loss": keras_drsl.DRSLoss(LAM)}, y, linear(keras.layers.Softmax())),
        }
        for name, (options, labels, model) in forms.items():
            weights, history = train(model, x, labels, **options)
            np.testing.assert_allclose(weights[0], expected[0], atol=1e-5, err_msg=name)
            assert set(history) == {"accuracy", "attack_strength", "clean_accuracy", "loss"}

    def test_accumulates_gradients(self, monkeypatch):
        x, y = data(24)
        given_start(monkeypatch, np.zeros((12, 4)))
        settings = {"norm": 2, "steps": 3, "step_size": 0.04}
        halves, _ = train(
            smooth(),
            x,
            y,
            compiled={"optimizer": keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)},
            **settings,
        )
        given_start(monkeypatch, np.zeros((24, 4)))
        whole, _ = train(smooth(), x, y, batch_size=24, **settings)
        for one, other in zip(halves, whole, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    def test_leaves_batch_statistics_to_the_training_pass(self):
        x, y = data()
        norm = keras.layers.BatchNormalization(momentum=0.7, center=False, scale=False)
        model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(3)])
        model.layers[-1].set_weights([SLOPES, BIAS])
        train(model, x, y, steps=5, step_size=EPS)
        worst = worst_inputs(x, y)  # before training the moving statistics are 0 and 1
        mean, variance = (ops.convert_to_numpy(one) for one in (norm.moving_mean, norm.moving_variance))
        np.testing.assert_allclose(mean, 0.3 * worst.mean(0), atol=1e-5)
        np.testing.assert_allclose(variance, 0.7 + 0.3 * worst.var(0), atol=1e-5)

    def test_attacks_without_dropout(self):
        x, y = data()
        drops = linear(keras.layers.Dropout(0.9, seed=0))
        _, history = train(drops, x, y, step_size=2 * EPS, method="fgsm")
        rise = cross_entropies(worst_inputs(x, y) @ SLOPES + BIAS, y) - cross_entropies(x @ SLOPES + BIAS, y)
        assert history["attack_strength"] == pytest.approx([rise.mean()], abs=1e-5)

    @pytest.mark.skipif(BACKEND == "jax", reason="a traced step shows no values")
    def test_stays_in_the_ball_and_the_range(self):
        x = np.random.default_rng(0).uniform(0, 255, (40, 4)).astype("float32")
        y = np.arange(40) % 3
        seen = []

        class Spy(keras.layers.Layer):
            def call(self, inputs, training=False):
                if training:
                    seen.append(ops.convert_to_numpy(inputs))
                return inputs

        model = keras.Sequential([keras.Input((4,)), Spy(), keras.layers.Rescaling(1 / 255), keras.layers.Dense(3)])
        options = {"eps": 8.0, "clip_max": 255.0, "compiled": {"run_eagerly": True}, "batch_size": 40}
        for norm in ("inf", 2):
            train(model, x, y, norm=norm, **options)
            delta = seen[-1] - x
            size = np.abs(delta).max(1) if norm == "inf" else np.sqrt((delta**2).sum(1))
            assert 7 < size.max() < 8.001
            assert seen[-1].min() >= 0
            assert seen[-1].max() <= 255

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
    def test_trains_in_other_precisions(self, policy, dtype_policy):
        dtype_policy(policy)
        x, y = data(48)
        _, history = train(smooth(), x, y, epochs=20, compiled={"optimizer": keras.optimizers.SGD(0.1)})
        assert history["loss"][-1] < history["loss"][0]
        assert min(history["attack_strength"]) > 0

    def test_attacks_a_confident_model_in_half_precision_as_well(self, dtype_policy):
        # Where the model is sure, the gradient of the cross-entropy at the logits is smaller than float16 can hold.
        x, slopes = data(400)[0], 40 * SLOPES
        z = x @ slopes + BIAS
        x = x[z[:, 0] > z[:, 1] + 28]
        y = np.zeros(len(x), int)
        expected = ((worst_inputs(x, y, 0.2).clip(0, 1) @ slopes + BIAS).argmax(1) == 0).mean()
        assert 0.1 < expected < 0.9
        dtype_policy("mixed_float16")
        model = linear()
        model.layers[0].set_weights([slopes, BIAS])
        still = keras.optimizers.SGD(0.0)
        _, history = train(model, x, y, eps=0.2, batch_size=len(x), compiled={"optimizer": still})
        assert history["clean_accuracy"] == [1.0]
        assert history["accuracy"] == pytest.approx([expected], abs=0.03)

    @pytest.mark.skipif(BACKEND != "jax", reason="is about JAX")
    def test_of_a_model_that_is_random_at_inference_runs_in_the_loop_of_an_accelerator(self, monkeypatch):
        import jax

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        x, y = data()
        for norm in ("inf", 2):
            model = keras.Sequential([keras.Input((4,)), Random(0.01), linear()])
            _, history = train(model, x, y, norm=norm, epochs=2)
            assert min(history["attack_strength"]) > 0
        (kernel, _), _ = train(linear(), x, y, step_size=2 * EPS)
        worst = worst_inputs(x, y)
        pulls = pull(worst @ SLOPES + BIAS, y, LAM) / len(x)
        np.testing.assert_allclose(kernel, SLOPES - RATE * worst.T @ pulls, atol=1e-5)

    @on_tensorflow
    def test_takes_batches_of_a_shape_not_known_in_advance(self):
        import tensorflow as tf

        x, y = data()
        batches = tf.data.Dataset.from_generator(
            lambda: iter([(x[:, :, None], y)]),
            output_signature=(tf.TensorSpec((None, None, 1), "float32"), tf.TensorSpec((None,), "int32")),
        )
        for norm in ("inf", 2):
            layers = [keras.Input((None, 1)), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
            _, history = train(keras.Sequential(layers), batches, None, batch_size=None, norm=norm)
            assert history["attack_strength"][0] > 0


class TestTraining:
    def test_repeats_itself_with_a_seed(self):
        x, y = data()
        runs = [train(smooth(), x, y, epochs=2, steps=1, seed=seed)[0] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(runs[0][0], runs[1][0])
        assert np.abs(runs[0][0] - runs[2][0]).max() > 1e-7

    def test_warms_up(self):
        x, y = data()
        compiled = {"optimizer": keras.optimizers.SGD(0.0)}
        _, history = train(linear(), x, y, epochs=4, warmup_epochs=2, compiled=compiled, steps=3, step_size=2 * EPS)
        clean = cross_entropies(x @ SLOPES + BIAS, y)
        rises = [
            (cross_entropies(worst_inputs(x, y, share * EPS) @ SLOPES + BIAS, y) - clean).mean()
            for share in (1 / 3, 2 / 3, 1, 1)
        ]
        np.testing.assert_allclose(history["attack_strength"], rises, atol=1e-5)

    def test_evaluates_and_predicts_without_attack(self):
        x, y = data()
        model = linear()
        robust = keras_drsl.AdversarialTraining(model, EPS)
        loss = keras_drsl.DRSLoss(LAM, from_logits=True)
        robust.compile(keras.optimizers.SGD(RATE), loss, metrics=["accuracy"])
        history = robust.fit(x, y, validation_data=(x, y), epochs=2, batch_size=5, verbose=0).history
        z = x @ model.get_weights()[0].astype("float64") + model.get_weights()[1]
        expected = {
            "loss": reference.each(reference.drs_loss, reference.one_hot(y, 3), z, lam=LAM).mean(),
            "accuracy": (z.argmax(1) == y).mean(),
        }
        found = robust.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
        assert found == pytest.approx(expected, abs=1e-5)
        assert {name: history[f"val_{name}"][-1] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert not [name for name in history if name.startswith("val_") and "clean" in name]
        np.testing.assert_allclose(robust.predict(x, verbose=0), z, atol=1e-5)

    def test_saves_the_plain_model(self, tmp_path):
        x, y = data()
        model = linear()
        robust = keras_drsl.AdversarialTraining(model, EPS, steps=2)
        robust.compile("sgd", keras_drsl.DRSLoss(LAM, from_logits=True))
        path = tmp_path / "robust.keras"
        checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True)
        robust.fit(x, y, verbose=0, callbacks=[checkpoint])
        robust.save(path)
        for one in (path, tmp_path / "best.keras"):
            with zipfile.ZipFile(one) as file:
                assert b"keras_drsl" not in file.read("config.json")
        code = """
        import sys, keras, numpy as np
        model = keras.models.load_model(sys.argv[1])
        np.save(sys.argv[2], model.predict(np.load(sys.argv[3]), verbose=0))
        assert "keras_drsl" not in sys.modules
        """
        np.save(tmp_path / "x.npy", x)
        arguments = [str(tmp_path / name) for name in ("robust.keras", "z.npy", "x.npy")]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        np.testing.assert_allclose(np.load(tmp_path / "z.npy"), model.predict(x, verbose=0), atol=1e-6)

    def test_resumes_exactly_after_it_was_killed(self, tmp_path):
        code = """
        import os, sys, keras, numpy as np, keras_drsl
        folder, dies = sys.argv[1], sys.argv[2] == "dies"
        rng = np.random.default_rng(0)
        x, y = rng.uniform(size=(24, 4)).astype("float32"), rng.integers(0, 3, 24)
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dropout(0.3, seed=0), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        robust = keras_drsl.AdversarialTraining(model, 0.1, steps=2, warmup_epochs=3)
        robust.compile(keras.optimizers.Adam(0.01), keras_drsl.DRSLoss(from_logits=True))
        class Dies(keras.callbacks.Callback):
            epochs = 0
            def on_epoch_begin(self, epoch, logs=None):
                self.epochs += 1
            def on_train_batch_end(self, batch, logs=None):
                if dies and self.epochs == 3 and batch == 1:
                    os.kill(os.getpid(), 9)
        backup = keras.callbacks.BackupAndRestore(folder + "/backup")
        counter = Dies()
        robust.fit(x, y, epochs=5, batch_size=8, shuffle=False, verbose=0, callbacks=[backup, counter])
        print(counter.epochs)
        np.savez(folder + "/weights.npz", *model.get_weights())
        """
        weights, epochs = {}, {}
        for name, runs in {"whole": ["lives"], "resumed": ["dies", "lives"]}.items():
            folder = tmp_path / name
            folder.mkdir()
            for run in runs:
                command = [sys.executable, "-c", textwrap.dedent(code), str(folder), run]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == (-9 if run == "dies" else 0), done.stderr[-2000:]
            weights[name], epochs[name] = np.load(folder / "weights.npz"), int(done.stdout)
        assert epochs == {"whole": 5, "resumed": 3}
        for one in weights["whole"].files:
            np.testing.assert_allclose(weights["resumed"][one], weights["whole"][one], rtol=1e-6, atol=1e-7)

    def test_takes_generators_and_data_sets_and_loses_no_batch(self):
        x, y = data(24)
        batches = [(x[at : at + 8], y[at : at + 8]) for at in (0, 8, 16)]
        expected, _ = train(smooth(), x, y, batch_size=8, step_size=2 * EPS)

        class Batches(keras.utils.PyDataset):
            num_batches = 3

            def __getitem__(self, place):
                return batches[place]

        sources = {"generator": (one for one in batches), "PyDataset": Batches()}
        if BACKEND == "tensorflow":
            import tensorflow as tf

            sources["tf.data"] = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        for name, source in sources.items():
            weights, _ = train(smooth(), source, None, batch_size=None, step_size=2 * EPS)
            np.testing.assert_allclose(weights[0], expected[0], atol=1e-6, err_msg=name)

    def test_takes_a_list_of_callbacks_that_keras_made(self):
        x, y = data()
        robust = keras_drsl.AdversarialTraining(linear(), EPS, warmup_epochs=1)
        robust.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
        shares = []
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: shares.append(share(robust)))
        callbacks = keras.callbacks.CallbackList([look], add_history=True, model=robust)
        for _ in range(2):
            robust.fit(x, y, epochs=2, callbacks=callbacks, verbose=0)
        assert shares == [0.5, 1.0, 0.5, 1.0]
        assert len(callbacks.callbacks) == 2

    def test_attacks_in_full_once_it_has_ended(self):
        class Worse(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                logs["worse"] = epoch

        x, y = data()
        robust = keras_drsl.AdversarialTraining(linear(), EPS, warmup_epochs=9)
        robust.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
        stop = keras.callbacks.EarlyStopping("worse", mode="min", restore_best_weights=True)
        robust.fit(x, y, epochs=3, verbose=0, callbacks=[Worse(), stop])
        assert share(robust) == 1.0

    def test_takes_the_one_input_in_a_list(self):
        x, y = data()
        expected, _ = train(smooth(), x, y, step_size=2 * EPS)
        weights, _ = train(smooth(), [x], y, step_size=2 * EPS)
        np.testing.assert_array_equal(weights[0], expected[0])

    def test_on_a_batch_is_a_step_of_fit(self):
        x, y = data()
        expected, history = train(smooth(), x, y, steps=3, step_size=2 * EPS)
        model = smooth()
        robust = keras_drsl.AdversarialTraining(model, EPS, steps=3, step_size=2 * EPS)
        robust.compile(keras.optimizers.SGD(RATE), keras_drsl.DRSLoss(LAM, from_logits=True), metrics=["accuracy"])
        logs = robust.train_on_batch(x, y, return_dict=True)
        assert logs == pytest.approx({name: values[0] for name, values in history.items()}, abs=1e-5)
        np.testing.assert_allclose(model.get_weights()[0], expected[0], atol=1e-6)

    def test_takes_a_method_of_ones_own(self):
        x, y = data()
        method = training.METHODS["pgd"]._replace(learns_from=(training.CLEAN, training.ADVERSARIAL))
        (kernel, _), _ = train(linear(), x, y, method=method, step_size=2 * EPS)
        worst = worst_inputs(x, y)
        gradients = [one.T @ pull(one @ SLOPES + BIAS, y, LAM) / len(x) for one in (x, worst)]
        np.testing.assert_allclose(kernel, SLOPES - RATE * (gradients[0] + gradients[1]) / 2, atol=1e-5)

    def test_on_two_devices_ends_with_the_weights_of_one(self):
        if BACKEND == "torch":
            pytest.skip("on TensorFlow and JAX")
        code = """
        import os, sys, keras, numpy as np, keras_drsl
        from contextlib import nullcontext
        from keras_drsl.attacks import balls

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
        balls.draw = lambda shape, eps, norm, seed: keras.ops.zeros(shape)

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
                robust.compile(optimizer=keras.optimizers.SGD(0.5), loss=loss, metrics=["accuracy"])
            options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
            history = robust.fit(x, y, validation_data=(x, y), **options).history
            return [np.asarray(weight) for weight in model.get_weights()], history

        if not jax:
            with strategy.scope():
                robust = keras_drsl.AdversarialTraining(keras.Sequential([keras.Input((4,))]), 0.1)
            drawn = strategy.run(lambda: keras.random.uniform((5,), seed=robust._starts))
            one, two = map(np.asarray, strategy.experimental_local_results(drawn))
            assert np.abs(one - two).max() > 0.1
            dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
            with strategy.scope():
                model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
                robust = keras_drsl.AdversarialTraining(model, 0.1)
                robust.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
            robust.fit(strategy.experimental_distribute_dataset(dataset), verbose=0)

        for method in ("pgd", "mart"):
            one, two = train(1, method), train(2, method)
            for a, b in zip(one[0], two[0]):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
            assert one[1].keys() == two[1].keys()
            for name in one[1]:
                np.testing.assert_allclose(one[1][name], two[1][name], rtol=1e-4, atol=1e-5, err_msg=name)
        """
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [
            {"eps": 0}, {"eps": -0.1}, {"eps": math.nan}, {"eps": 1.5}, {"method": "PGD"}, {"method": 1}, {"steps": 0},
            {"attack_loss": "ce"},
            {"step_size": 0}, {"norm": 1}, {"beta": -1}, {"clip_min": 1.0}, {"warmup_epochs": -1}, {"seed": -1},
        ],
    )  # fmt: skip
    def test_an_argument_out_of_range_is_named(self, options):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"`{name}`.*Received: .*{value}"):
            keras_drsl.AdversarialTraining(linear(), **{"eps": EPS} | options)

    def test_a_method_with_an_attack_of_its_own_takes_no_other(self):
        for method in ("trades", "clean"):
            received = f"Received: attack_loss='loss', method='{method}'"
            with pytest.raises(ValueError, match=f"`attack_loss` must be left out.* {received}"):
                keras_drsl.AdversarialTraining(linear(), EPS, method=method, attack_loss="loss")

    def test_a_model_must_be_one(self):
        with pytest.raises(ValueError, match="`model` must be a keras.Model. Received: Dense"):
            keras_drsl.AdversarialTraining(keras.layers.Dense(3), EPS)

    def test_a_model_must_take_one_input_of_floats(self):
        one = keras.Input((4,), dtype="uint8", name="pixels")
        model = keras.Model(one, keras.layers.Dense(3)(keras.layers.Rescaling(1 / 255)(one)))
        with pytest.raises(
            ValueError, match="`model` must have one input, of float values. Received: pixels of dtype uint"
        ):
            keras_drsl.AdversarialTraining(model, EPS)
        two = [keras.Input((4,), name=name) for name in ("a", "b")]
        with pytest.raises(ValueError, match="Received: a of dtype float32, b of dtype float32"):
            keras_drsl.AdversarialTraining(keras.Model(two, keras.layers.Add()(two)), EPS)

    def test_a_model_must_have_one_output_and_one_loss(self):
        x, y = data()
        one = keras.Input((4,))
        model = keras.Model(one, {"a": keras.layers.Dense(3)(one)})
        with pytest.raises(ValueError, match="`model` must have one output"):
            train(model, x, y)
        with pytest.raises(ValueError, match="`loss` must be one loss, for one output"):
            train(linear(), x, y, loss=[keras_drsl.DRSLoss(from_logits=True)])

    def test_a_loss_compiled_later_must_fit_as_well(self):
        x, y = data()
        robust = keras_drsl.AdversarialTraining(linear(keras.layers.Softmax()), EPS)
        robust.compile("sgd", keras_drsl.DRSLoss())
        robust.fit(x, y, verbose=0)
        robust.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
        with pytest.raises(ValueError, match="`from_logits=True`, but the outputs of `model` look like probabilities"):
            robust.fit(x, y, verbose=0)

    def test_inputs_must_lie_in_the_range(self):
        x, y = data()
        with pytest.raises(ValueError, match=r"`x` must lie in \[clip_min, clip_max\] = \[0, 1\].*to 255"):
            train(linear(), np.where(x == x[3, 3], 255.0, x), y)

    def test_outputs_must_be_what_the_loss_expects(self):
        x, y = data()
        for loss in (keras_drsl.DRSLoss(), "sparse_categorical_crossentropy"):
            with pytest.raises(
                ValueError, match="`from_logits=False`, but the outputs of `model` are no probabilities"
            ):
                train(linear(), x, y, loss=loss)
        with pytest.raises(ValueError, match="`from_logits=True`, but the outputs of `model` look like probabilities"):
            train(linear(keras.layers.Softmax()), x, y)

    def test_all_of_an_array_is_looked_at(self):
        x, y = data(80)
        for place, value in ((70, 255.0), (71, math.nan)):
            wrong = x.copy()
            wrong[place] = value
            with pytest.raises(ValueError, match="`x` must lie in"):
                train(linear(), wrong, y)
        with pytest.raises(ValueError, match=r"`y` must hold class ids in \[0, 3\). Received: 3"):
            train(linear(), x, np.where(np.arange(80) == 75, 3, y))

    def test_what_is_missing_or_wrapped_twice_is_named(self):
        x, y = data()
        robust = keras_drsl.AdversarialTraining(linear(), EPS)
        with pytest.raises(ValueError, match="Call `compile` of the AdversarialTraining first"):
            robust.fit(x, y)
        with pytest.raises(ValueError, match="`model` must be a plain model. Received: an AdversarialTraining"):
            keras_drsl.AdversarialTraining(robust, EPS)

    def test_a_training_that_ends_before_its_warmup_is_warned_of(self):
        with pytest.warns(UserWarning, match="`epochs=2` ends before `warmup_epochs=2` do"):
            train(linear(), *data(), epochs=2, warmup_epochs=2)

    @on_tensorflow
    def test_a_data_set_without_batches_is_explained(self):
        import tensorflow as tf

        with pytest.raises(ValueError, match="a tf.data.Dataset: call `.batch`"):
            train(linear(), tf.data.Dataset.from_tensor_slices(data()), None, batch_size=None)

    def test_labels_and_examples_are_asked_for(self):
        x, y = data()
        with pytest.raises(ValueError, match="`x` must hold inputs, or give batches of them. Received: x=None"):
            train(linear(), None, None)
        for without, labels in ((x[:0], y[:0]), ([], None)):
            with pytest.raises(ValueError, match="`x` must hold at least one example. Received: none"):
                train(linear(), without, labels)
        for without in (x, iter([x])):
            with pytest.raises(ValueError, match="`y` must hold labels, or `x` give batches `.inputs, labels.`"):
                train(linear(), without, None)

    def test_a_loss_must_return_a_value_an_example(self):
        x, y = data()

        def scalar(y_true, y_pred):
            return ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True))

        class Scalar(keras.losses.Loss):
            def call(self, y_true, y_pred):
                return scalar(y_true, y_pred)

        for loss in (scalar, Scalar()):
            with pytest.raises(ValueError, match=r"`loss` must return one value an example, shape \(batch,\)"):
                train(linear(), x, y, loss=loss)

    def test_one_input_an_example(self):
        x, y = data()
        with pytest.raises(ValueError, match="`x` must hold one input an example, not several. Received: dict"):
            train(linear(), {"a": x, "b": x}, y)

    @pytest.mark.parametrize(("made_by_keras", "epoch"), [(False, 1), (False, 2), (True, 2)])
    def test_a_nan_stops_training_and_leaves_the_last_good_weights(self, made_by_keras, epoch):
        class Rate(keras.optimizers.schedules.LearningRateSchedule):
            """NaN for an epoch's second batch, so that its update makes the weights NaN, and the loss of the third."""

            def __call__(self, step):
                return ops.where(ops.equal(ops.cast(step, "int32"), 3 * epoch - 2), math.nan, 0.1)

        x, y = data(24)
        model = smooth()
        kept = [model.get_weights()]
        keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(model.get_weights()))
        robust = keras_drsl.AdversarialTraining(model, EPS, steps=1)
        robust.compile(keras.optimizers.Adam(Rate()), keras_drsl.DRSLoss(from_logits=True))
        settings = {"batch_size": 8, "shuffle": False, "verbose": 0}
        callbacks = keras.callbacks.CallbackList([keep], model=robust) if made_by_keras else [keep]
        with pytest.raises(ValueError, match=f"must be finite. Received: loss=nan in epoch {epoch}, step 3"):
            robust.fit(x, y, epochs=5, callbacks=callbacks, **settings)
        assert len(kept) == epoch
        for one, other in zip(model.get_weights(), kept[-1], strict=True):
            np.testing.assert_array_equal(one, other)
        robust.optimizer.iterations.assign(5)
        assert np.isfinite(robust.fit(x, y, **settings).history["loss"][0])
