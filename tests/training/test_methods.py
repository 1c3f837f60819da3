"""The training methods: expected values come from loops in NumPy and float64, or from a closed form."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import DRSLoss
from keras_drsl.models import Classifier
from keras_drsl.training import METHODS, Method, cross_entropy, improved_kl_penalty, inner_attack
from keras_drsl.training.inner_attack import InnerAttack, ReplicaSeeds
from tests import reference
from tests.backends import BACKEND
from tests.training.cases import (
    BIAS,
    EPS,
    LAM,
    RATE,
    SLOPES,
    cross_entropies,
    data,
    drs_gradient,
    drs_losses,
    linear,
    smooth,
    softmax,
    train,
    worst_inputs,
    wrap,
)

# A step so small that the attack stays where it starts.
NO_STEP = {"steps": 1, "step_size": 1e-12}


def fixed_start(name):
    """Return the method, with an attack that starts where the fixture `start_at` says."""
    return METHODS[name].replace(start_near_input=False)


# In L-inf, one large step ends in the worst corner. In L2 the attack turns to the worst point step by step, so one
# step from a random start does not reach it.
@pytest.mark.parametrize(("method", "norm"), [("pgd", "inf"), ("fgsm", "inf"), ("pgd", 2)])
@pytest.mark.short
def test_learns_from_worst_inputs_of_linear_model(method, norm):
    x, y = data()
    steps = {"steps": 8, "step_size": 10 * EPS} if norm == 2 else {"step_size": 2 * EPS}
    worst = worst_inputs(x, y, norm=norm)
    z, z_worst = x @ SLOPES + BIAS, worst @ SLOPES + BIAS
    upstream = drs_gradient(z_worst, y, LAM) / len(x)

    (kernel, bias), history = train(linear(), x, y, method=method, norm=norm, graph=method == "pgd", **steps)

    np.testing.assert_allclose(kernel, SLOPES - RATE * worst.T @ upstream, atol=1e-5)
    np.testing.assert_allclose(bias, BIAS - RATE * upstream.sum(0), atol=1e-5)
    assert history["loss"] == pytest.approx([drs_losses(z_worst, y).mean()], abs=1e-5)
    assert history["accuracy"] == pytest.approx([(z_worst.argmax(1) == y).mean()])
    assert history["clean_accuracy"] == pytest.approx([(z.argmax(1) == y).mean()])
    increase = cross_entropies(z_worst, y) - cross_entropies(z, y)
    assert history["attack_strength"] == pytest.approx([increase.mean()], abs=1e-5)


@pytest.mark.parametrize("head", ["logits", "softmax"])
@pytest.mark.parametrize("attack_loss", ["margin", "loss"])
def test_attack_increases_another_loss(attack_loss, head, start_at):
    # For class 1, separating the logits of 0 and 2 and making 0 win need opposite inputs: with a large `lam` the loss
    # rises where the cross-entropy falls.
    x, _ = data()
    y = np.ones(12, int)
    start_at(np.zeros_like(x))
    slopes = np.stack([np.zeros(4), SLOPES[:, 1], -2 * SLOPES[:, 1]], axis=1)
    layers = [keras.layers.Softmax()] if head == "softmax" else []
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, use_bias=False), *layers])
    model.layers[0].set_weights([slopes])
    options = {"attack_loss": attack_loss, "step_size": 2 * EPS, "graph": head == "softmax"}
    loss = DRSLoss(5.0, from_logits=head == "logits")
    _, history = train(model, x, y, loss=loss, optimizer=keras.optimizers.SGD(0.0), **options)
    down = -EPS * np.sign(SLOPES[:, 1])
    corners = {sign: (x + sign * down).astype("float64") @ slopes for sign in (1, -1)}
    losses = {
        "margin": lambda z: np.maximum(z[:, 0], z[:, 2]) - z[:, 1],
        "loss": lambda z: drs_losses(z, y, lam=5.0),
    }[attack_loss]
    best = np.where((losses(corners[1]) > losses(corners[-1]))[:, None], corners[1], corners[-1])
    assert history["loss"] == pytest.approx([drs_losses(best, y, lam=5.0).mean()], rel=1e-4)


def test_clean_method_is_plain_training():
    x, y = data()
    plain = smooth()
    plain.compile(keras.optimizers.SGD(RATE), DRSLoss(LAM, from_logits=True), run_eagerly=BACKEND != "jax")
    plain.fit(x, y, epochs=2, batch_size=5, shuffle=False, verbose=0)
    weights, history = train(smooth(), x, y, epochs=2, batch_size=5, method="clean", graph=False)
    for weight, expected in zip(weights, plain.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)
    assert history["attack_strength"] == [0.0, 0.0]
    assert history["accuracy"] == history["clean_accuracy"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["trades", "mart"])
def test_penalty_of_method_is_added(method, weighted, start_at):
    x, y = data()
    delta = np.random.default_rng(3).uniform(-EPS, EPS, x.shape).astype("float32")
    attacked = x + delta
    start_at(delta)
    sample_weight = np.random.default_rng(4).uniform(0, 2, len(x)) if weighted else np.ones(len(x))

    def losses(kernel):
        z, z_adv = x @ kernel + BIAS, attacked @ kernel + BIAS
        p, q = softmax(z), softmax(z_adv)
        divergence = (p * np.log(p / q)).sum(1)
        if method == "trades":
            return drs_losses(z, y) + 5 * divergence
        is_true = reference.one_hot(y, 3)
        largest_other = np.where(is_true == 1, 0, q).max(1)
        true = (is_true * p).sum(1)
        return drs_losses(z_adv, y) - np.log(1.0001 - largest_other) + 5 * divergence * (1 - true)

    fit = {"sample_weight": sample_weight} if weighted else {}
    options = {"method": fixed_start(method), "beta": 5.0, "graph": weighted, **NO_STEP}
    (kernel, _), history = train(linear(), x, y, fit=fit, **options)
    mean = lambda kernel: (sample_weight * losses(kernel)).mean()
    np.testing.assert_allclose(kernel, SLOPES - RATE * reference.gradient(mean, SLOPES), atol=1e-4)
    if BACKEND != "jax" or not weighted:
        assert history["loss"] == pytest.approx([mean(SLOPES)], abs=1e-4)


@pytest.mark.short
def test_improved_divergence_weights_pairs_of_classes():
    rng = np.random.default_rng(0)
    y = np.array([2, 0, 2, 1, 0, 2])
    p, q = softmax(rng.normal(size=(6, 4))), softmax(rng.normal(size=(6, 4)))
    expected = []
    for row in range(6):
        weights = np.mean([p[other] for other in range(6) if y[other] == y[row]], axis=0)
        changes = np.log(p[row]) - np.log(q[row])
        pairs = sum(weights[j] * weights[k] * (changes[j] - changes[k]) ** 2 for j in range(4) for k in range(4))
        expected.append(3.0 * (pairs / 4 - sum(p[row] * np.log(q[row]))))
    log_p, log_q = (ops.convert_to_tensor(np.log(some).astype("float32")) for some in (p, q))
    found = improved_kl_penalty(log_p, log_q, ops.convert_to_tensor(y), 3.0)
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-5)


def test_improved_divergence_pulls_the_clean_prediction_too(start_at):
    # Neither the weights nor the probabilities in the sum pass a gradient.
    x, y = data()
    delta = np.random.default_rng(3).uniform(-EPS, EPS, x.shape).astype("float32")
    start_at(delta)
    fixed = softmax(x @ SLOPES + BIAS)
    weights = np.stack([fixed[y == label].mean(axis=0) for label in y])

    def losses(kernel):
        z, z_adv = x @ kernel + BIAS, (x + delta) @ kernel + BIAS
        changes = np.log(softmax(z)) - np.log(softmax(z_adv))
        variance = (weights * changes**2).sum(1) - (weights * changes).sum(1) ** 2
        return drs_losses(z, y) + 5 * (variance / 2 - (fixed * np.log(softmax(z_adv))).sum(1))

    method = fixed_start("trades").replace(penalty=improved_kl_penalty)
    (kernel, _), _ = train(linear(), x, y, method=method, beta=5.0, graph=False, **NO_STEP)
    mean = lambda kernel: losses(kernel).mean()
    np.testing.assert_allclose(kernel, SLOPES - RATE * reference.gradient(mean, SLOPES), atol=1e-4)


def test_consistency_compares_two_random_copies(monkeypatch):
    x, y = data()
    x[0], x[1] = 0, 1  # Their copies leave the valid range, and are not clipped.
    units = np.random.default_rng(3).uniform(-1, 1, (2, *x.shape)).astype("float32")
    remaining = iter(units)

    def random_delta(shape, bounds, norm, seed):
        assert norm == "inf"
        return bounds.eps * ops.convert_to_tensor(next(remaining))

    monkeypatch.setattr(inner_attack, "random_delta", random_delta)

    def losses(kernel):
        is_true = reference.one_hot(y, 3)
        copies = [(x + EPS * unit) @ kernel + BIAS for unit in units]
        leads = [(z * (is_true - (1 - is_true) / 2)).sum(1) for z in copies]
        return sum(drs_losses(z, y) for z in copies) / 2 + 5 * (leads[0] - leads[1]) ** 2

    (kernel, _), history = train(linear(), x, y, method="consistency", beta=5.0, graph=False)
    mean = lambda kernel: losses(kernel).mean()
    np.testing.assert_allclose(kernel, SLOPES - RATE * reference.gradient(mean, SLOPES), atol=1e-4)
    assert history["loss"] == pytest.approx([mean(SLOPES)], abs=1e-4)
    assert history["clean_accuracy"] == pytest.approx([(np.argmax(x @ SLOPES + BIAS, 1) == y).mean()])
    assert next(remaining, None) is None


def slope_of_drs(x, y):
    """Return the gradient of DRSLoss with respect to the inputs of the linear model."""
    return drs_gradient(x @ SLOPES + BIAS, y, LAM) @ SLOPES.T


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_flat_adds_the_slope_along_the_attack(norm, warmup_epochs):
    x, y = data()
    x[0], x[1] = 0, 1  # They leave the valid range, and are not clipped.
    slope, step = slope_of_drs(x.astype("float64"), y), 0.02
    direction = np.sign(slope) if norm == "inf" else slope / np.linalg.norm(slope, axis=1, keepdims=True)
    radius = EPS / (warmup_epochs + 1)  # in the first epoch

    def losses(kernel):
        here, there = (drs_losses(points @ kernel + BIAS, y) for points in (x, x + step * direction))
        return here + radius / step * (there - here)

    options = {"method": "flat", "step_size": step, "norm": norm, "warmup_epochs": warmup_epochs, "graph": norm == 2}
    if warmup_epochs:
        options["fit"] = {"epochs": 1}
        with pytest.warns(UserWarning, match="warmup_epochs"):
            (kernel, _), history = train(linear(), x, y, **options)
    else:
        (kernel, _), history = train(linear(), x, y, **options)
    mean = lambda kernel: losses(kernel).mean()
    np.testing.assert_allclose(kernel, SLOPES - RATE * reference.gradient(mean, SLOPES), atol=1e-4)
    assert history["loss"] == pytest.approx([mean(SLOPES)], abs=1e-4)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX calls no layer in a compiled step")
def test_flat_calls_the_model_three_times_a_step():
    class Counted(keras.layers.Layer):
        calls = 0

        def call(self, x):
            self.calls += 1
            return x

    counted = Counted()
    robust = wrap(keras.Sequential([linear(), counted]), method="flat", graph=False)
    robust.train_on_batch(*data())
    before = counted.calls
    robust.train_on_batch(*data())
    # For the gradient at the input, whose logits are logged too, and for the loss at both ends of the step.
    assert counted.calls - before == 3


def test_flat_adds_the_dual_norm_of_the_gradient():
    x, y = data()
    _, history = train(linear(), x, y, method="flat", step_size=1e-3, graph=False)
    norm = np.abs(slope_of_drs(x.astype("float64"), y)).sum(1)
    plain = drs_losses(x @ SLOPES + BIAS, y)
    assert history["loss"] == pytest.approx([(plain + EPS * norm).mean()], abs=1e-3)
    assert (EPS * norm).mean() > 0.02  # so that the test can fail


def test_nfgsm_starts_in_twice_the_ball(start_at):
    x, y = data()
    x[0], x[1] = 0, 1
    delta = np.random.default_rng(3).uniform(-EPS, EPS, x.shape).astype("float32")
    start_at(delta)
    start = (x + 2 * delta).astype("float64")
    p = softmax(start @ SLOPES + BIAS)
    points = start + EPS * np.sign((p - reference.one_hot(y, 3)) @ SLOPES.T)
    (kernel, _), _ = train(linear(), x, y, method="nfgsm", graph=False)
    upstream = drs_gradient(points @ SLOPES + BIAS, y, LAM) / len(x)
    np.testing.assert_allclose(kernel, SLOPES - RATE * points.T @ upstream, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"learns_from": ("clean",)}, {"loss_fn": None}, {"single_step": False}, {"clips": True}]
)
def test_a_slope_needs_one_free_step(changes):
    with pytest.raises(ValueError, match="`slope` must be False unless"):
        METHODS["flat"].replace(**changes)


def test_a_start_radius_is_not_negative():
    with pytest.raises(ValueError, match="`start_radius` must be a non-negative number"):
        METHODS["fgsm"].replace(start_radius=-1.0)


@pytest.mark.skipif(BACKEND == "jax", reason="a traced step shows no values")
def test_trades_attack_reaches_edge_of_ball(monkeypatch):
    points = []
    project = inner_attack.project

    def spy(*arguments):
        points.append(ops.convert_to_numpy(project(*arguments)))
        return project(*arguments)

    monkeypatch.setattr(inner_attack, "project", spy)
    x, y = data()
    train(linear(), x, y, method="trades", graph=False)
    assert 1e-4 < np.abs(points[0] - x).max() < 0.01
    # The divergence increases both ways along the one direction that changes the prediction.
    corners = [worst_inputs(x, np.full(len(x), label)) for label in (0, 1)]
    distance = np.minimum(*[np.abs(points[-1] - corner).max(1) for corner in corners])
    np.testing.assert_allclose(distance, 0, atol=1e-5)


@pytest.mark.parametrize("method", ["trades", "mart"])
def test_clean_and_attacked_inputs_get_equal_noise(method, start_at):
    x, y = data()
    start_at(np.zeros_like(x))
    losses = []
    for beta in (0.0, 100.0):
        keras.utils.set_random_seed(0)
        noisy = keras.Sequential([keras.Input((4,)), keras.layers.GaussianNoise(0.5, seed=0), linear()])
        options = {"method": fixed_start(method), "beta": beta, "epochs": 2, "graph": False, **NO_STEP}
        losses.append(train(noisy, x, y, **options)[1]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][1], abs=1e-3)


def test_method_of_ones_own_is_trained():
    x, y = data()
    method = Method(learns_from=("clean", "adversarial"), loss_fn=lambda logits, batch: cross_entropy(logits, batch))
    (kernel, _), _ = train(linear(), x, y, method=method, step_size=2 * EPS, graph=False)
    gradients = [inputs.T @ drs_gradient(inputs @ SLOPES + BIAS, y, LAM) / len(x) for inputs in (x, worst_inputs(x, y))]
    np.testing.assert_allclose(kernel, SLOPES - RATE * (gradients[0] + gradients[1]) / 2, atol=1e-5)


def test_loss_fn_receives_the_clean_batch():
    x, y = data()
    labels = reference.one_hot(y, 3).astype("float32")
    received = []

    def loss_fn(logits, batch):
        received.append((logits, batch))
        return cross_entropy(logits, batch)

    train(linear(), x, labels, method=Method(loss_fn=loss_fn), steps=1, graph=False)
    logits, batch = received[0]
    assert tuple(logits.shape) == tuple(batch.logits.shape) == (12, 3)
    if BACKEND != "jax":
        values = [ops.convert_to_numpy(value) for value in batch]
        for value, expected in zip(values, [x, y, labels, x @ SLOPES + BIAS], strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("learns_from", [(), "clean", ("noise",)])
def test_method_that_learns_from_nothing_known_fails(learns_from):
    with pytest.raises(ValueError, match="`learns_from` must be .*Received: learns_from="):
        METHODS["pgd"].replace(learns_from=learns_from)


# B5
@pytest.mark.parametrize("name", METHODS)
def test_the_search_of_a_method_scales_with_the_range(name):
    x, y = data()
    model = Classifier(linear())
    in_pixels = Classifier(lambda pixels: model(pixels / 256))
    batches = []
    for scale, classifier in ((1, model), (256, in_pixels)):
        threat = keras_drsl.ThreatModel(EPS * scale, clip_max=scale)
        # The loss given to `compile` is known to `AdversarialTraining` only.
        method = METHODS[name].replace(loss_fn=cross_entropy) if name == "flat" else METHODS[name]
        attack = InnerAttack(method, threat, steps=2, step_size=0.02 * scale, seeds=ReplicaSeeds(0))
        batch = attack(classifier, scale * x, y, keras.Variable(1.0))
        batches.append([keras.ops.convert_to_numpy(values) / scale for values in (batch.clean, batch.adversarial)])
    np.testing.assert_allclose(batches[1], batches[0], atol=1e-6)


@pytest.mark.parametrize("span", [1, 255])
def test_a_start_near_the_input_moves_half_precision(span):
    x, y = data()
    threat = keras_drsl.ThreatModel(0.03 * span, clip_max=span)
    method = METHODS["trades"].replace(loss_fn=lambda logits, batch: keras.ops.sum(0 * logits, axis=-1))
    attack = InnerAttack(method, threat, steps=1, step_size=0.01 * span, seeds=ReplicaSeeds(0))
    pixels = np.repeat(span * x, 16, axis=1).astype("float32")
    start = attack(Classifier(lambda z: z[:, :3]), pixels, y, keras.Variable(1.0)).adversarial
    moved = keras.ops.cast(start, "bfloat16") != keras.ops.cast(pixels, "bfloat16")
    assert keras.ops.convert_to_numpy(keras.ops.any(moved, axis=1)).all()
