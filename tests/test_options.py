"""Every option that says how a model and its inputs are looked at means the same in every call that takes it."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, cli, evaluate_robustness, robustness_curve
from tests.backends import values

WEIGHT = np.array([1.0, -0.8, 0.5, 0.2])
LOW, HIGH = np.array([0.0, 0.0, -100.0, 0.0]), np.array([100.0, 100.0, 100.0, 300.0])
EPS, MASK = np.array([8.0, 2.0, 20.0, 40.0]), np.array([False, False, False, True])
CONTEXT = np.array([0.3, -0.2])


def rescale():
    """Return a model in front of another, which changes the scale of one of two inputs."""
    image, context = keras.Input((4,), name="image"), keras.Input((2,), name="context")
    return keras.Model(
        {"image": image, "context": context}, {"image": layers.Rescaling(0.01)(image), "context": context}
    )


OPTIONS = {
    "eps": EPS.tolist(),
    "clip_min": LOW.tolist(),
    "clip_max": HIGH.tolist(),
    "mask": MASK.tolist(),
    "output": "cat",
    "preprocessing": rescale(),
    "expectation_draws": 2,
    "attack_input": "image",
    "task": "multilabel",
    "which": 1,
}


@pytest.fixture(scope="module")
def case():
    """Return a model, inputs and labels, and which examples are robust by the closed form of a linear model."""
    image, context = keras.Input((4,), name="image"), keras.Input((2,), name="context")
    units = layers.Dense(2)
    outputs = {"depth": layers.Dense(3)(image), "cat": units(layers.Concatenate()([image, context]))}
    model = keras.Model({"image": image, "context": context}, outputs)
    rng = np.random.default_rng(0)
    x = {
        "image": rng.uniform(0.25 * HIGH, 0.75 * HIGH, (80, 4)).astype("float32"),
        "context": rng.random((80, 2)).astype("float32"),
    }
    margin = (0.01 * x["image"]) @ WEIGHT + x["context"] @ CONTEXT
    border = np.median(margin)
    # The other label does not depend on the inputs.
    kernel = np.stack([np.zeros(6), np.concatenate([WEIGHT, CONTEXT])], axis=1)
    units.set_weights([kernel, np.array([-1.0, -border])])
    # The mask leaves three features, each of which moves the logit by its eps times its weight.
    reach = 0.01 * (EPS * np.abs(WEIGHT))[~MASK].sum()
    robust = np.abs(margin - border) > reach
    assert 0.2 < robust.mean() < 0.8
    return model, x, np.stack([np.zeros(80), margin > border], axis=1).astype("int32"), robust


def evaluate(model, x, y, folder):
    return evaluate_robustness(model, x, y, suite="quick", checks=[], verbose=0, **OPTIONS)


def monitor(model, x, y, folder):
    callback = RobustnessMonitor(x, y, **OPTIONS)
    callback.set_model(model)
    callback.set_params({})
    callback.on_train_begin()
    callback.on_epoch_end(0, {})
    return callback.report


def command(model, x, y, folder):
    model.save(folder / "model.keras")
    OPTIONS["preprocessing"].save(folder / "front.keras")
    np.savez(folder / "data.npz", y=y, **x)
    arguments = {
        "--dataset": folder / "data.npz",
        "--out": folder / "report.json",
        "--suite": "quick",
        "--mask": ",".join(str(int(masked)) for masked in MASK),
        "--output": "cat",
        "--preprocessing": folder / "front.keras",
        "--expectation-draws": 2,
        "--attack-input": "image",
        "--task": "multilabel",
        "--which": 1,
    } | {f"--{name}": numbers(OPTIONS[name.replace("-", "_")]) for name in ("eps", "clip-min", "clip-max")}
    options = [f"{name}={value}" for name, value in arguments.items()]
    assert cli.main(["evaluate", str(folder / "model.keras"), "--quiet", *options]) == 0
    return keras_drsl.RobustnessReport.from_json(folder / "report.json")


def numbers(values):
    return ",".join(f"{value:g}" for value in values)


@pytest.mark.parametrize("call", [evaluate, monitor, command])
def test_a_report_has_the_exact_verdict_and_names_the_options(case, tmp_path, call):
    model, x, y, robust = case
    report = call(model, x, y, tmp_path)
    assert report.clean_accuracy == 1
    np.testing.assert_array_equal([name is None for name in report.per_example["broken_by"]], robust)
    settings = json.loads(json.dumps(report.to_dict()["settings"]))
    assert settings["preprocessing"].startswith("Functional ")
    for name in OPTIONS.keys() - {"preprocessing"}:
        assert settings[name] == OPTIONS[name], name


def test_a_curve_has_the_exact_verdict(case):
    model, x, y, robust = case
    options = OPTIONS | {"eps": [EPS / 8, EPS]}
    curve = robustness_curve(model, x, y, suite="quick", checks=[], verbose=0, **options)
    assert curve.accuracy[1] == robust.mean() < curve.accuracy[0]
    for name in ("output", "expectation_draws", "attack_input", "task", "which"):
        assert curve.settings[name] == OPTIONS[name]


def test_a_training_attacks_as_an_evaluation_does(case):
    model, x, y, robust = case
    options = {name: value for name, value in OPTIONS.items() if name != "which"}
    trained = AdversarialTraining(model, steps=10, attack_loss="margin", **options)
    trained.compile(keras.optimizers.SGD(0.0), keras.losses.BinaryCrossentropy(from_logits=True))
    trained.fit(x, y, verbose=0)
    attacked = trained._attack_batch(keras.tree.map_structure(ops.convert_to_tensor, x), ops.convert_to_tensor(y))
    found = values(attacked.adversarial)
    assert not (found[:, :4] - x["image"].astype("float64"))[:, MASK].any()
    np.testing.assert_array_equal(found[:, 4:], x["context"])
    moved = values(trained({"image": found[:, :4], "context": x["context"]}))
    np.testing.assert_array_equal((moved[:, 1] > 0) == y[:, 1], robust)
