"""Models that are random at inference, averaged over several calls by `expectation_draws=`."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, cli, evaluate_robustness, robustness_curve
from keras_drsl.attacks import APGD, PGD, Noise, Square
from keras_drsl.models import find_logits
from keras_drsl.models.state import random_counters
from tests.backends import BACKEND
from tests.helpers import some_short
from tests.layers import Random
from tests.linear import UNIT, unit_inputs

EPS, NOISE, DRAWS = 0.1, 0.1, 24
HEADS = ("logits", "softmax", "unit", "sigmoid")


def random_model(head, noise=NOISE):
    """Return a linear model with noise in its inputs: by symmetry, its average predicts as the model without noise."""
    units = 1 if head in ("unit", "sigmoid") else 2
    dense = layers.Dense(units, activation={"softmax": "softmax", "sigmoid": "sigmoid"}.get(head))
    model = keras.Sequential([keras.Input((4,)), Random(noise), dense])
    weight = 4 * UNIT
    kernel = weight[:, None] if units == 1 else np.stack([-weight / 2, weight / 2], axis=1)
    bias = np.array([-weight.sum() / 2]) if units == 1 else np.array([weight.sum(), -weight.sum()]) / 4
    dense.set_weights([kernel, bias])
    return model


def counters_of(model):
    return [ops.convert_to_numpy(counter).tolist() for counter in random_counters(model)]


@pytest.mark.parametrize("head", some_short(HEADS, "softmax"))
def test_the_average_is_that_of_the_probabilities(head):
    model = random_model(head)
    x, _, _ = unit_inputs(8)
    classifier = find_logits(model, x, expectation_draws=6).classifier
    counters = random_counters(model)
    before = [ops.convert_to_numpy(counter) for counter in counters]
    found = classifier.logits(x)
    answers = np.empty((6, *ops.shape(model(x))))
    for draw in range(6):
        for counter, value in zip(counters, before, strict=True):
            # JAX makes all calls at once, each with 4,096 numbers of its own.
            counter.assign(value + np.array([0, 4096 * draw if BACKEND == "jax" else draw], "uint32"))
        answers[draw] = ops.convert_to_numpy(model(x))
    assert np.ptp(answers, axis=0).max() > 0.05
    if head in ("unit", "sigmoid"):
        p = answers if head == "sigmoid" else 1 / (1 + np.exp(-answers))
        p = np.concatenate([1 - p, p], axis=-1)
    else:
        p = answers if head == "softmax" else np.exp(answers) / np.exp(answers).sum(axis=-1, keepdims=True)
    average = p.mean(axis=0)
    log_ratio = np.log(average[:, 1]) - np.log(average[:, 0])
    np.testing.assert_allclose(found[:, 1] - found[:, 0], log_ratio, atol=1e-4)
    assert np.abs(classifier.logits(x) - found).max() > 0.01, "the next call must draw other numbers"


@pytest.mark.parametrize("head", some_short(HEADS, more=("softmax", "unit", "sigmoid")))
def test_the_verdict_is_that_of_the_model_without_noise(head):
    x, y, size = unit_inputs()
    model = random_model(head)
    before = counters_of(model)
    attacks, checks = [APGD(EPS, loss="margin", targeted=True, steps=10)], ["deterministic", "independent_rows"]
    options = {"eps": EPS, "attacks": attacks, "checks": checks, "verbose": 0, "expectation_draws": DRAWS}
    report = evaluate_robustness(model, x, y, **options)
    assert counters_of(model) == before
    assert report.settings["expectation_draws"] == DRAWS
    robust = np.array([name is None for name in report.per_example["broken_by"]])
    # The average of so many draws moves the limit of the ball by about 0.01.
    clear = np.abs(size - EPS) > 0.03
    assert 0.2 < robust[clear].mean() < 0.8
    np.testing.assert_array_equal(robust[clear], (size > EPS)[clear])
    checks = {check.name: check for check in report.checks}
    assert checks["independent_rows"].status == "skipped"
    # The average noise is normal: an average is wrong with probability p, and two of them differ with 2 p (1 - p).
    margin = size * np.abs(UNIT).sum()
    p = np.array([math.erfc(m / (NOISE * np.linalg.norm(UNIT) / math.sqrt(DRAWS)) / math.sqrt(2)) / 2 for m in margin])
    expected = (2 * p * (1 - p)).mean()
    assert abs(checks["deterministic"].value - expected) < 3 * math.sqrt(expected / len(x))
    share = checks["deterministic"].value
    assert checks["deterministic"].status == ("pass" if share <= 0.01 else "warn" if share <= 0.05 else "fail")
    assert evaluate_robustness(model, x, y, **options).per_example == report.per_example


def test_a_random_model_fails_a_check_until_it_is_averaged_enough():
    x, y, _ = unit_inputs()
    options = {"eps": EPS, "attacks": ["noise"], "checks": ["deterministic"], "verbose": 0}

    def check(model, draws):
        return evaluate_robustness(model, x, y, expectation_draws=draws, **options).checks[0]

    assert check(random_model("logits"), 1).status == "fail"
    assert "give expectation_draws=20" in check(random_model("logits"), 1).message
    found = check(random_model("logits", noise=2.0), 2)
    assert (found.status, found.value > 0.05) == ("fail", True)
    assert "two averages of 2 draws: average over more" in found.message
    assert check(random_model("logits", noise=0.001), 20).status == "pass"


def test_a_stopped_evaluation_ends_as_one_that_was_not(tmp_path):
    x, y, _ = unit_inputs()
    options = {"eps": EPS, "checks": ["noise"], "verbose": 0, "expectation_draws": 3, "batch_size": 16}

    class Limited(keras_drsl.attacks.PGD):
        calls = 0

        def run(self, classifier, batch):
            type(self).calls += 1
            if type(self).calls == 2:
                raise KeyboardInterrupt
            return super().run(classifier, batch)

    attacks = ["fgsm_ce", Limited(EPS, loss="margin", steps=20)]
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(random_model("softmax"), x, y, state_path=tmp_path / "state", attacks=attacks, **options)
    resumed = evaluate_robustness(
        random_model("softmax"), x, y, state_path=tmp_path / "state", attacks=attacks, **options
    )
    whole = evaluate_robustness(random_model("softmax"), x, y, attacks=attacks, **options)
    assert resumed.per_example == whole.per_example
    assert len(set(whole.per_example["broken_by"])) > 2


@pytest.mark.more
def test_curve_monitor_training_and_command_average_too(tmp_path, capsys):
    x, y, _ = unit_inputs()
    model = random_model("logits")
    curve = robustness_curve(model, x, y, eps=[EPS], suite="quick", expectation_draws=3, verbose=0)
    assert curve.settings["expectation_draws"] == 3
    robust = AdversarialTraining(model, 0.02, steps=2, expectation_draws=3)
    robust.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    monitor = RobustnessMonitor(x, y, eps=0.02, expectation_draws=3)
    history = robust.fit(x, y, epochs=2, callbacks=[monitor], verbose=0).history
    assert 0 < history["val_robust_accuracy"][-1] <= 1
    assert monitor.report.settings["expectation_draws"] == 3
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    command = ["evaluate", str(tmp_path / "model.keras"), "--dataset", str(tmp_path / "data.npz"), "--eps", "0.1"]
    options = ["--suite", "quick", "--quiet", "--expectation-draws", "3", "--out", str(tmp_path / "report.json")]
    assert cli.main(command + options) == 0
    report = keras_drsl.RobustnessReport.from_json(tmp_path / "report.json")
    assert report.settings["expectation_draws"] == 3


def checks_of(model, x, y, draws=4):
    options = {"eps": EPS, "attacks": ["noise"], "checks": ["deterministic", "independent_rows"], "verbose": 0}
    report = evaluate_robustness(model, x, y, expectation_draws=draws, **options)
    return {check.name: check for check in report.checks}


@pytest.mark.short
def test_averages_hide_no_dependence_on_the_batch():
    class Centred(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x - ops.mean(x, axis=0, keepdims=True))

    x, y, _ = unit_inputs()
    found = checks_of(Centred(), x, y)
    assert (found["deterministic"].status, found["independent_rows"].status) == ("pass", "fail")


def test_noise_that_is_compiled_into_a_program_fails_a_check():
    class NumpyNoise(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x + np.random.normal(0, 0.3, 4).astype("float32"))

    x, y, _ = unit_inputs()
    found = checks_of(NumpyNoise(), x, y)["deterministic"]
    # Nothing is compiled on torch.
    assert ("compiled, the model always draws" in found.message) == (BACKEND != "torch")
    assert found.status == "fail" or BACKEND == "torch"


@pytest.mark.more
def test_an_average_of_equal_answers_is_no_harder_to_attack():
    x = np.random.default_rng(0).random((120, 16)).astype("float32")
    model = keras.Sequential([keras.Input((16,)), layers.Dense(64, "relu"), layers.Dense(10)])
    model.layers[0].set_weights([2 * weight for weight in model.layers[0].get_weights()])
    y = model.predict(x, verbose=0).argmax(axis=1)
    for attack in (PGD(0.05, steps=20), APGD(0.05, steps=30), Square(0.05, queries=300), Noise(0.05)):
        options = {"eps": 0.05, "attacks": [attack], "checks": [], "verbose": 0}
        once, twice = (
            evaluate_robustness(model, x, y, expectation_draws=draws, **options).robust_accuracy for draws in (1, 2)
        )
        assert twice <= once < 1, attack


def test_only_seeds_are_seeded():
    class Ordered(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)
            self.order = self.add_weight(shape=(2,), dtype="int32", initializer="zeros", trainable=False)
            self.order.assign([1, 0])

        def call(self, x):
            return ops.take(self.dense(x), ops.convert_to_tensor(self.order), axis=1)

    x, y, _ = unit_inputs()
    assert checks_of(Ordered(), x, y)["deterministic"].status == "pass"


def test_the_pool_and_the_clean_answers_depend_on_the_seed_only():
    x, y, _ = unit_inputs()
    model = random_model("logits", noise=0.5)
    options = {"expectation_draws": 2, "verbose": 0, "checks": []}
    attacks = [APGD(EPS, loss="margin", targeted=True, steps=2)]
    first, second = (evaluate_robustness(model, x, y, eps=EPS, attacks=attacks, **options) for _ in range(2))
    assert first.to_dict()["provenance"] == second.to_dict()["provenance"]
    curves = [robustness_curve(model, x, y, eps=[0, EPS], suite="quick", **options).accuracy for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0][0] == first.clean_accuracy


@pytest.mark.parametrize("draws", [0, 1.5, "two", True])
def test_draws_that_are_no_number_are_refused(draws):
    x, y, _ = unit_inputs(4)
    with pytest.raises(ValueError, match="`expectation_draws` must be an integer of 1 or more. Received:"):
        evaluate_robustness(random_model("logits"), x, y, eps=EPS, expectation_draws=draws, verbose=0)
