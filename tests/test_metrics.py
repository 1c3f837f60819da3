import csv
import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import SoftmaxDiversity, softmax_diversity
from tests import reference
from tests.backends import BACKEND, values
from tests.losses.cases import draw, small_data

MEASURES = ("variance", "std", "entropy")


def compiled_model(**options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="softmax")])
    model.compile(optimizer="sgd", loss=keras_drsl.DRSLoss(), **options)
    return model, *small_data(19)


@pytest.mark.short
@pytest.mark.parametrize("space", ["log_softmax", "softmax"])
@pytest.mark.parametrize("measure", MEASURES)
def test_equals_the_mean_of_the_formula(measure, space):
    z, ids, one_hot = draw((8, 5), scale=2.0)
    expected = reference.each(reference.diversity, one_hot, z, measure=measure, space=space)
    np.testing.assert_allclose(
        values(softmax_diversity(ids, z, measure=measure, space=space, from_logits=True)), expected, rtol=1e-4
    )
    for labels in (ids, ids[:, None], one_hot):
        metric = SoftmaxDiversity(measure=measure, space=space, from_logits=True)
        metric.update_state(labels[:5], z[:5])
        metric.update_state(labels[5:], z[5:])
        np.testing.assert_allclose(values(metric.result()), expected.mean(), rtol=1e-4)
        metric.reset_state()
        metric.update_state(labels[:3], z[:3])
        np.testing.assert_allclose(values(metric.result()), expected[:3].mean(), rtol=1e-4)


def test_variance_times_n_is_the_penalty_of_the_loss():
    model, x, y = compiled_model(metrics=[SoftmaxDiversity()])
    with_penalty = model.evaluate(x, y, verbose=0, return_dict=True)
    model.compile(loss="sparse_categorical_crossentropy")
    plain = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose((with_penalty["loss"] - plain) / 0.3, 3 * with_penalty["softmax_diversity"], rtol=1e-4)


def test_probabilities_below_float16_count():
    p = np.array([[1.0, 1e-12, 1e-20]], "float32")
    expected = reference.diversity([1, 0, 0], [0, math.log(1e-12), math.log(1e-20)])
    np.testing.assert_allclose(values(softmax_diversity([0], p)), [expected], rtol=1e-5)


@pytest.mark.parametrize("weights_shape", [(8,), (8, 1)])
@pytest.mark.parametrize("ignore_class", [None, 1])
def test_sample_weights_multiply_in_the_mean(weights_shape, ignore_class):
    z, ids, one_hot = draw((8, 5), scale=2.0)
    weights = np.array([0, 1, 2, 0.5, 3, 0, 1, 1])
    counted = weights * (ids != ignore_class)
    expected = np.average(reference.each(reference.diversity, one_hot, z), weights=counted)
    metric = SoftmaxDiversity(from_logits=True, ignore_class=ignore_class)
    metric.update_state(ids, z, sample_weight=weights.reshape(weights_shape))
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-5)


@pytest.mark.parametrize("weights_shape", [(), (2,), (2, 3), (2, 3, 4), (2, 3, 4, 1), (2, 1, 1), (1, 3)])
def test_weights_of_fewer_axes_hold_for_all_positions_of_the_others(weights_shape):
    z, ids, one_hot = draw((2, 3, 4, 5))
    weights = np.random.default_rng(1).uniform(0.1, 1, weights_shape)
    axes = weights_shape[:3] + (1,) * (3 - len(weights_shape[:3]))
    expected = np.average(
        reference.each(reference.diversity, one_hot, z), weights=np.broadcast_to(weights.reshape(axes), (2, 3, 4))
    )
    metric = SoftmaxDiversity(from_logits=True)
    metric.update_state(ids, z, sample_weight=weights)
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-5)


@pytest.mark.short
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_class", [None, 1, -1])
def test_masked_and_ignored_positions_do_not_count(ignore_class, weighted):
    z, ids, _ = draw((3, 6, 5))
    z[:, 4:] = 0.0
    kept = np.arange(6) < 4
    kept = np.broadcast_to(kept, (3, 6)) & (ids != ignore_class)
    weights = np.array([1.0, 2.0, 0.5]) if weighted else np.ones(3)
    diversity = reference.each(reference.diversity, reference.one_hot(ids, 5), z)
    expected = np.average(diversity, weights=kept * weights[:, None])
    metric = SoftmaxDiversity(from_logits=True, ignore_class=ignore_class)
    ids[:, 4:] = 99 if ignore_class is None else ids[:, 4:]
    metric.update_state(ids, keras.layers.Masking()(z), sample_weight=weights if weighted else None)
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-4)


def test_averages_the_positions_of_a_sequence():
    z, ids, one_hot = draw((3, 6, 5))
    metric = SoftmaxDiversity(from_logits=True)
    metric.update_state(ids, z)
    expected = reference.each(reference.diversity, one_hot, z).mean()
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-5)


def test_classes_may_be_on_another_axis():
    z, ids, one_hot = draw((3, 6, 5))
    expected = reference.each(reference.diversity, one_hot, z)
    got = values(softmax_diversity(ids, np.moveaxis(z, -1, 1), from_logits=True, axis=1))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_only_weighted_metrics_use_weights_in_fit():
    model, x, y = compiled_model(metrics=[SoftmaxDiversity()], weighted_metrics=[SoftmaxDiversity(name="weighted")])
    weights = np.linspace(0, 1, 19)
    got = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    z = np.log(model.predict(x, verbose=0).astype("float64"))
    each = reference.each(reference.diversity, reference.one_hot(y, 4), z)
    np.testing.assert_allclose(got["softmax_diversity"], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["weighted"], np.average(each, weights=weights), rtol=1e-4)


def test_is_logged_and_can_stop_training(tmp_path):
    model, x, y = compiled_model(metrics=[SoftmaxDiversity()])
    callbacks = [
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        # The metric never falls by 100, so training stops after the patience of one epoch.
        keras.callbacks.EarlyStopping("val_softmax_diversity", mode="min", patience=1, min_delta=100),
    ]
    if BACKEND == "tensorflow":
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "board"))
    history = model.fit(x, y, validation_data=(x, y), epochs=5, callbacks=callbacks, verbose=0).history
    assert len(history["softmax_diversity"]) == len(history["val_softmax_diversity"]) == 2
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    logged = [float(row["val_softmax_diversity"]) for row in rows]
    np.testing.assert_allclose(logged, history["val_softmax_diversity"])
    if BACKEND == "tensorflow":
        events = b"".join(path.read_bytes() for path in (tmp_path / "board").rglob("*tfevents*"))
        assert b"epoch_softmax_diversity" in events


def test_metric_config_holds_every_argument():
    options = {
        "measure": "std",
        "space": "softmax",
        "from_logits": True,
        "ignore_class": 2,
        "axis": 1,
        "name": "mine",
        "dtype": "float64",
    }
    again = keras.metrics.deserialize(keras.metrics.serialize(SoftmaxDiversity(**options)))
    assert type(again) is SoftmaxDiversity
    assert again.get_config() == options


def test_takes_half_precision_predictions():
    z, ids, one_hot = draw((8, 5), scale=2.0)
    metric = SoftmaxDiversity()
    metric.update_state(ids, ops.softmax(ops.cast(z, "float16")))
    expected = reference.each(reference.diversity, one_hot, z).mean()
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("measure", "mean", "must be one of 'variance', 'std', 'entropy'"),
        ("space", "logits", "must be one of 'log_softmax', 'softmax'"),
        ("ignore_class", "x", "must be an integer"),
        ("axis", 0.5, "must be an integer"),
    ],
)
def test_errors_name_bad_arguments(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` {rule}. Received: {name}={value!r}"):
        SoftmaxDiversity(**{name: value})


def test_errors_of_the_function_name_them_too():
    with pytest.raises(ValueError, match="`measure` must be one of"):
        softmax_diversity([0], [[0.5, 0.5]], measure="mean")
    with pytest.raises(ValueError, match=r"`y_true` must hold class ids in \[0, 2\)"):
        softmax_diversity([2], [[0.5, 0.5]])
