"""Models with a single unit or several outputs get the verdict of the same classifier with two logits."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, evaluate_robustness, robustness_curve
from keras_drsl.attacks import APGD, PGD, Square
from keras_drsl.models import find_logits
from tests.backends import values
from tests.helpers import some_short
from tests.layers import SigmoidOf
from tests.linear import UNIT, unit_inputs

EPS = 0.1
METHODS = ("pgd", "fgsm", "trades", "mart", "consistency")


def assert_exact(report, size):
    """Check each verdict whose perturbation is not as large as eps up to rounding."""
    robust = np.array([broken is None for broken in report.per_example["broken_by"]])
    clear = np.abs(size - EPS) > 1e-3
    np.testing.assert_array_equal(robust[clear], (size > EPS)[clear])


def unit(activation=None, scale=1.0):
    """Return a model of one linear unit with an activation."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation)])
    model.layers[0].set_weights([scale * UNIT[:, None], np.array([-scale * UNIT.sum() / 2])])
    return model


# An evaluation leaves a model as it is, and the programs that were compiled for it serve the next one.
shared_unit = functools.cache(unit)


def average():
    x = keras.Input((4,))
    return keras.Model(x, layers.Average()([unit("sigmoid")(x), unit("sigmoid", 3.0)(x)]))


HEADS = {
    "logit": shared_unit,
    "sigmoid": lambda: shared_unit("sigmoid"),
    "saturated sigmoid": lambda: unit("sigmoid", 2000.0),
    "sigmoid op": lambda: SigmoidOf(unit()),
    "average": average,
    "nested": lambda: keras.Sequential([keras.Input((4,)), unit(), layers.Activation("sigmoid")]),
    "training": lambda: AdversarialTraining(unit("sigmoid"), EPS),
}


@pytest.mark.parametrize("labels", ["ids", "column", "one-hot", "bool", "float"])
@pytest.mark.parametrize("name", some_short(HEADS, "logit", more=["average", "sigmoid op", "nested", "training"]))
def test_one_unit_gets_the_exact_verdict(name, labels):
    x, y, size = unit_inputs()
    if labels != "ids" and name != "sigmoid":
        pytest.skip("each form of the labels with one head")
    forms = {
        "ids": y,
        "column": y[:, None],
        "one-hot": np.eye(2)[y],
        "bool": y.astype(bool),
        "float": y.astype("float32"),
    }
    attacks = [PGD(EPS, steps=10), APGD(EPS, loss="margin", targeted=True, steps=10)]
    model = HEADS[name]()
    checks = ["outputs", "gradients", "independent_rows"]
    report = evaluate_robustness(model, x, forms[labels], eps=EPS, attacks=attacks, checks=checks, verbose=0)
    assert 10 < (size > EPS).sum() < 70
    assert_exact(report, size)
    assert report.clean_accuracy == 1
    assert report.trustworthy
    assert report.settings["outputs"] == ("logits" if name == "logit" else "softmax")


def test_a_logit_between_0_and_1_is_a_logit_if_said_so():
    x = unit_inputs()[0]
    model = unit()
    model.layers[0].set_weights([0.1 * UNIT[:, None], np.array([0.5])])
    assert find_logits(model, x).outputs == "probabilities"
    found = find_logits(model, x, from_logits=True)
    assert found.outputs == "logits"
    np.testing.assert_allclose(found.classifier.logits(x), np.c_[np.zeros(len(x)), values(model(x))], atol=1e-6)
    with pytest.raises(ValueError, match="`from_logits=False`, but the outputs of `model` are no probabilities"):
        find_logits(unit(scale=20.0), x, from_logits=False)


def two_outputs(kind):
    x = keras.Input((4,))
    wanted, other = unit("sigmoid"), keras.Sequential([layers.Dense(7, "relu")])
    outputs = [other(x), wanted(x)]
    if kind == "list":
        return keras.Model(x, outputs), 1
    if kind == "names":
        named = [layers.Identity(name="depth")(outputs[0]), layers.Identity(name="cat")(outputs[1])]
        return keras.Model(x, named), "cat"
    return keras.Model(x, {"depth": outputs[0], "cat": outputs[1]}), "cat"


@pytest.mark.parametrize("kind", some_short(["list", "names", "dict"], more=["list", "names"]))
def test_one_of_several_outputs_is_evaluated(kind):
    model, output = two_outputs(kind)
    x, y, size = unit_inputs()
    attacks = [APGD(EPS, loss="margin", targeted=True, steps=10)]
    report = evaluate_robustness(model, x, y, eps=EPS, attacks=attacks, checks="quick", output=output, verbose=0)
    assert_exact(report, size)
    assert report.settings["output"] == output


def evaluate(model, x, y, output):
    return evaluate_robustness(model, x, y, eps=EPS, suite="quick", output=output, verbose=0).settings["output"]


def curve(model, x, y, output):
    return robustness_curve(model, x, y, eps=[EPS], suite="quick", output=output, verbose=0).settings["output"]


def monitor(model, x, y, output):
    callback = RobustnessMonitor(x, y, eps=EPS, output=output)
    callback.set_model(model)
    callback.set_params({})
    callback.on_train_begin()
    callback.on_epoch_end(0, {})
    return callback.report.settings["output"]


@pytest.mark.parametrize("call", some_short([evaluate, curve, monitor], more=[curve, monitor]))
def test_each_call_takes_an_output(call):
    model, output = two_outputs("dict")
    x, y, _ = unit_inputs()
    assert call(model, x, y, output) == output
    with pytest.raises(ValueError, match="`output` must be a name or a position. Received: output=True"):
        call(model, x, y, True)
    for wrong in (None, "dog", 5):
        received = rf"`output` must name one of the outputs of `model`: 'cat', 'depth'. Received: output={wrong!r}"
        with pytest.raises(ValueError, match=received):
            call(model, x, y, wrong)
    with pytest.raises(ValueError, match="`output` must be None for a model with one output. Received: output='cat'"):
        call(unit(), x, y, "cat")


def test_square_and_noise_break_one_unit():
    x, y, size = unit_inputs()
    model = find_logits(unit("sigmoid"), x).classifier
    x_adv = Square(EPS, queries=400)(model, x, y)
    broken = values(model(ops.convert_to_tensor(x_adv))).argmax(1) != y
    assert not broken[size > EPS].any()
    assert broken[size < 0.8 * EPS].mean() > 0.9


def test_an_undefended_unit_is_a_second_model():
    x, y, _ = unit_inputs()
    report = evaluate_robustness(
        unit("sigmoid"), x, y, eps=EPS, suite="quick", undefended=unit(scale=5.0), checks="standard", verbose=0
    )
    assert report.provenance["undefended"] is not None


def test_a_report_keeps_the_output(tmp_path):
    model, output = two_outputs("dict")
    x, y, _ = unit_inputs()
    report = evaluate_robustness(model, x, y, eps=EPS, suite="quick", output=output, verbose=0)
    report.to_json(tmp_path / "report.json")
    again = keras_drsl.RobustnessReport.from_json(tmp_path / "report.json")
    assert again.settings["output"] == output
    parts = [
        evaluate_robustness(model, x, y, eps=EPS, suite="quick", output=output, shard=(i, 2), verbose=0)
        for i in range(2)
    ]
    merged = keras_drsl.RobustnessReport.merge(parts)
    assert merged.per_example == report.per_example
    depth = evaluate_robustness(
        model, x, y, eps=EPS, suite="quick", output="depth", from_logits=True, shard=(1, 2), verbose=0
    )
    with pytest.raises(ValueError, match="`reports` must be of one evaluation. Received: two of different settings"):
        keras_drsl.RobustnessReport.merge([parts[0], depth])


@pytest.mark.parametrize("method", some_short(METHODS, "trades", more=("pgd", "fgsm", "mart", "consistency")))
@pytest.mark.parametrize("head", some_short(["logit", "sigmoid"], more=["sigmoid"]))
def test_one_unit_is_trained_to_withstand_attacks(method, head):
    keras.utils.set_random_seed(0)
    x, y, size = unit_inputs(200)
    layer = layers.Dense(1, None if head == "logit" else "sigmoid")
    robust = AdversarialTraining(keras.Sequential([keras.Input((4,)), layer]), 0.05, method=method, steps=3)
    loss = keras.losses.BinaryCrossentropy(from_logits=head == "logit")
    robust.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"])
    history = robust.fit(x, y, epochs=15, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    report = evaluate_robustness(robust, x, y, eps=0.02, suite="quick", verbose=0)
    # The best direction is known: the exact share of inputs that withstand it bounds the accuracy.
    assert 0.7 < report.robust_accuracy <= (size > 0.02).mean() + 0.03


def test_the_attack_of_a_training_follows_the_loss_of_one_unit():
    x, y, _ = unit_inputs(40)
    robust = AdversarialTraining(unit("sigmoid"), 0.1, attack_loss="loss", steps=1, step_size=0.1)
    robust.compile("sgd", "binary_crossentropy")
    robust.fit(x, y, verbose=0)
    robust.model.set_weights([UNIT[:, None], np.zeros(1)])
    attacked = robust._attack_batch(ops.convert_to_tensor(x), ops.convert_to_tensor(y))
    moved = values(attacked.adversarial) - x
    assert (np.sign(moved) == -np.sign(UNIT) * (2 * y[:, None] - 1)).mean() > 0.9


def test_one_of_several_outputs_is_trained():
    model, output = two_outputs("dict")
    x, y, _ = unit_inputs()
    robust = AdversarialTraining(model, 0.05, steps=2, output=output)
    robust.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    assert robust.fit(x, y, epochs=2, verbose=0).history["accuracy"][-1] > 0.5
    assert values(robust(x)).shape == (len(x), 1)
    robust = AdversarialTraining(model, 0.05)
    robust.compile("adam", "binary_crossentropy")
    with pytest.raises(ValueError, match="`output` must name one of the outputs of `model`: 'cat', 'depth'"):
        robust.fit(x, y, verbose=0)


def double(x):
    return 2 * x


PREPROCESSINGS = {
    "function": (double, "double"),
    "layer": (layers.Rescaling(2.0), "Rescaling"),
    "resizing": (lambda x: ops.repeat(x, 2, axis=-1)[:, ::2] * 2.0, "lambda"),
}


@pytest.mark.parametrize("name", some_short(PREPROCESSINGS, more=["function", "resizing"]))
def test_a_function_in_front_of_a_model_is_attacked_through(name):
    preprocessing, shown = PREPROCESSINGS[name]
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    weights = np.stack([0 * UNIT, UNIT], axis=1)
    model.set_weights([weights, np.array([0, -UNIT.sum()])])  # the centre 0.5 is doubled
    x, y, size = unit_inputs()
    attacks = [APGD(EPS, loss="margin", targeted=True, steps=10)]
    options = {"preprocessing": preprocessing, "verbose": 0}
    report = evaluate_robustness(model, x, y, eps=EPS, attacks=attacks, checks="quick", **options)
    assert_exact(report, size)
    assert shown in report.settings["preprocessing"]
    curve = robustness_curve(model, x, y, eps=[EPS], suite="quick", checks=[], **options)
    assert curve.settings["preprocessing"] == report.settings["preprocessing"]


@pytest.mark.more
def test_a_training_and_its_monitor_take_a_function_in_front():
    x, y, _ = unit_inputs()
    rescaling = layers.Normalization(mean=0.5, variance=0.01)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    robust = AdversarialTraining(model, 0.02, steps=2, preprocessing=rescaling)
    robust.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    monitor = RobustnessMonitor(x, y, eps=0.02, preprocessing=rescaling)
    history = robust.fit(x, y, epochs=10, callbacks=[monitor], verbose=0).history
    assert history["val_robust_accuracy"][-1] > 0.7
    np.testing.assert_allclose(values(robust(x)), values(model(rescaling(x))), atol=1e-5)
    assert len(robust.trainable_variables) == 2


def test_a_preprocessing_that_is_none_is_named():
    x, y, _ = unit_inputs()
    for wrong in (3, "caffe"):
        with pytest.raises(ValueError, match="`preprocessing` must be a Keras layer or a function. Received"):
            evaluate_robustness(unit(), x, y, eps=EPS, preprocessing=wrong, verbose=0)
        with pytest.raises(ValueError, match="`preprocessing` must be a Keras layer or a function. Received"):
            AdversarialTraining(unit(), EPS, preprocessing=wrong)


def test_an_attack_by_itself_names_the_way_out():
    x, y, _ = unit_inputs()
    with pytest.raises(ValueError, match=r"For one sigmoid unit of logit z, return the logits \[0, z\]"):
        PGD(EPS)(unit("sigmoid"), x, y)
