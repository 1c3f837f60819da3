"""Test that values which are not labels, probabilities or finite logits are an error, NaN, or have the right result."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import DRSLoss, SoftmaxDiversity, drs_loss, linear_drs_loss, softmax_diversity
from tests import reference
from tests.backends import BACKEND, compiled, gradient, needs_xla, on_jax, on_tensorflow, values
from tests.losses.cases import draw, small_data, small_model, softmax
from tests.losses.family import BY_NAME, each_loss

tensor = ops.convert_to_tensor

WRONG_DISTRIBUTIONS = [[1, 1, 1, 1, 1], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1.5, -0.5, 0, 0, 0], [math.nan, 1, 0, 0, 0]]
WRONG_DISTRIBUTIONS += [[math.inf, 0, 0, 0, 0]]


# A4
@on_tensorflow
@pytest.mark.parametrize("head", [keras.activations.sigmoid, ops.sigmoid])
@pytest.mark.parametrize("in_graph", [False, True])
def test_logits_of_a_sigmoid_are_not_used(head, in_graph):
    import tensorflow as tf

    # The two outputs of a sigmoid of opposite numbers sum to 1, and are not the softmax of these numbers.
    z = np.array([[1.5, -1.5], [-0.2, 0.2], [0, 0]], "float32")
    ids = np.array([0, 0, 1])
    p = 1 / (1 + np.exp(-z.astype("float64")))
    expected = reference.each(reference.drs_loss, reference.one_hot(ids, 2), np.log(p))
    for loss in (lambda y, p: drs_loss(y, p), DRSLoss(reduction=None)):
        function = lambda z, loss=loss: loss(ids, head(z))
        function = tf.function(function) if in_graph else function
        np.testing.assert_allclose(values(function(tensor(z))), expected, rtol=1e-5)
        slope = gradient(lambda p: drs_loss(ids, p), p.astype("float32"))
        np.testing.assert_allclose(gradient(function, z), slope * p * (1 - p), rtol=1e-5)
    with pytest.raises(ValueError, match="PRSLoss needs logits"):
        keras_drsl.prs_loss(ids, head(tensor(z)), end=1)


# A4
@on_tensorflow
@pytest.mark.parametrize("rows", [[[0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_a_sigmoid_that_equals_a_softmax_has_its_own_slope(rows):
    z = np.array(rows, "float32")
    loss = lambda head: gradient(lambda z: drs_loss(np.zeros(len(z)), head(z)), z)[0]
    # TensorFlow's cross-entropy divides by the sum: d/dz of -log(p_0 / (p_0 + p_1)) with dp/dz = 1/4.
    np.testing.assert_allclose(loss(keras.activations.sigmoid), [-0.25, 0.25], atol=1e-6)
    np.testing.assert_allclose(loss(keras.activations.softmax), [-0.5, 0.5], atol=1e-6)


# A4
@on_tensorflow
@pytest.mark.parametrize("in_graph", [False, True])
def test_logits_of_a_softmax_over_another_axis_are_not_used(in_graph):
    import tensorflow as tf

    z = draw((1, 4))[0][0][(np.arange(4)[:, None] + np.arange(4)) % 4]  # sums to 1 along both axes
    z = np.stack([z, 2 * z, z + 5])
    ids = draw((3, 4, 4))[1]
    p = softmax(z)
    wide = z + np.arange(4)[:, None]  # other logits with the same softmax over the last axis
    expected = reference.each(reference.drs_loss, reference.one_hot(ids, 4), np.log(p.astype("float64")))
    for softmax_axis, loss_axis in ((-1, 1), (2, -2), (2, 1)):
        function = lambda z, a=softmax_axis, b=loss_axis: drs_loss(ids, keras.activations.softmax(z, axis=a), axis=b)
        function = tf.function(function) if in_graph else function
        np.testing.assert_allclose(values(function(tensor(wide))), np.swapaxes(expected, 0, 0), rtol=1e-3)
    # Over the axis of the classes they are used: the probabilities alone would be clipped.
    z = np.moveaxis(np.array([[[200.0, 0, -50], [0, 300, 0]]], "float32"), -1, 1)
    function = lambda z: drs_loss(np.array([[1, 0]]), keras.activations.softmax(z, axis=1), axis=1)
    function = tf.function(function) if in_graph else function
    expected = drs_loss(np.array([[1, 0]]), z, axis=1, from_logits=True)
    np.testing.assert_allclose(values(function(tensor(z))), values(expected), rtol=1e-5)


# A4
@pytest.mark.short
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": BACKEND == "jax"}])
def test_lam_0_is_keras_with_a_saturated_softmax_layer(options):
    x = np.array([[90.0, 0, -90], [-90, 0, 90], [0, 0, 0]], "float32")
    y = np.array([1, 0, 2])
    got = []
    for loss in (DRSLoss(lam=0), "sparse_categorical_crossentropy"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Softmax()])
        model.compile(loss=loss, **options)
        got.append(model.evaluate(x, y, verbose=0))
    np.testing.assert_allclose(*got, rtol=1e-6)


# A9
@pytest.mark.short
def test_entropy_is_finite_for_masked_classes():
    z, ids, _ = draw()
    ids[:] = 0
    z[1, 2] = z[3, 3] = z[3, 4] = -math.inf
    finite = np.where(np.isinf(z), -1e4, z)
    expected = reference.each(reference.entropy, reference.one_hot(ids, 5), finite)
    entropy = lambda z: softmax_diversity(ids, z, measure="entropy", from_logits=True)
    np.testing.assert_allclose(values(entropy(z)), expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient(entropy, z)))
    metric = SoftmaxDiversity(measure="entropy", from_logits=True)
    metric.update_state(ids, z)
    np.testing.assert_allclose(values(metric.result()), expected.mean(), rtol=1e-5)


FINITE_FOR_MASKED_CLASSES = [
    (keras_drsl.DRSLoss, {"lam": 0}),
    (keras_drsl.DRSLoss, {"space": "softmax"}),
    (keras_drsl.ComplementObjective, {}),
    (keras_drsl.GuidedComplementEntropy, {}),
    (keras_drsl.ProbabilisticallyCompactLoss, {}),
    (keras_drsl.ZLoss, {"lam": 0.1}),
    (keras_drsl.PRSLoss, {"end": 2}),
]


# A9
@pytest.mark.short
@pytest.mark.parametrize(("loss", "options"), FINITE_FOR_MASKED_CLASSES)
@pytest.mark.parametrize("labels", ["ids", "one_hot"])
def test_losses_that_are_finite_for_masked_classes(loss, options, labels):
    z, ids, one_hot = draw()
    ids[:] = 0
    one_hot = reference.one_hot(ids, 5).astype("float32")
    z[1, 2] = z[3, 4] = -math.inf
    y = ids if labels == "ids" else one_hot
    function = lambda z: loss(**options, from_logits=True, reduction="sum")(y, z)
    # -1e4 is not 0 as a probability only beyond float32.
    near = np.where(np.isinf(z), -1e4, z).astype("float32")
    np.testing.assert_allclose(values(function(z)), values(function(near)), rtol=1e-5)
    assert np.all(np.isfinite(gradient(function, z)))


# A9
@pytest.mark.parametrize(
    "make", [DRSLoss, keras_drsl.Squentropy, keras_drsl.LogitSqueezing, lambda **o: keras_drsl.PRSLoss(end=4, **o)]
)
def test_losses_without_a_finite_value_do_not_hide_it(make):
    z = np.array([[3.0, 1.0, -math.inf, 0.0, 2.0]], "float32")
    assert not np.isfinite(values(make(from_logits=True)(np.array([0]), z)))


# A10
@pytest.mark.short
@pytest.mark.parametrize("call", ["function", "class", "metric", "linear"])
def test_ignore_class_is_compared_exactly(call):
    if call == "linear" and BACKEND == "torch":
        pytest.skip("needs XLA")
    z, ids, one_hot = draw()

    def mean(y, ignore_class):
        options = {"from_logits": True, "ignore_class": ignore_class}
        if call == "metric":
            metric = SoftmaxDiversity(**options)
            metric.update_state(y, z)
            return metric.result()
        if call == "class":
            return DRSLoss(**options)(y, z)
        if call == "linear":
            got = linear_drs_loss(y, z, np.eye(5, dtype="float32"), ignore_class=ignore_class)
        else:
            got = drs_loss(y, z, **options)
        return ops.sum(got) / np.sum(y != ignore_class)

    loop = reference.diversity if call == "metric" else reference.drs_loss
    each = reference.each(loop, one_hot, z)
    for dtype, ignored in (("int8", -1), ("uint8", 255), ("int32", 2**31 - 1), ("int64", -(2**31)), ("float32", -1)):
        y = ids.astype(dtype)
        y[2] = ignored
        np.testing.assert_allclose(values(mean(y, ignored)), np.delete(each, 2).mean(), rtol=1e-5)
    # A label that only looks like it in fewer bits is not ignored.
    for dtype, label, ignored in (("uint8", 255, -1), ("int64", -1, 255), ("uint32", 2**32 - 1, -1)):
        y = ids.astype(dtype)
        y[2] = label
        with pytest.raises(ValueError, match=r"`y_true` must hold"):
            mean(y, ignored)
    np.testing.assert_allclose(values(mean(ids.astype("uint8"), -1)), each.mean(), rtol=1e-5)
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="`ignore_class` must be a 32-bit integer.*ignore_class=4294967295"):
            mean(ids, 2**32 - 1)
        return
    y = ids.astype("int64")
    y[2] = 2**32 - 1
    np.testing.assert_allclose(values(mean(y, 2**32 - 1)), np.delete(each, 2).mean(), rtol=1e-5)
    y[2] = -1
    with pytest.raises(ValueError, match=r"class ids in \[0, 5\).*Received: -1"):
        mean(y, 2**32 - 1)


# A10
@pytest.mark.short
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_ignore_class_of_one_hot_labels_is_exact(dtype):
    z, ids, one_hot = draw()
    each = reference.each(reference.drs_loss, one_hot, z)
    for ignored in (1, 2**32 + 1, 2**70)[: 1 if BACKEND == "jax" else 3]:
        got = drs_loss(one_hot.astype(dtype), z, from_logits=True, ignore_class=ignored)
        np.testing.assert_allclose(values(got), np.where(ids == ignored, 0, each), rtol=1e-5)


# A10
@pytest.mark.short
def test_class_ids_beyond_32_bits_are_an_error():
    z, ids, _ = draw()
    for label in (2**32 + 1, 2**32, -(2**40)):
        y = ids.astype("int64")
        y[2] = label
        with pytest.raises(ValueError, match=f"`y_true` must hold.*Received: {label}"):
            drs_loss(y, z, from_logits=True)


# A11
@pytest.mark.short
@pytest.mark.parametrize("row", WRONG_DISTRIBUTIONS)
def test_labels_that_are_no_distribution_are_an_error(row):
    z, _, one_hot = draw()
    one_hot[3] = row
    for call in (DRSLoss(from_logits=True), keras_drsl.Squentropy(from_logits=True), softmax_diversity):
        with pytest.raises(ValueError, match="`y_true` must hold class ids or label distributions"):
            call(one_hot, z)
    kept = np.arange(6) != 3
    if not any(row):
        got = drs_loss(one_hot, z, from_logits=True, ignore_class=-1)
        np.testing.assert_allclose(values(got)[kept], reference.each(reference.drs_loss, one_hot, z)[kept], rtol=1e-5)
        assert values(got)[3] == 0


# A11
@pytest.mark.short
@each_loss
def test_such_labels_give_nan_in_a_compiled_program(name):
    z, _, one_hot = draw((7, 5))
    one_hot[:6] = WRONG_DISTRIBUTIONS
    loss = BY_NAME[name].make(from_logits=True, reduction=None)
    program = compiled(lambda y, z: loss(y, z))
    assert np.all(np.isnan(values(program(tensor(one_hot), tensor(z)))[:6]))
    assert np.all(np.isnan(gradient(lambda z: program(tensor(one_hot), z), z)[:6]))
    if name != "PRSLoss":  # where a token depends on the others
        assert np.all(np.isfinite(values(program(tensor(one_hot), tensor(z)))[6:]))


# A11
def test_half_precision_distributions_are_taken():
    y = np.random.default_rng(0).dirichlet(np.ones(1000), 4)
    z = draw((4, 1000))[0]
    for dtype in ("float16", "bfloat16"):
        assert np.all(np.isfinite(values(drs_loss(ops.cast(y, dtype), z, from_logits=True))))


# A12
@pytest.mark.short
def test_error_for_a_label_points_to_ignore_class():
    z, ids, _ = draw()
    ids[2] = -1
    with pytest.raises(
        ValueError, match="use `ignore_class`, such as `ignore_class=-1`: a sample weight of 0 does not"
    ):
        DRSLoss(from_logits=True)(ids, z, (ids >= 0).astype("float32"))
    assert np.isfinite(values(DRSLoss(from_logits=True, ignore_class=-1)(ids, z, (ids >= 0).astype("float32"))))


# A14
@pytest.mark.short
def test_logits_without_from_logits_are_an_error():
    z, ids, one_hot = draw()
    for y in (ids, one_hot):
        for call in (DRSLoss(), keras_drsl.ComplementObjective(), softmax_diversity, SoftmaxDiversity().update_state):
            for wrong in (z, np.abs(z), np.add(softmax(z), [0.9, -0.9, 0, 0, 0])):
                with pytest.raises(ValueError, match="`y_pred` must hold probabilities.*unless `from_logits=True`"):
                    call(y, tensor(wrong.astype("float32")))
    # Masked positions may hold anything.
    p = softmax(z)
    p[2] = 7
    ids[2] = -1
    assert np.isfinite(values(DRSLoss(ignore_class=-1)(ids, tensor(p))))


# A14
@pytest.mark.short
def test_nan_predictions_give_nan_and_no_error():
    z, ids, _ = draw()
    p = softmax(z)
    p[2] = np.nan
    assert np.array_equal(np.isnan(values(drs_loss(ids, tensor(p)))), np.arange(6) == 2)


# A14
@pytest.mark.short
@pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": BACKEND != "torch"}]
)
def test_fit_stops_for_logits_without_from_logits(options):
    x, y = small_data()
    model = small_model(activation=None)
    model.compile(loss=DRSLoss(), **options)
    is_eager = "run_eagerly" in options or (BACKEND != "tensorflow" and not options["jit_compile"])
    if is_eager:
        with pytest.raises(ValueError, match="from_logits=True"):
            model.fit(x, y, verbose=0)
    elif BACKEND == "tensorflow" and not options["jit_compile"]:
        with pytest.raises(Exception, match="from_logits=True"):
            model.fit(x, y, verbose=0)
    else:
        assert np.isnan(model.fit(x, y, verbose=0).history["loss"])


# A14
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("classes", [5, 1000, 50_000])
def test_softmax_of_any_precision_is_taken(dtype, classes):
    z, ids, _ = draw((4, classes))
    p = ops.cast(softmax(z), dtype)
    assert np.all(np.isfinite(values(drs_loss(ids, p))))


# A14
@on_tensorflow
def test_logits_behind_a_softmax_are_not_checked():
    import tensorflow as tf

    program = tf.function(lambda y, z: DRSLoss()(y, tf.nn.softmax(z)))
    graph = program.get_concrete_function(tf.TensorSpec((4,), "int32"), tf.TensorSpec((4, 5))).graph
    assert not [op for op in graph.get_operations() if op.type == "Assert"]


@pytest.mark.short
@pytest.mark.parametrize("floatx", ["float64", "float16"])
def test_floatx_is_the_dtype_of_losses_and_metric(floatx):
    z, ids, one_hot = draw()
    keras.config.set_floatx(floatx)
    try:
        loss, metric = DRSLoss(from_logits=True), SoftmaxDiversity(from_logits=True)
        got = loss(ids, ops.cast(z, floatx))
        # Keras's mean is float32 on PyTorch, and JAX has no float64 unless told to.
        dtype = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(ids, ops.cast(z, floatx)).dtype
        model = small_model(activation=None)
        model.compile(loss=loss, metrics=[metric])
        x, y = small_data()
        assert np.isfinite(model.fit(x.astype(floatx), y, verbose=0).history["loss"])
        metric.reset_state()
        metric.update_state(ids, ops.cast(z, floatx))
        diversity = values(metric.result())
    finally:
        keras.config.set_floatx("float32")
    tolerance = 1e-2 if floatx == "float16" else 1e-6
    assert got.dtype == dtype
    expected = reference.each(reference.drs_loss, one_hot, z).mean()
    np.testing.assert_allclose(values(got).astype("float64"), expected, rtol=tolerance)
    expected = reference.each(reference.diversity, one_hot, z).mean()
    np.testing.assert_allclose(diversity.astype("float64"), expected, rtol=tolerance)


# A8b
@needs_xla
def test_the_head_may_be_lists():
    z = linear_drs_loss([0, 1], [[1.0, 2.0], [0.5, 0.0]], [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], [0.0, 0.0, 1.0])
    logits = np.array([[1, 2, 5], [0.5, 0, 2]])
    np.testing.assert_allclose(values(z), reference.each(reference.drs_loss, np.eye(3)[[0, 1]], logits), rtol=1e-5)


@on_jax
def test_64_bits_on_jax_allow_a_large_ignore_class():
    import jax

    z, ids, one_hot = draw()
    with jax.enable_x64(True):
        y = ids.astype("int64")
        y[2] = 2**32 - 1
        got = values(drs_loss(y, z, from_logits=True, ignore_class=2**32 - 1))
    kept = np.arange(6) != 2
    np.testing.assert_allclose(got[kept], reference.each(reference.drs_loss, one_hot, z)[kept], rtol=1e-5)
