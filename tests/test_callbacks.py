"""`RobustnessMonitor`: what it writes must be what a separate evaluation of the same weights finds."""

import csv
import math

import keras
import numpy as np
import pytest

import keras_drsl
from tests import reference
from tests.backends import values
from tests.helpers import some_short
from tests.layers import Random
from tests.linear import WEIGHTS, exact_robust, inputs, linear_model

EPS = 0.1
NAMES = ("robust_accuracy", "robustness_seconds", "robustness_warning", "softmax_diversity")


def data(count=60):
    rng = np.random.default_rng(0)
    return rng.uniform(size=(count, 4)).astype("float32"), rng.integers(0, 3, count)


def train(model, callbacks, *, epochs=3, rate=0.5, robust=False):
    x, y = data()
    if robust:
        model = keras_drsl.AdversarialTraining(model, EPS, steps=1)
    model.compile(keras.optimizers.SGD(rate), keras_drsl.DRSLoss(from_logits=True))
    return model.fit(x, y, epochs=epochs, verbose=0, callbacks=callbacks).history


@pytest.mark.parametrize("robust", some_short([False, True], more=[False]))
def test_logs_equal_an_evaluation_of_the_weights(robust):
    x, y = inputs()
    model, kept = linear_model(), []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(model.get_weights()))
    history = train(model, [keras_drsl.RobustnessMonitor(x, y, eps=EPS), keep], robust=robust)
    for epoch, (kernel, bias) in enumerate(kept):
        z = x.astype("float64") @ kernel + bias
        hot = reference.one_hot(y, 3)
        diversity = reference.each(reference.diversity, hot, z).mean()
        assert history["val_softmax_diversity"][epoch] == pytest.approx(diversity, abs=1e-5)
        again = linear_model()
        again.set_weights([kernel, bias])
        report = keras_drsl.evaluate_robustness(again, x, y, eps=EPS, suite="quick", verbose=0)
        assert history["val_robust_accuracy"][epoch] == report.robust_accuracy
    assert len(set(history["val_softmax_diversity"])) == 3


@pytest.mark.short
def test_the_accuracy_equals_the_closed_form():
    x, y = inputs()
    history = train(linear_model(), [keras_drsl.RobustnessMonitor(x, y, eps=EPS)], rate=0.0)
    expected = exact_robust(x, y, EPS, "inf", WEIGHTS).mean()
    assert 0 < expected < 1
    assert history["val_robust_accuracy"] == [expected] * 3
    assert history["val_robustness_warning"] == [0.0] * 3


def test_values_are_carried_between_evaluations():
    monitor = keras_drsl.RobustnessMonitor(*inputs(), eps=EPS, every=3, prefix="")
    history = train(linear_model(), [monitor], epochs=5)
    found = history["softmax_diversity"]
    assert len(found) == 5
    assert found[0] == found[1] == found[2] != found[3] != found[4]  # the last epoch is evaluated too
    assert {name for name in history if name != "loss"} == set(NAMES)
    assert [seconds > 0 for seconds in history["robustness_seconds"]] == [True, False, False, True, True]


def test_other_callbacks_find_the_values(tmp_path):
    x, y = inputs()
    model = linear_model()
    monitor = keras_drsl.RobustnessMonitor(x, y, eps=EPS, max_samples=20)
    stop = {"monitor": "val_robust_accuracy", "mode": "max", "patience": 2, "restore_best_weights": True}
    callbacks = [
        monitor,
        keras.callbacks.EarlyStopping(**stop),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.keras", monitor="val_robust_accuracy", mode="max", save_best_only=True
        ),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    # From weights that are right, training on random labels can only make it worse.
    before = model.get_weights()
    history = train(model, callbacks, epochs=10, rate=2.0)
    found = history["val_robust_accuracy"]
    assert len(found) < 10
    with (tmp_path / "log.csv").open() as file:
        assert [float(row["val_robust_accuracy"]) for row in csv.DictReader(file)] == found
    best = keras.models.load_model(tmp_path / "best.keras", compile=False)
    for saved, current in zip(best.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(saved, current)
    assert found.index(max(found)) == len(found) - 3
    assert np.abs(model.get_weights()[0] - before[0]).max() > 0
    assert monitor.report.num_examples == 20


def test_a_check_that_warns_is_flagged():
    x, y = inputs()
    monitor = keras_drsl.RobustnessMonitor(x, y, eps=EPS)
    model = keras.Sequential([keras.Input((4,)), Random(), keras.layers.Dense(3)])
    history = train(model, [monitor], epochs=1, rate=0.0)
    assert history["val_robustness_warning"] == [1.0]
    assert any(check.status == "fail" for check in monitor.report.checks)


def test_nan_weights_log_a_robust_accuracy_of_0():
    class Breaks(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                model.layers[0].set_weights([WEIGHTS * np.nan, np.zeros(3)])

    model = linear_model()
    monitor = keras_drsl.RobustnessMonitor(*inputs(), eps=EPS)
    history = train(model, [monitor, Breaks()], epochs=2, rate=0.0)
    assert history["val_robust_accuracy"][1] == 0.0
    assert history["val_robustness_warning"][1] == 1.0
    assert math.isnan(history["val_softmax_diversity"][1])
    assert monitor.report is None


def test_images_and_classes_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorflow")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorflow import make_ndarray
    from tensorflow.io import decode_png

    x, y = inputs(60)
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), linear_model()])
    x = x.reshape(-1, 2, 2, 1)
    monitor = keras_drsl.RobustnessMonitor(x, y, eps=EPS, log_images=True, log_dir=tmp_path)
    model.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor]).history
    events = accumulators.EventAccumulator(str(tmp_path / "robustness"), {"tensors": 0})
    events.Reload()
    names = [f"robust accuracy by class/{number}" for number in np.unique(y)]
    assert sorted(events.Tags()["tensors"]) == ["misleading images", *names]
    shares = np.unique(y, return_counts=True)[1] / 60
    for epoch in range(2):
        scalars = [events.Tensors(name)[epoch] for name in names]
        assert [event.step for event in scalars] == [epoch] * len(names)
        values_of_classes = [float(make_ndarray(event.tensor_proto)) for event in scalars]
        assert np.dot(values_of_classes, shares) == pytest.approx(history["val_robust_accuracy"][epoch])
    width, height, *pngs = events.Tensors("misleading images")[-1].tensor_proto.string_val
    assert (int(width), int(height), len(pngs)) == (6, 2, 9)
    first = decode_png(pngs[0]).numpy()[..., 0] / 255
    clean, change, changed = first[:, :2], first[:, 2:4], first[:, 4:]
    assert np.abs(clean[None] - x[..., 0]).max((1, 2)).min() < 1 / 255
    np.testing.assert_allclose(np.abs(changed - clean), EPS, atol=2 / 255)
    np.testing.assert_array_equal(change, changed > clean)


def test_a_metric_of_the_same_name_stays():
    x, y = inputs()
    model = linear_model()
    model.compile("sgd", keras_drsl.DRSLoss(from_logits=True), metrics=[keras_drsl.SoftmaxDiversity(from_logits=True)])
    monitor = keras_drsl.RobustnessMonitor(x[:10], y[:10], eps=EPS)
    history = model.fit(x, y, validation_data=(x, y), callbacks=[monitor], verbose=0).history
    z = values(model(x)).astype("float64")
    expected = reference.each(reference.diversity, reference.one_hot(y, 3), z).mean()
    assert history["val_softmax_diversity"] == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "`eps` must be"),
        ({"every": 0}, "`every` must be an integer of 1 or more. Received: every=0"),
        ({"suite": "weak"}, "`suite` must be one of"),
        ({"prefix": None}, "`prefix` must be a string. Received: prefix=None"),
        ({"max_samples": 0}, "`max_samples` must be"),
        ({"clip_max": 0.5}, r"must lie in \[clip_min, clip_max\] = \[0, 0.5\]"),
        ({"seed": -1}, "`seed` must be"),
        (
            {"log_images": True, "task": "positions"},
            "`log_images` needs task=\"multiclass\". Received: task='positions'",
        ),
    ],
)
def test_bad_arguments_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        keras_drsl.RobustnessMonitor(*inputs(), **{"eps": EPS} | options)


def test_bad_labels_are_named_when_training_begins():
    x, y = inputs()
    with pytest.raises(ValueError, match=r"`y` must hold class ids in \[0, 3\). Received: 7"):
        train(linear_model(), [keras_drsl.RobustnessMonitor(x, y + 7 * (y == 2) - 2 * (y == 2), eps=EPS)])
