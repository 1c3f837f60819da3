"""Test hyperparameters that change: how often programs are compiled, and variables in place of numbers."""

import gc
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import DRSLoss, _backend, drs_loss, linear_drs_loss, prs_loss
from keras_drsl._backend._common import padded_length
from keras_drsl.losses import fused, linear_drs
from tests import reference
from tests.backends import BACKEND, gradient, needs_xla, on_jax, on_tensorflow, values
from tests.helpers import some_short
from tests.losses.cases import draw, small_data, small_model
from tests.losses.family import BY_NAME


@pytest.fixture
def traces(monkeypatch):
    """Count how often programs are traced, starting from none."""
    counts = []
    jit = _backend.jit

    def counting(program, *specs):
        def traced(*arguments):
            counts.append(arguments[0].shape)
            return program(*arguments)

        return jit(traced, *specs)

    monkeypatch.setattr(_backend, "jit", counting)
    monkeypatch.setattr(fused, "FEW_LOGITS", 0)
    caches = fused.compiled_program, linear_drs.compiled_programs
    for cache in caches:
        cache.cache_clear()
    yield counts
    for cache in caches:
        cache.cache_clear()


# A5
@pytest.mark.short
@needs_xla
def test_programs_are_not_compiled_for_each_strength(traces):
    z, ids, one_hot = draw((4, 70))
    strengths = [(lam, smoothing) for lam in np.linspace(0.01, 3, 20) for smoothing in (0.0, lam / 10)]

    def calls():
        for lam, smoothing in strengths:
            got = drs_loss(ids, z, lam, from_logits=True, label_smoothing=smoothing)
            head = linear_drs_loss(ids, z, np.eye(70, dtype="float32"), lam=lam, label_smoothing=smoothing)
            yield got, head, lam, smoothing

    for got, head, lam, smoothing in calls():
        expected = reference.each(reference.drs_loss, one_hot, z, lam=lam, label_smoothing=smoothing)
        np.testing.assert_allclose(values(got), expected, rtol=1e-4)
        np.testing.assert_allclose(values(head), expected, rtol=1e-4)
    # Two traces of the fused loss, with and without a label smoothing, and one of each program of the head.
    assert len(traces) <= 4


# A5
def test_programs_are_compiled_for_few_lengths():
    shortest = {rows: padded_length(rows) for rows in range(1025)}
    lengths = set(shortest.values())
    # All up to 8, and four numbers between each power of two and the next.
    assert len(lengths) == 9 + 4 * 7
    assert {1 << k for k in range(11)} | {3 << k for k in range(9)} <= lengths
    assert all(rows <= length <= 1.25 * rows for rows, length in shortest.items())


# A5
@pytest.mark.short
@needs_xla
def test_similar_lengths_share_a_program(traces):
    for rows in (33, 36, 39, 40):
        z, ids, one_hot = draw((rows, 70))
        expected = reference.each(reference.drs_loss, one_hot, z)
        np.testing.assert_allclose(values(drs_loss(ids, z, from_logits=True)), expected, rtol=1e-4)
        head = linear_drs_loss(ids, z, np.eye(70, dtype="float32"))
        np.testing.assert_allclose(values(head), expected, rtol=1e-4)
    # All are padded to 40 rows.
    assert len(traces) <= 3


# A5
@pytest.mark.short
@needs_xla
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 100])
def test_added_rows_are_zeros(rows):
    z = np.ones((rows, 2), "float32")
    padded, ids = _backend.pad_rows(ops.convert_to_tensor(z), ops.ones((rows,), "int32"))
    assert padded.shape == (padded_length(rows), 2)
    np.testing.assert_array_equal(values(padded)[:rows], z)
    assert np.all(values(padded)[rows:] == 0)
    assert values(ids).sum() == rows


# A5
@on_tensorflow
@pytest.mark.parametrize("mode", some_short(["graph", "xla"], more=["graph"]))
def test_padded_lengths_keep_value_and_gradient(mode):
    import tensorflow as tf

    def both(y, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = drs_loss(y, z, from_logits=True)
        return value, tape.gradient(value, z)

    signature = [tf.TensorSpec((None,), "int64"), tf.TensorSpec((None, 64))]
    function = tf.function(both, signature, jit_compile=mode == "xla")
    for rows in (0, 8, 9):
        z, ids, one_hot = draw((rows, 64))
        value, slope = function(tf.constant(ids), tf.constant(z))
        np.testing.assert_allclose(value, reference.each(reference.drs_loss, one_hot, z), rtol=1e-4)
        assert slope.shape == z.shape
        if rows == 9:
            loop = reference.gradient(lambda z, y=one_hot: reference.each(reference.drs_loss, y, z), z)
            np.testing.assert_allclose(slope, loop, rtol=1e-3, atol=1e-4)


# A5
@on_tensorflow
def test_graphs_have_the_same_few_lengths():
    import tensorflow as tf

    length = tf.function(lambda z: tf.shape(_backend.pad_rows(z)[0])[0], [tf.TensorSpec((None, 1))])
    for rows in (0, 1, 7, 8, 9, 16, 17, 100, 1023, 1024, 1025, 70_000):
        z = tf.zeros((rows, 1))
        assert length(z) == _backend.pad_rows(z)[0].shape[0]


# A5
@needs_xla
def test_caches_of_programs_are_bounded():
    for cache in (fused.compiled_program, linear_drs.compiled_programs):
        assert cache.cache_info().maxsize == fused.MAX_PROGRAMS


# A13
@pytest.mark.parametrize("classes", some_short([4, 70], 70, more=[4]))
def test_a_variable_changes_a_compiled_step(classes):
    x, y = small_data()
    lam = keras.Variable(0.3, trainable=False)
    model = small_model(classes, activation=None)
    model.lam = lam
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=DRSLoss(lam, from_logits=True))
    z = model.predict(x, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for value in (0.3, 5.0):
            lam.assign(value)
            expected = reference.each(reference.drs_loss, reference.one_hot(y, classes), z, lam=value).mean()
            for got in (model.fit(x, y, verbose=0).history["loss"][0], model.evaluate(x, y, verbose=0)):
                np.testing.assert_allclose(got, expected, rtol=1e-4)


# A13
@pytest.mark.short
def test_a_callback_can_change_a_variable():
    x, y = small_data()
    lam = keras.Variable(0.0, trainable=False)
    model = small_model(activation=None)
    model.lam = lam
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=DRSLoss(lam, from_logits=True))
    z = model.predict(x, verbose=0)
    warm_up = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: lam.assign(float(epoch)))
    got = model.fit(x, y, epochs=3, callbacks=[warm_up], verbose=0).history["loss"]
    expected = [
        reference.each(reference.drs_loss, reference.one_hot(y, 4), z, lam=value).mean() for value in (0.0, 1.0, 2.0)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


# A13
@pytest.mark.parametrize("name", [name for name, case in BY_NAME.items() if {"alpha", "lam"} & case.options.keys()])
def test_every_strength_may_be_a_variable(name):
    case, (z, ids, one_hot) = BY_NAME[name], draw()
    argument = "alpha" if "alpha" in case.options else "lam"
    variable = keras.Variable(case.options[argument])
    loss = case.loss(**case.options | {argument: variable}, from_logits=True, reduction=None)
    np.testing.assert_allclose(values(loss(ids, z)), case.expected(one_hot, z), rtol=1e-5, atol=1e-6)
    config = keras.losses.serialize(loss)
    assert keras.losses.deserialize(config).get_config()[argument] == pytest.approx(case.options[argument])
    changed = case._replace(options=case.options | {argument: 0.9})
    variable.assign(0.9)
    np.testing.assert_allclose(values(loss(ids, z)), changed.expected(one_hot, z), rtol=1e-5, atol=1e-6)
    assert loss.get_config()[argument] == pytest.approx(0.9)


# A13
def test_functions_take_a_variable_as_a_constant():
    z, ids, one_hot = draw()
    lam = keras.Variable(0.5)
    expected = reference.each(reference.drs_loss, one_hot, z, lam=0.5)
    np.testing.assert_allclose(values(drs_loss(ids, z, lam, from_logits=True)), expected, rtol=1e-5)
    loop = reference.prs_loss(one_hot, z.astype("float64"), 0.5, 0, 2)
    np.testing.assert_allclose(values(prs_loss(ids, z, lam, end=2, from_logits=True)), loop, rtol=1e-5)
    if BACKEND != "torch":
        head = linear_drs_loss(ids, z, np.eye(5, dtype="float32"), lam=lam)
        np.testing.assert_allclose(values(head), expected, rtol=1e-5)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        for classes in (5, 70):
            wide, labels, _ = draw((6, classes))
            with tf.GradientTape() as tape:
                total = ops.sum(drs_loss(labels, wide, lam, from_logits=True))
            assert tape.gradient(total, lam.value) is None


# A13
@pytest.mark.short
@pytest.mark.parametrize("lam", [-1.0, np.nan, np.inf, [0.1, 0.2]])
def test_variables_must_hold_a_non_negative_number(lam):
    for make in (DRSLoss, lambda lam: drs_loss([0], [[0.5, 0.5]], lam)):
        with pytest.raises(ValueError, match="`lam` must be a non-negative number, or a variable of one"):
            make(keras.Variable(lam))


# A13
@pytest.mark.short
def test_a_number_changed_after_compilation_is_a_warning():
    x, y = small_data()
    model = small_model(activation=None)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=DRSLoss(from_logits=True))
    model.loss.lam = 0.5
    got = model.fit(x, y, verbose=0).history["loss"][0]
    z = model.predict(x, verbose=0)
    expected = lambda lam: reference.each(reference.drs_loss, reference.one_hot(y, 4), z, lam=lam).mean()
    np.testing.assert_allclose(got, expected(0.5), rtol=1e-4)
    if BACKEND == "torch":  # which runs eagerly
        return
    with pytest.warns(UserWarning, match="`lam` was changed after a program was compiled"):
        model.loss.lam = 5.0
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=model.loss)
    np.testing.assert_allclose(model.fit(x, y, verbose=0).history["loss"][0], expected(5.0), rtol=1e-4)


# A13
@pytest.mark.short
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_a_number_that_is_read_again_is_no_warning(activation):
    x, y = small_data()
    model = small_model(activation=activation)
    options = {} if BACKEND == "torch" else {"run_eagerly": True}
    loss = DRSLoss(from_logits=activation is None)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss, **options)
    model.fit(x, y, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss.lam = 5.0
    z = model.predict(x, verbose=0)
    z = z if activation is None else np.log(z)
    expected = reference.each(reference.drs_loss, reference.one_hot(y, 4), z, lam=5.0).mean()
    np.testing.assert_allclose(model.fit(x, y, verbose=0).history["loss"][0], expected, rtol=1e-4)


# A13
@pytest.mark.short
@on_jax
def test_a_variable_that_no_model_tracks_is_a_warning_on_jax():
    x, y = small_data()
    model = small_model(activation=None)
    model.compile(loss=DRSLoss(keras.Variable(0.3), from_logits=True))
    with pytest.warns(UserWarning, match="is compiled into this program as a constant"):
        model.fit(x, y, verbose=0)


@pytest.mark.more
@on_tensorflow
def test_clear_session_frees_the_models():
    import tensorflow as tf

    def alive():
        keras.utils.clear_session()
        gc.collect()
        return sum(isinstance(x, (tf.Variable, keras.Model)) for x in gc.get_objects())

    def train():
        x, y = small_data()
        model = small_model(70, activation=None)
        model.compile(loss=DRSLoss(from_logits=True), metrics=[keras_drsl.SoftmaxDiversity(from_logits=True)])
        model.fit(x, y, verbose=0)

    train()
    before = alive()
    train()
    assert alive() <= before
    z, ids, _ = draw((4, 70))
    assert np.all(np.isfinite(gradient(lambda z: DRSLoss(from_logits=True)(ids, z), z)))
