"""What every loss must do, for each of them."""

import math
import re
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl.losses import ClassificationLoss
from tests import reference
from tests.backends import BACKEND, compiled, gradient, on_tensorflow, values
from tests.losses.cases import draw, run_python, small_data, small_model, softmax


class Case(NamedTuple):
    """A loss, its arguments, and the formula as a loop over one sample (PRSLoss: over the batch)."""

    loss: type[ClassificationLoss]
    options: dict
    loop: object
    bad: dict  # an argument out of its range for each rule, and the rule

    def make(self, **more):
        return self.loss(**self.options, **more)

    def expected(self, y, z):
        """One value a position, from label distributions and logits, in float64."""
        y, z = np.asarray(y, "float64"), np.asarray(z, "float64")
        if self.loss is not keras_drsl.PRSLoss:
            return reference.each(self.loop, y, z, **self.options)
        rows = self.loop(y.reshape(-1, y.shape[-1]).tolist(), z.reshape(-1, z.shape[-1]).tolist(), **self.options)
        return np.array(rows).reshape(z.shape[:-1])


NEGATIVE = {"lam": (-1.0, "a non-negative number")}
FAMILY = [
    Case(keras_drsl.DRSLoss, {"lam": 0.7}, reference.drs_loss, NEGATIVE),
    Case(
        keras_drsl.PRSLoss,
        {"lam": 0.2, "start": 1, "end": 3},
        reference.prs_loss,
        NEGATIVE | {"start": (-1, "an integer of 0 or more"), "end": (2.0, "an integer")},
    ),
    Case(keras_drsl.Squentropy, {"lam": 0.7}, reference.squentropy, NEGATIVE),
    Case(
        keras_drsl.GuidedComplementEntropy,
        {"alpha": 0.4},
        reference.guided_complement_entropy,
        {"alpha": (math.nan, "a non-negative number")},
    ),
    Case(keras_drsl.ComplementObjective, {"lam": 1.5}, reference.complement_objective, NEGATIVE),
    Case(
        keras_drsl.ProbabilisticallyCompactLoss,
        {"margin": 0.8, "lam": 0.3},
        reference.probabilistically_compact,
        NEGATIVE | {"margin": (1.5, r"a number in \[0, 1\]")},
    ),
    Case(keras_drsl.LogitSqueezing, {"lam": 0.2}, reference.logit_squeezing, NEGATIVE),
    Case(keras_drsl.ZLoss, {"lam": 0.2}, reference.z_loss, NEGATIVE),
]
BY_NAME = {case.loss.__name__: case for case in FAMILY}
each_loss = pytest.mark.parametrize("name", BY_NAME)


@each_loss
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_the_value_is_the_formula_for_every_form_of_class_ids(name, shape):
    case, (z, ids, one_hot) = BY_NAME[name], draw(shape)
    expected = case.expected(one_hot, z)
    loss = case.make(from_logits=True, reduction=None)
    for labels in (ids, ids[..., None], ids.astype("float32"), ids.astype("uint8"), one_hot, one_hot.astype(bool)):
        np.testing.assert_allclose(values(loss(labels, z)), expected, rtol=1e-5, atol=1e-6)


@each_loss
def test_any_label_distribution_is_taken(name):
    case, (z, _, _) = BY_NAME[name], draw()
    y = np.random.default_rng(1).dirichlet(np.ones(5), 6)
    got = case.make(from_logits=True, reduction=None)(y, z)
    np.testing.assert_allclose(values(got), case.expected(y, z), rtol=1e-5, atol=1e-6)


@each_loss
@pytest.mark.parametrize("axis", [1, -2, 0])
def test_the_classes_may_lie_along_any_axis(name, axis):
    case, (z, ids, one_hot) = BY_NAME[name], draw((3, 4, 5))
    loss = case.make(from_logits=True, reduction=None, axis=axis)
    for y in (ids, np.moveaxis(one_hot, -1, axis)):
        got = values(loss(y, np.moveaxis(z, -1, axis)))
        np.testing.assert_allclose(got, case.expected(one_hot, z), rtol=1e-5, atol=1e-6)


@each_loss
def test_probabilities_give_the_same_where_the_formula_knows_them(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    loss = case.make(reduction=None)
    if case.loss.needs_logits:
        with pytest.raises(ValueError, match=f"{name} depends on the logits themselves.*Received: from_logits=False"):
            loss(ids, softmax(z))
    else:
        np.testing.assert_allclose(values(loss(ids, softmax(z))), case.expected(one_hot, z), rtol=1e-4, atol=1e-6)


@on_tensorflow
@each_loss
def test_the_logits_behind_a_softmax_are_found(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    got = case.make(reduction=None)(ids, ops.softmax(z))
    np.testing.assert_allclose(values(got), case.expected(one_hot, z), rtol=1e-5, atol=1e-6)


@each_loss
def test_two_classes_are_enough(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw((6, 2))
    if name == "PRSLoss":
        case = case._replace(options={"lam": 0.2, "start": 0, "end": 1})
    got = case.make(from_logits=True, reduction=None)(ids, z)
    np.testing.assert_allclose(values(got), case.expected(one_hot, z), rtol=1e-5, atol=1e-6)


@on_tensorflow
@each_loss
@pytest.mark.parametrize("labels", ["ids", "distribution"])
def test_the_gradient_is_that_of_central_differences_in_float64(name, labels):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    y_soft = np.random.default_rng(1).dirichlet(np.ones(5), 6)
    y, distribution = (ids, one_hot) if labels == "ids" else (y_soft, y_soft)
    loss = case.make(from_logits=True, reduction="sum", dtype="float64")
    got = gradient(lambda z: loss(y, z), z, "float64")
    expected = reference.gradient(lambda z: case.expected(distribution, z), z)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@each_loss
def test_value_and_gradient_are_finite_for_equal_saturated_and_large_logits(name):
    z = np.array([[0, 0, 0, 0], [7, 7, 7, 7], [1e4, -1e4, 0, 0], [-1e4, 1e4, 1e4, 0], [1e4, 1e4, 1e4, 1e4]], "float32")
    ids = np.array([0, 1, 0, 0, 2])
    case = BY_NAME[name]
    loss = case.make(from_logits=True, reduction=None)
    expected = case.expected(reference.one_hot(ids, 4), z)
    np.testing.assert_allclose(values(loss(ids, z)), expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(gradient(lambda z: loss(ids, z), z)))


@each_loss
def test_half_precision_predictions_are_computed_in_float32(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw(scale=100.0)
    half = z.astype("float16")
    # Not through `__call__`, where Keras casts to float32 by itself.
    got = case.make(from_logits=True).call(ids, ops.convert_to_tensor(half))
    np.testing.assert_allclose(values(got), case.expected(one_hot, half), rtol=1e-5, atol=1e-5)


@each_loss
@pytest.mark.parametrize("labels", ["sparse", "one_hot"])
def test_ignored_positions_are_as_if_they_were_not_there(name, labels):
    case, (z, ids, _) = BY_NAME[name], draw((4, 6, 5))
    ignored = np.random.default_rng(1).random((4, 6)) < 0.4
    expected = case.expected(reference.one_hot(ids[~ignored], 5), z[~ignored]).mean()
    ids[ignored] = -1
    z[ignored] = np.nan
    y = (ids[..., None] == np.arange(5)).astype("float32") if labels == "one_hot" else ids
    loss = case.make(from_logits=True, ignore_class=-1)
    np.testing.assert_allclose(values(loss(y, z)), expected, rtol=1e-5)
    slope = gradient(lambda z: loss(y, z), z)
    assert np.all(slope[ignored] == 0)
    assert np.all(np.isfinite(slope))
    assert np.any(slope[~ignored] != 0)


@each_loss
def test_when_everything_is_ignored_the_loss_is_zero(name):
    z, _, _ = draw()
    loss = BY_NAME[name].make(from_logits=True, ignore_class=9)
    assert values(loss(np.full(6, 9), z)) == 0
    np.testing.assert_array_equal(gradient(lambda z: loss(np.full(6, 9), z), z), np.zeros_like(z))


@each_loss
def test_a_masked_sequence_equals_its_unmasked_part(name):
    case, (z, ids, _) = BY_NAME[name], draw((4, 6, 5))
    z[:, 4:] = 0.0  # Masking's mark of a step that is not there
    expected = case.expected(reference.one_hot(ids[:, :4], 5), z[:, :4]).mean()
    ids[:, 4:] = 77
    got = case.make(from_logits=True)(ids, keras.layers.Masking()(z))
    np.testing.assert_allclose(values(got), expected, rtol=1e-5)


# Weights are Keras's affair but for PRSLoss.
@pytest.mark.parametrize(("name", "weighted"), [*((name, False) for name in BY_NAME), ("PRSLoss", True)])
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}])
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
    layers = [keras.layers.Masking(), keras.layers.Dense(5, kernel_initializer="identity", use_bias=False)]
    model = keras.Sequential([keras.Input((6, 5)), *layers])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=case.make(from_logits=True), **options)
    got = model.fit(z, ids, sample_weight=weights if weighted else None, batch_size=4, verbose=0).history["loss"]
    np.testing.assert_allclose(got, [(kept * each).mean()], rtol=1e-5)


@each_loss
def test_sample_weights_weigh_each_samples_value(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    weights = np.array([0, 1, 2, 0.5, 3, 0])
    for reduction, divisor in (("sum_over_batch_size", 6), ("sum", 1), ("mean_with_sample_weight", weights.sum())):
        each = case.expected(one_hot, z)
        if name == "PRSLoss":
            # Its restraint knows the weights as well.
            number = weights.sum() if reduction == "mean_with_sample_weight" else 6
            each = np.array(reference.prs_loss(one_hot, z, **case.options, weights=weights, number=number))
        got = case.make(from_logits=True, reduction=reduction)(ids, z, weights.astype("float32"))
        np.testing.assert_allclose(values(got), (weights * each).sum() / divisor, rtol=1e-5)


@each_loss
def test_fit_ends_the_same_eager_in_a_graph_and_under_xla(name):
    x, y = small_data(18)
    results = []
    for options in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        if BACKEND == "torch" and options.get("jit_compile"):
            continue
        model = small_model(activation=None)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss=BY_NAME[name].make(from_logits=True), **options)
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        results.append([*model.get_weights(), np.array(history["loss"])])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@each_loss
def test_every_argument_survives_in_the_config(name):
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


def test_saved_models_are_loaded_in_a_fresh_process(tmp_path):
    x, y = small_data()
    expected = {}
    for name, case in BY_NAME.items():
        model = small_model(activation=None)
        model.compile(loss=case.make(from_logits=True))
        model.save(tmp_path / f"{name}.keras")
        expected[name] = model.evaluate(x, y, batch_size=20, verbose=0)
    np.savez(tmp_path / "data.npz", x=x, y=y, **expected)
    run_python(
        f"""
        import keras, numpy as np, keras_drsl
        data = np.load({str(tmp_path)!r} + "/data.npz")
        for name in {list(BY_NAME)}:
            model = keras.models.load_model({str(tmp_path)!r} + "/" + name + ".keras")
            assert type(model.loss).__name__ == name
            got = model.evaluate(data["x"], data["y"], batch_size=20, verbose=0)
            np.testing.assert_allclose(got, data[name], atol=1e-6)
        """
    )


@each_loss
def test_arguments_out_of_range_are_named(name):
    case = BY_NAME[name]
    for argument, (value, rule) in case.bad.items():
        with pytest.raises(ValueError, match=f"`{argument}` must be {rule}. Received: {argument}={value}"):
            case.loss(**{argument: value})
    for argument in ("ignore_class", "axis"):
        with pytest.raises(ValueError, match=f"`{argument}` must be an integer. Received: {argument}=1.5"):
            case.make(**{argument: 1.5})
    with pytest.raises(ValueError, match="Received: reduction=average"):
        case.make(reduction="average")


@each_loss
def test_labels_that_cannot_be_are_named_or_make_the_loss_nan(name):
    z, ids, _ = draw()
    loss = BY_NAME[name].make(from_logits=True, reduction=None)
    with pytest.raises(ValueError, match=r"`y_true` must hold a class id for each position.*y_true.shape=\(3,\)"):
        loss(ids[:3], z)
    with pytest.raises(ValueError, match=r"`y_pred` must have two classes or more.*y_pred.shape=\(6, 1\)"):
        loss(ids, z[:, :1])
    ids[3] = 5
    with pytest.raises(ValueError, match=r"`y_true` must hold class ids in \[0, 5\).*Received: 5"):
        loss(ids, ops.convert_to_tensor(z))
    got = values(compiled(lambda y, z: loss(y, z))(ops.convert_to_tensor(ids), ops.convert_to_tensor(z)))
    assert np.array_equal(np.isnan(got), np.arange(6) == 3)


@each_loss
def test_each_loss_is_called_by_its_name_in_snake_case(name):
    words = BY_NAME[name].make().name.split("_")
    assert "".join(words) == name.lower()
    starts = {sum(map(len, words[:place])) for place in range(len(words))}
    # A capital before a small letter begins a word; those before it are one, as in DRSLoss.
    assert starts == {0} | {place for place in range(len(name)) if re.match("[A-Z][a-z]", name[place:])}


def test_all_public_losses_are_tested_here():
    public = {one for one in vars(keras_drsl).values() if isinstance(one, type) and issubclass(one, ClassificationLoss)}
    assert public == {case.loss for case in FAMILY}
