"""Test for each loss what all losses must do."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl.losses import ClassificationLoss
from tests import reference
from tests.backends import BACKEND, FIT_MODES, compiled, gradient, on_tensorflow, values
from tests.helpers import run_python, some_short
from tests.losses.cases import draw, draw_soft, identity_model, small_data, small_model, softmax
from tests.losses.family import BY_NAME, FAMILY, each_loss


@each_loss
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_value_equals_the_formula_for_all_labels(name, shape):
    case, (z, ids, one_hot) = BY_NAME[name], draw(shape)
    expected = case.expected(one_hot, z)
    loss = case.make(from_logits=True, reduction=None)
    for labels in (ids, ids[..., None], ids.astype("float32"), ids.astype("uint8"), one_hot, one_hot.astype(bool)):
        np.testing.assert_allclose(values(loss(labels, z)), expected, rtol=1e-5, atol=1e-6)


@each_loss
def test_takes_any_label_distribution(name):
    case, (z, _, _) = BY_NAME[name], draw()
    y = draw_soft()
    got = case.make(from_logits=True, reduction=None)(y, z)
    np.testing.assert_allclose(values(got), case.expected(y, z), rtol=1e-5, atol=1e-6)


@each_loss
@pytest.mark.parametrize("axis", [1, -2, 0])
def test_classes_may_be_on_any_axis(name, axis):
    case, (z, ids, one_hot) = BY_NAME[name], draw((3, 4, 5))
    loss = case.make(from_logits=True, reduction=None, axis=axis)
    for y in (ids, np.expand_dims(ids, axis), np.moveaxis(one_hot, -1, axis)):
        got = values(loss(y, np.moveaxis(z, -1, axis)))
        np.testing.assert_allclose(got, case.expected(one_hot, z), rtol=1e-5, atol=1e-6)


@each_loss
def test_takes_probabilities_unless_it_needs_logits(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    loss = case.make(reduction=None)
    if case.loss.needs_logits:
        with pytest.raises(ValueError, match=f"{name} needs logits.*Received: from_logits=False"):
            loss(ids, softmax(z))
    else:
        np.testing.assert_allclose(values(loss(ids, softmax(z))), case.expected(one_hot, z), rtol=1e-4, atol=1e-6)


@on_tensorflow
@each_loss
def test_finds_the_logits_behind_a_softmax(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    got = case.make(reduction=None)(ids, ops.softmax(z))
    np.testing.assert_allclose(values(got), case.expected(one_hot, z), rtol=1e-5, atol=1e-6)


@each_loss
def test_takes_two_classes(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw((6, 2))
    if name == "PRSLoss":
        case = case._replace(options={"lam": 0.2, "start": 0, "end": 1})
    got = case.make(from_logits=True, reduction=None)(ids, z)
    np.testing.assert_allclose(values(got), case.expected(one_hot, z), rtol=1e-5, atol=1e-6)


@on_tensorflow
@each_loss
@pytest.mark.parametrize("labels", ["ids", "distribution"])
def test_gradient_equals_central_differences(name, labels):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    y_soft = draw_soft()
    y, distribution = (ids, one_hot) if labels == "ids" else (y_soft, y_soft)
    loss = case.make(from_logits=True, reduction="sum", dtype="float64")
    got = gradient(lambda z: loss(y, z), z, "float64")
    expected = reference.gradient(lambda z: case.expected(distribution, z), z)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.short
@each_loss
def test_is_finite_for_equal_and_large_logits(name):
    z = np.array([[0, 0, 0, 0], [7, 7, 7, 7], [1e4, -1e4, 0, 0], [-1e4, 1e4, 1e4, 0], [1e4, 1e4, 1e4, 1e4]], "float32")
    ids = np.array([0, 1, 0, 0, 2])
    case = BY_NAME[name]
    loss = case.make(from_logits=True, reduction=None)
    expected = case.expected(reference.one_hot(ids, 4), z)
    np.testing.assert_allclose(values(loss(ids, z)), expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(gradient(lambda z: loss(ids, z), z)))


@each_loss
def test_half_precision_is_computed_in_float32(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw(scale=500.0)  # the squares are beyond the range of float16
    half = z.astype("float16")
    # `__call__` would cast to float32 before.
    got = case.make(from_logits=True).call(ids, ops.convert_to_tensor(half))
    np.testing.assert_allclose(values(got), case.expected(one_hot, half), rtol=1e-5, atol=1e-5)


@each_loss
@pytest.mark.parametrize("labels", ["sparse", "one_hot"])
@pytest.mark.parametrize("ignore_class", [-1, 255, 2])
def test_ignored_positions_have_no_influence(name, ignore_class, labels):
    case, (z, ids, _) = BY_NAME[name], draw((4, 6, 5))
    ids[ids == 2] = 3
    ignored = np.random.default_rng(1).random((4, 6)) < 0.4
    expected = case.expected(reference.one_hot(ids[~ignored], 5), z[~ignored]).mean()
    ids[ignored] = ignore_class
    z[ignored] = np.nan
    y = (ids[..., None] == np.arange(5)).astype("float32") if labels == "one_hot" else ids
    loss = case.make(from_logits=True, ignore_class=ignore_class)
    np.testing.assert_allclose(values(loss(y, z)), expected, rtol=1e-5)
    grad = gradient(lambda z: loss(y, z), z)
    assert np.all(grad[ignored] == 0)
    assert np.all(np.isfinite(grad))
    assert np.any(grad[~ignored] != 0)


@each_loss
def test_is_zero_when_all_positions_are_ignored(name):
    z, _, _ = draw()
    loss = BY_NAME[name].make(from_logits=True, ignore_class=9)
    assert values(loss(np.full(6, 9), z)) == 0
    np.testing.assert_array_equal(gradient(lambda z: loss(np.full(6, 9), z), z), np.zeros_like(z))


@pytest.mark.short
@each_loss
@pytest.mark.parametrize("ignore_class", [None, 1])
def test_masked_positions_have_no_influence(name, ignore_class):
    case, (z, ids, _) = BY_NAME[name], draw((4, 6, 5))
    z[:, 4:] = 0.0  # Masking masks steps of zeros
    kept = np.broadcast_to(np.arange(6) < 4, (4, 6)) & (ids != ignore_class)
    expected = case.expected(reference.one_hot(ids[kept], 5), z[kept]).mean()
    ids[:, 4:] = 77
    got = case.make(from_logits=True, ignore_class=ignore_class)(ids, keras.layers.Masking()(z))
    np.testing.assert_allclose(values(got), expected, rtol=1e-5)


# Keras alone applies the weights, except for PRSLoss.
@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("DRSLoss", False),
        ("PRSLoss", False),
        ("PRSLoss", True),
        *(pytest.param(name, False, marks=pytest.mark.more) for name in [*BY_NAME][2:]),
    ],
)
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": BACKEND == "jax"}])
def test_masked_labels_are_not_read_in_fit(name, options, weighted):
    case, (z, ids, _) = BY_NAME[name], draw((4, 6, 5))
    z[:, 4:] = 0.0
    one_hot = reference.one_hot(ids[:, :4], 5)
    ids[:, 4:] = 77
    weights = np.random.default_rng(1).uniform(0.5, 2, (4, 6)).astype("float32")
    kept = weights[:, :4] if weighted else np.ones((4, 4))
    each = case.expected(one_hot, z[:, :4])
    if weighted:
        rows = one_hot.reshape(16, 5), z[:, :4].reshape(16, 5).astype("float64")
        each = np.reshape(reference.prs_loss(*rows, **case.options, weights=kept.ravel()), (4, 4))
    model = identity_model((6, 5), keras.layers.Masking())
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=case.make(from_logits=True), **options)
    got = model.fit(z, ids, sample_weight=weights if weighted else None, batch_size=4, verbose=0).history["loss"]
    np.testing.assert_allclose(got, [(kept * each).mean()], rtol=1e-5)


@each_loss
@pytest.mark.parametrize("weights_shape", [(6,), (6, 1)])
def test_sample_weights_multiply_the_values(name, weights_shape):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    weights = np.array([0, 1, 2, 0.5, 3, 0])
    for reduction, divisor in (("sum_over_batch_size", 6), ("sum", 1), ("mean_with_sample_weight", weights.sum())):
        each = case.expected(one_hot, z)
        if name == "PRSLoss":
            # Its penalty uses the weights too.
            number = weights.sum() if reduction == "mean_with_sample_weight" else 6
            each = np.array(reference.prs_loss(one_hot, z, **case.options, weights=weights, number=number))
        given = weights.astype("float32").reshape(weights_shape)
        got = case.make(from_logits=True, reduction=reduction)(ids, z, given)
        np.testing.assert_allclose(values(got), (weights * each).sum() / divisor, rtol=1e-5)


@pytest.mark.parametrize("name", some_short(BY_NAME, more=set(BY_NAME) - {"PRSLoss"}))
def test_fit_is_the_same_in_every_mode(name):
    x, y = small_data(18)
    results = []
    for options in FIT_MODES:
        model = small_model(activation=None)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss=BY_NAME[name].make(from_logits=True), **options)
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        results.append([*model.get_weights(), np.array(history["loss"])])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@each_loss
def test_config_holds_every_argument(name):
    options = {
        "from_logits": True,
        "ignore_class": 3,
        "axis": 1,
        "reduction": "sum",
        "name": "mine",
        "dtype": "float64",
    }
    loss = BY_NAME[name].make(**options)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is BY_NAME[name].loss
    assert again.get_config() == loss.get_config()
    assert again.get_config().items() >= (BY_NAME[name].options | options).items()
    default = BY_NAME[name].loss()
    assert type(default).from_config(default.get_config()).get_config() == default.get_config()


def test_saved_models_load_in_a_fresh_process(tmp_path):
    x, y = small_data()
    expected = {}
    for name, case in BY_NAME.items():
        model = small_model(activation=None)
        metrics = [keras_drsl.SoftmaxDiversity(measure="std", from_logits=True)] if name == "DRSLoss" else None
        model.compile(loss=case.make(from_logits=True), metrics=metrics)
        model.save(tmp_path / f"{name}.keras")
        expected[name] = model.evaluate(x, y, batch_size=20, verbose=0)
    np.savez(tmp_path / "data.npz", x=x, y=y, **expected)
    run_python(
        """
        import sys
        import keras, numpy as np
        folder, *names = sys.argv[1:]
        try:
            loaded = keras.models.load_model(folder + "/DRSLoss.keras")
        except Exception as error:
            assert "DRSLoss" in str(error) or "SoftmaxDiversity" in str(error), error
        else:
            # Keras 3.8 imports the package by itself.
            assert loaded.loss.lam == 0.7
        keras.models.load_model(folder + "/DRSLoss.keras", compile=False)

        import keras_drsl
        data = np.load(folder + "/data.npz")
        for name in names:
            model = keras.models.load_model(f"{folder}/{name}.keras")
            assert type(model.loss).__name__ == name
            got = model.evaluate(data["x"], data["y"], batch_size=20, verbose=0)
            np.testing.assert_allclose(got, data[name], atol=1e-6)
        """,
        tmp_path,
        *BY_NAME,
    )


@each_loss
def test_errors_name_arguments_out_of_range(name):
    case = BY_NAME[name]
    for argument, (value, rule) in case.bad.items():
        with pytest.raises(ValueError, match=f"`{argument}` must be {rule}. Received: {argument}={value}"):
            case.loss(**{argument: value})
    for argument in ("ignore_class", "axis"):
        with pytest.raises(ValueError, match=f"`{argument}` must be an integer. Received: {argument}=1.5"):
            case.make(**{argument: 1.5})
    with pytest.raises(ValueError, match="Received: reduction=average"):
        case.make(reduction="average")


@pytest.mark.short
@each_loss
def test_wrong_labels_are_an_error_or_nan(name):
    z, ids, _ = draw()
    loss = BY_NAME[name].make(from_logits=True, reduction=None)
    with pytest.raises(ValueError, match=r"`y_true` must hold one class id per position.*y_true.shape=\(3,\)"):
        loss(ids[:3], z)
    with pytest.raises(
        ValueError, match=r"`y_pred` must have a known number of classes, at least two.*y_pred.shape=\(6, 1\)"
    ):
        loss(ids, z[:, :1])
    ids[3] = 5
    with pytest.raises(ValueError, match=r"`y_true` must hold class ids in \[0, 5\).*Received: 5"):
        loss(ids, ops.convert_to_tensor(z))
    got = values(compiled(lambda y, z: loss(y, z))(ops.convert_to_tensor(ids), ops.convert_to_tensor(z)))
    assert np.array_equal(np.isnan(got), np.arange(6) == 3)


@each_loss
def test_name_is_the_class_name_in_snake_case(name):
    words = BY_NAME[name].make().name.split("_")
    assert "".join(words) == name.lower()
    starts = {sum(map(len, words[:index])) for index in range(len(words))}
    # A capital before a small letter begins a word. Capitals before it are one word, as in DRSLoss.
    assert starts == {0} | {index for index in range(len(name)) if re.match("[A-Z][a-z]", name[index:])}


def test_family_holds_all_public_losses():
    exported = [value for value in vars(keras_drsl).values() if isinstance(value, type)]
    public = {loss for loss in exported if issubclass(loss, ClassificationLoss)}
    assert public == {case.loss for case in FAMILY}
