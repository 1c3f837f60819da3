"""Test that labels, weights and predictions that do not fit are an error, and that empty batches fit."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import DRSLoss, SoftmaxDiversity, drs_loss, linear_drs_loss, prs_loss, softmax_diversity
from tests import reference
from tests.backends import BACKEND, FIT_MODES, gradient, needs_xla, on_tensorflow, values
from tests.helpers import few_of
from tests.losses.cases import draw
from tests.losses.family import BY_NAME, each_loss

FUNCTIONS = {
    "drs_loss": lambda y, z: drs_loss(y, z, from_logits=True),
    "smoothed": lambda y, z: drs_loss(y, z, from_logits=True, label_smoothing=0.1),
    "prs_loss": lambda y, z: prs_loss(y, z, end=2, from_logits=True),
    "softmax_diversity": lambda y, z: softmax_diversity(y, z, from_logits=True),
    "linear_drs_loss": lambda y, z: linear_drs_loss(y, z, np.eye(z.shape[-1], dtype="float32")),
} | {name: case.make(from_logits=True, reduction=None) for name, case in BY_NAME.items()}

each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)

# Labels and predictions of which one could be reshaped or broadcast to the other.
MISFITS = [
    ((4, 3), (3, 4, 5)),
    ((1,), (3, 5)),
    ((1, 1), (3, 5)),
    ((1, 4), (3, 4, 5)),
    ((1, 5), (3, 5)),
    ((6, 2), (3, 4, 5)),
]


def any_lengths(shape):
    """Return a shape of unknown lengths, apart from the number of classes."""
    return [None if length != 5 else length for length in shape]


def labels_of(shape):
    return np.eye(5, dtype="float32")[np.zeros(shape[:-1], int)] if shape[-1] == 5 else np.zeros(shape, "int32")


# A1
@on_tensorflow
@pytest.mark.parametrize(
    ("jit_compile", "name"),
    few_of(
        [False, True],
        FUNCTIONS,
        keep=[
            (False, "linear_drs_loss"),
            (False, "softmax_diversity"),
            (True, "drs_loss"),
            (True, "PRSLoss"),
        ],
    ),
)
def test_misfits_are_an_error_in_a_graph(name, jit_compile):
    import tensorflow as tf

    function = FUNCTIONS[name]
    for y_shape, z_shape in MISFITS:
        if function is FUNCTIONS["linear_drs_loss"] and y_shape[-1] == 5:
            continue
        y, z = labels_of(y_shape), np.ones(z_shape, "float32")
        signature = [tf.TensorSpec(any_lengths(y_shape), y.dtype), tf.TensorSpec(any_lengths(z_shape))]
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
            tf.function(function, signature, jit_compile=jit_compile)(y, z)


# A1
@on_tensorflow
def test_misfits_are_an_error_for_a_gradient_alone():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, None), "int32"), tf.TensorSpec((None, None, 5))])
    def slope(y, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = DRSLoss(from_logits=True)(y, z)
        return tape.gradient(value, z)

    z, ids, _ = draw((3, 4, 5))
    assert slope(ids.astype("int32"), z).shape == z.shape
    with pytest.raises(tf.errors.InvalidArgumentError):
        slope(ids.T.astype("int32"), z)


# A1
@pytest.mark.short
@each_function
def test_misfits_are_an_error_eagerly(function):
    if BACKEND == "torch" and function is FUNCTIONS["linear_drs_loss"]:
        pytest.skip("needs XLA")
    for y_shape, z_shape in MISFITS:
        with pytest.raises(ValueError, match="`y_true` must hold one class id per position"):
            function(labels_of(y_shape), np.ones(z_shape, "float32"))


# A1
@on_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_swapped_labels_stop_fit(jit_compile):
    import tensorflow as tf

    z, ids, _ = draw((8, 8, 5))
    model = keras.Sequential([keras.layers.Dense(5)])
    model.compile(loss=DRSLoss(from_logits=True), jit_compile=jit_compile)
    # Batches of 4 have labels (8, 4) for predictions (4, 8, 5).
    shapes = tf.TensorSpec((None, None, 5)), tf.TensorSpec((None, None), "int64")
    batches = lambda: ((z[i : i + 4], ids[:, i : i + 4]) for i in (0, 4))
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.fit(tf.data.Dataset.from_generator(batches, output_signature=shapes), verbose=0)


# A1
@on_tensorflow
@each_function
def test_ragged_tensors_are_an_error(function):
    import tensorflow as tf

    labels = tf.ragged.constant([[0, 1, 2], [3]])
    with pytest.raises(ValueError, match="`y_true` must be a dense tensor, not a ragged or sparse one"):
        function(labels, np.ones((2, 2, 5), "float32"))
    for y in (labels, np.zeros((2, 3), "int32")):
        with pytest.raises(ValueError, match="must be a dense tensor, not a ragged or sparse one"):
            function(y, tf.RaggedTensor.from_row_lengths(np.ones((4, 5), "float32"), [3, 1]))


# A1
@pytest.mark.short
def test_sparse_and_nested_tensors_are_an_error():
    one_hot = np.eye(3, dtype="float32")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = [tf.sparse.from_dense(one_hot)]
    elif BACKEND == "jax":
        from jax.experimental import sparse

        tensors = [sparse.BCOO.fromdense(one_hot)]
    else:
        import torch

        tensors = [torch.tensor(one_hot).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
    for x in tensors:
        with pytest.raises(ValueError, match="`y_true` must be a dense tensor"):
            drs_loss(x, one_hot)
        with pytest.raises(ValueError, match="`y_pred` must be a dense tensor"):
            drs_loss([0, 1, 2], x)


WEIGHT_MISFITS = [(3, 4), (2,), (4,), (4, 1)]


# A1
@pytest.mark.short
@each_loss
def test_weights_of_other_shapes_are_an_error(name):
    z, ids, _ = draw((4, 3, 5))
    loss = BY_NAME[name].make(from_logits=True)
    for shape in WEIGHT_MISFITS[:3]:
        with pytest.raises(ValueError, match="`sample_weight`.*must hold one weight per position"):
            loss(ids, z, np.ones(shape, "float32"))
    expected = values(loss(ids, z, np.full((4, 3), 2.0, "float32")))
    for shape in ((4, 3, 1), (4, 1), (1, 3), ()):
        np.testing.assert_allclose(values(loss(ids, z, np.full(shape, 2.0, "float32"))), expected, rtol=1e-5)


# A1
@on_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("make", [lambda: DRSLoss(from_logits=True), lambda: SoftmaxDiversity(from_logits=True)])
def test_weights_of_other_lengths_stop_a_graph(make, jit_compile):
    import tensorflow as tf

    z, ids, _ = draw((4, 3, 5))
    call = make()
    call = call if isinstance(call, keras.losses.Loss) else call.update_state
    for shape in ((3, 4), (4, 4), (8, 3)):
        signature = [tf.TensorSpec((None, None), "int64"), tf.TensorSpec((None, None, 5)), tf.TensorSpec((None, None))]
        program = tf.function(call, signature, jit_compile=jit_compile)
        program(ids, z, np.ones((4, 3), "float32"))
        with pytest.raises(tf.errors.InvalidArgumentError):
            program(ids, z, np.ones(shape, "float32"))


# A1
@pytest.mark.short
def test_metric_weights_of_other_shapes_are_an_error():
    z, ids, one_hot = draw((4, 3, 5))
    each = reference.each(reference.diversity, one_hot, z)
    weights = np.array([1, 2, 0, 3], "float32")
    metric = SoftmaxDiversity(from_logits=True)
    metric.update_state(ids, z, sample_weight=weights)
    np.testing.assert_allclose(values(metric.result()), np.average(each.mean(1), weights=weights), rtol=1e-4)
    for shape in ((3,), (3, 4), (2, 3), (4, 3, 2)):
        with pytest.raises(ValueError, match="`sample_weight`.*must hold one weight per position"):
            metric.update_state(ids, z, sample_weight=np.ones(shape, "float32"))


def test_weights_are_not_changed_by_a_mask():
    z, ids, _ = draw((4, 6, 5))
    weights = ops.ones((4, 6))
    DRSLoss(from_logits=True, ignore_class=2)(ids, z, weights)
    assert np.all(values(weights) == 1)


# A1
@on_tensorflow
def test_masks_of_other_lengths_stop_a_graph():
    import tensorflow as tf

    @tf.function(
        input_signature=[tf.TensorSpec((None,), "int32"), tf.TensorSpec((None, 5)), tf.TensorSpec((None,), "bool")]
    )
    def loss(y, z, mask):
        z = tf.identity(z)
        z._keras_mask = mask
        return drs_loss(y, z, from_logits=True)

    y, z = np.zeros(3, "int32"), np.ones((3, 5), "float32")
    assert loss(y, z, np.ones(3, bool)).shape == 3
    with pytest.raises(tf.errors.InvalidArgumentError):
        loss(y, z, np.ones(1, bool))


# A7
@pytest.mark.short
@each_function
@pytest.mark.parametrize("classes", [5, 70])
def test_takes_an_empty_batch(function, classes):
    if BACKEND == "torch" and function is FUNCTIONS["linear_drs_loss"]:
        pytest.skip("needs XLA")
    z, ids = np.zeros((0, classes), "float32"), np.zeros(0, "int32")
    labels = [ids] if function is FUNCTIONS["linear_drs_loss"] else [ids, z]
    for y in labels:
        assert values(function(y, ops.convert_to_tensor(z))).shape == (0,)
        assert gradient(lambda z, y=y: function(y, z), z).shape == (0, classes)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        program = tf.function(function, [tf.TensorSpec((None,), "int32"), tf.TensorSpec((None, classes))])
        assert program(ids, z).shape == (0,)


# A7
@pytest.mark.short
def test_classes_and_metric_take_an_empty_batch():
    z, ids = np.zeros((0, 5), "float32"), np.zeros(0, "int32")
    for reduction in ("sum_over_batch_size", "sum", None):
        keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        ours = DRSLoss(from_logits=True, reduction=reduction)(ids, z)
        assert values(ours).shape == values(keras_loss(ids, z)).shape
    for measure in ("variance", "std", "entropy"):
        metric = SoftmaxDiversity(measure=measure)
        metric.update_state(ids, z)
        assert values(metric.result()) == 0
    assert values(DRSLoss(ignore_class=0)(ids, ops.softmax(z))).shape == (0,)


# A7
@needs_xla
@pytest.mark.parametrize("options", FIT_MODES)
def test_fit_takes_an_empty_batch_of_sequences(options):
    model = keras.Sequential([keras.Input((0, 3)), keras.layers.Dense(70)])
    model.compile(loss=keras_drsl.DRSLoss(from_logits=True), **options)
    history = model.fit(np.zeros((4, 0, 3)), np.zeros((4, 0)), batch_size=2, verbose=0).history
    assert history["loss"] == [0]
