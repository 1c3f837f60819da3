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

MEASURES = ("variance", "std", "entropy")


def draw(shape=(8, 5), seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, shape[-1], shape[:-1])
    z = rng.normal(0, 2, shape).astype("float32")
    return z, ids, reference.one_hot(ids, shape[-1]).astype("float32")


def compiled_model(**options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="softmax")])
    model.compile(optimizer="sgd", loss=keras_drsl.DRSLoss(), **options)
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(19, 3)).astype("float32"), rng.integers(0, 4, 19)


@pytest.mark.parametrize("space", ["log_softmax", "softmax"])
@pytest.mark.parametrize("measure", MEASURES)
def test_it_is_the_mean_over_samples_of_the_formula_written_as_a_loop(measure, space):
    z, ids, one_hot = draw()
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


def test_its_variance_times_the_number_of_rivals_is_the_default_restraint_in_the_loss():
    model, x, y = compiled_model(metrics=[SoftmaxDiversity()])
    restrained = model.evaluate(x, y, verbose=0, return_dict=True)
    model.compile(loss="sparse_categorical_crossentropy")
    plain = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose((restrained["loss"] - plain) / 0.3, 3 * restrained["softmax_diversity"], rtol=1e-4)


def test_probabilities_far_below_the_smallest_float16_still_count():
    p = np.array([[1.0, 1e-12, 1e-20]], "float32")
    expected = reference.diversity([1, 0, 0], [0, math.log(1e-12), math.log(1e-20)])
    np.testing.assert_allclose(values(softmax_diversity([0], p)), [expected], rtol=1e-5)


@pytest.mark.parametrize("weights_shape", [(8,), (8, 1)])
@pytest.mark.parametrize("ignore_class", [None, 1])
def test_sample_weights_weigh_the_mean(weights_shape, ignore_class):
    z, ids, one_hot = draw()
    weights = np.array([0, 1, 2, 0.5, 3, 0, 1, 1])
    counted = weights * (ids != ignore_class)
    expected = np.average(reference.each(reference.diversity, one_hot, z), weights=counted)
    metric = SoftmaxDiversity(from_logits=True, ignore_class=ignore_class)
    metric.update_state(ids, z, sample_weight=weights.reshape(weights_shape))
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-5)


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


def test_without_masks_positions_of_a_sequence_are_averaged():
    z, ids, one_hot = draw((3, 6, 5))
    metric = SoftmaxDiversity(from_logits=True)
    metric.update_state(ids, z)
    expected = reference.each(reference.diversity, one_hot, z).mean()
    np.testing.assert_allclose(values(metric.result()), expected, rtol=1e-5)


def test_the_classes_may_lie_along_another_axis():
    z, ids, one_hot = draw((3, 6, 5))
    expected = reference.each(reference.diversity, one_hot, z)
    got = values(softmax_diversity(ids, np.moveaxis(z, -1, 1), from_logits=True, axis=1))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_only_weighted_metrics_see_the_weights_in_fit():
    model, x, y = compiled_model(metrics=[SoftmaxDiversity()], weighted_metrics=[SoftmaxDiversity(name="weighted")])
    weights = np.linspace(0, 1, 19)
    got = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    z = np.log(model.predict(x, verbose=0).astype("float64"))
    each = reference.each(reference.diversity, reference.one_hot(y, 4), z)
    np.testing.assert_allclose(got["softmax_diversity"], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["weighted"], np.average(each, weights=weights), rtol=1e-4)


def test_it_appears_in_history_the_csv_log_and_tensorboard_and_can_stop_training(tmp_path):
    model, x, y = compiled_model(metrics=[SoftmaxDiversity()])
    callbacks = [
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        # A minimum that is never undercut by 100: stops after the patience of one epoch.
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


def test_every_argument_survives_in_the_config():
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


def test_half_precision_predictions_are_taken():
    z, ids, one_hot = draw()
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
def test_bad_arguments_are_named(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` {rule}. Received: {name}={value!r}"):
        SoftmaxDiversity(**{name: value})


def test_bad_measures_and_labels_are_named_by_the_function_too():
    with pytest.raises(ValueError, match="`measure` must be one of"):
        softmax_diversity([0], [[0.5, 0.5]], measure="mean")
    with pytest.raises(ValueError, match=r"`y_true` must hold class ids in \[0, 2\)"):
        softmax_diversity([2], [[0.5, 0.5]])
