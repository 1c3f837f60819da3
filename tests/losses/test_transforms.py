"""Test losses and metric under what backends do with functions: transformations, export, checks of numerics."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import DRSLoss, SoftmaxDiversity, drs_loss, linear_drs_loss, prs_loss, softmax_diversity
from keras_drsl.losses import fused, linear_drs
from tests import reference
from tests.backends import BACKEND, gradient, needs_xla, on_jax, on_tensorflow, values
from tests.helpers import run_python, some_short
from tests.losses.cases import draw, draw_soft, softmax
from tests.losses.family import BY_NAME, each_loss

on_torch = pytest.mark.skipif(BACKEND != "torch", reason="is about PyTorch")
each_size = pytest.mark.parametrize("classes", [10, 64])


def case_of(name):
    """Return a loss without reduction, and its formula."""
    return BY_NAME[name].make(from_logits=True, reduction=None), BY_NAME[name].expected


# A2
@pytest.mark.short
@on_torch
@each_loss
def test_torch_func_computes_gradients_and_rows(name):
    import torch

    loss, expected = case_of(name)
    z, ids, one_hot = draw((6, 5))
    x, w = torch.tensor(z), torch.eye(5)
    for y in (torch.tensor(ids), torch.tensor(one_hot)):
        total = lambda w, y=y: loss(y, x @ w).sum()
        slope = gradient(lambda w, y=y: loss(y, x @ w), np.eye(5, dtype="float32"))
        np.testing.assert_allclose(values(torch.func.grad(total)(w)), slope, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values(torch.func.jacrev(total)(w)), slope, rtol=1e-4, atol=1e-5)
        if name == "PRSLoss":  # where a row depends on the others
            continue
        rows = torch.func.vmap(lambda y, z: loss(y[None], z[None])[0])(y, x)
        np.testing.assert_allclose(values(rows), expected(one_hot, z), rtol=1e-5)


# A2
@pytest.mark.short
@on_torch
@each_loss
def test_torch_func_linearizes_losses(name):
    import torch

    (loss, expected), (z, ids, one_hot) = case_of(name), draw()
    logits, step = torch.tensor(z), torch.ones(6, 5) * torch.arange(5)
    got, product = torch.func.linearize(lambda z: loss(torch.tensor(ids), z), logits)
    np.testing.assert_allclose(values(got), expected(one_hot, z), rtol=1e-5)
    slope = gradient(lambda z: loss(torch.tensor(ids), z), z)
    np.testing.assert_allclose(values(product(step)).sum(), np.sum(slope * values(step)), rtol=1e-4)


# A2
@pytest.mark.short
@on_torch
def test_torch_func_sees_wrong_labels_as_nan():
    import torch

    z, ids, _ = draw()
    ids[3] = -1
    rows = torch.func.vmap(lambda y, z: drs_loss(y[None], z[None], from_logits=True)[0])(
        torch.tensor(ids), torch.tensor(z)
    )
    assert np.array_equal(np.isnan(values(rows)), np.arange(6) == 3)


# A2
@pytest.mark.short
@on_torch
def test_torch_fake_and_meta_tensors_have_a_shape():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    z, ids, _ = draw()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.tensor(z))
        assert drs_loss(mode.from_tensor(torch.tensor(ids)), fake, from_logits=True).shape == (6,)
        assert softmax_diversity(mode.from_tensor(torch.tensor(ids)), fake, from_logits=True).shape == (6,)
    with keras.device("meta"):
        assert drs_loss(ids, z, from_logits=True).shape == (6,)


class Loss:
    """Make a module of PyTorch of a loss, as `torch.export` takes modules only."""

    def __new__(cls, loss):
        import torch

        class Module(torch.nn.Module):
            def forward(self, y, z):
                return loss(y, z)

        return Module()


# A2
@pytest.mark.short
@on_torch
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_and_compile_keep_the_value(strict):
    import torch

    z, ids, one_hot = draw()
    expected = reference.each(reference.drs_loss, one_hot, z)
    function = lambda y, z: drs_loss(y, z, from_logits=True)
    tensors = torch.tensor(ids), torch.tensor(z)
    program = torch.export.export(Loss(function), tensors, strict=strict).module()
    np.testing.assert_allclose(values(program(*tensors)), expected, rtol=1e-5)
    np.testing.assert_allclose(values(torch.compile(function, backend="eager")(*tensors)), expected, rtol=1e-5)


# A2
@pytest.mark.short
@on_torch
def test_torch_compile_keeps_the_mask():
    import torch

    z, ids, one_hot = draw((4, 6, 5))
    loss = DRSLoss(from_logits=True)

    def masked(y, z):
        z = z + 0
        z._keras_mask = torch.arange(6).expand(4, 6) < 4
        return loss(y, z)

    expected = reference.each(reference.drs_loss, one_hot, z)[:, :4].mean()
    for function in (masked, torch.compile(masked, backend="eager")):
        np.testing.assert_allclose(values(function(torch.tensor(ids), torch.tensor(z))), expected, rtol=1e-5)


# A2
@pytest.mark.short
@on_jax
@pytest.mark.parametrize("classes", [5, 70])
def test_jax_vmap_and_eval_shape_take_losses(classes):
    import jax

    z, ids, one_hot = draw((6, classes))
    loss = lambda y, z: drs_loss(y, z, from_logits=True)
    rows = jax.vmap(lambda y, z: loss(y[None], z[None])[0])(ids, z)
    np.testing.assert_allclose(rows, reference.each(reference.drs_loss, one_hot, z), rtol=1e-4)
    assert jax.eval_shape(loss, ids, z).shape == (6,)
    hessian = jax.hessian(lambda z: ops.sum(loss(ids[:1], z[None])))(z[0])
    step = 1e-3 * np.eye(classes)[1]
    slope = lambda z: reference.gradient(lambda z: reference.each(reference.drs_loss, one_hot[:1], z), z, 1e-4)
    expected = (slope(z[:1] + step) - slope(z[:1] - step))[0] / 2e-3
    np.testing.assert_allclose(hessian[1], expected, rtol=1e-3, atol=1e-4)


# A2
@on_tensorflow
def test_tensorflow_vectorized_map_and_datasets_take_losses():
    import tensorflow as tf

    z, ids, one_hot = draw()
    expected = reference.each(reference.drs_loss, one_hot, z)
    row = lambda pair: drs_loss(pair[0][None], pair[1][None], from_logits=True)[0]
    np.testing.assert_allclose(tf.vectorized_map(row, (tf.constant(ids), tf.constant(z))), expected, rtol=1e-5)
    data = tf.data.Dataset.from_tensor_slices((ids, z)).batch(2).map(lambda y, z: drs_loss(y, z, from_logits=True))
    np.testing.assert_allclose(np.concatenate(list(data.as_numpy_iterator())), expected, rtol=1e-5)


@pytest.fixture
def checked_numerics():
    """Let the backend stop at the first value that is not finite."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        caches = fused.compiled_program, linear_drs.compiled_programs
        for cache in caches:
            cache.cache_clear()
        tf.debugging.enable_check_numerics()
        yield
        tf.debugging.disable_check_numerics()
        for cache in caches:
            cache.cache_clear()
    elif BACKEND == "jax":
        import jax

        with jax.debug_nans(True), jax.debug_infs(True):
            yield
    else:
        import torch

        with torch.autograd.detect_anomaly(check_nan=True):
            yield


# A3
@pytest.mark.parametrize("name", [pytest.param("DRSLoss", marks=pytest.mark.short), *list(BY_NAME)[1:]])
def test_healthy_losses_pass_checks_of_numerics(name, checked_numerics):
    z, ids, _ = draw((6, 5))
    z[0] = 1.0  # equal classes
    case = BY_NAME[name]
    for y in (ids, draw_soft().astype("float32")):
        assert np.all(np.isfinite(gradient(lambda z, y=y: case.make(from_logits=True)(y, z), z)))
    assert np.all(np.isfinite(gradient(lambda z: case.make(from_logits=True, ignore_class=1)(ids, z), z)))
    if not case.loss.needs_logits:
        assert np.all(np.isfinite(gradient(lambda p: case.make()(ids, p), softmax(z))))


# A3
@pytest.mark.parametrize("measure", ["variance", "std", pytest.param("entropy", marks=pytest.mark.short)])
def test_healthy_metrics_pass_checks_of_numerics(measure, checked_numerics):
    z, ids, _ = draw((6, 5))
    z[0] = 1.0  # equal classes, where the square root has no derivative
    diversity = lambda z: softmax_diversity(ids, z, measure=measure, from_logits=True)
    assert np.all(np.isfinite(gradient(diversity, z)))
    metric = SoftmaxDiversity(measure=measure, from_logits=True)
    metric.update_state(ids, z)
    assert np.isfinite(values(metric.result()))


# A3
@pytest.mark.short
def test_healthy_programs_pass_checks_of_numerics(checked_numerics):
    wide, ids, _ = draw((6, 70))
    assert np.all(np.isfinite(gradient(lambda z: DRSLoss(from_logits=True)(ids, z), wide)))
    if BACKEND != "torch":
        head = lambda x: linear_drs_loss(ids, x, np.eye(70, dtype="float32"), chunk_size=16)
        assert np.all(np.isfinite(gradient(head, wide)))
    for classes in (4, 70):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(classes)])
        model.compile(loss=DRSLoss(from_logits=True), metrics=[SoftmaxDiversity(from_logits=True)])
        history = model.fit(wide[:, :3], ids % 4, batch_size=4, verbose=0).history
        assert np.isfinite(history["loss"])


@on_jax
@each_size
@pytest.mark.parametrize("sparse", some_short([True, False], False))
def test_jax_may_refuse_promotions_of_rank_and_dtype(classes, sparse):
    import jax

    z, ids, one_hot = draw((2, 3, classes))
    y = jax.numpy.array(ids if sparse else one_hot)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for case in BY_NAME.values():
            loss = case.make(from_logits=True, ignore_class=1)
            assert np.all(np.isfinite(jax.grad(lambda z, loss=loss: loss(y, z))(z)))
        for measure in ("variance", "std", "entropy"):
            SoftmaxDiversity(measure=measure, from_logits=True).update_state(y, z)
        if sparse:
            head = lambda z: ops.sum(linear_drs_loss(y, z, np.eye(classes, dtype="float32"), chunk_size=4))
            assert np.all(np.isfinite(jax.grad(head)(z)))


SYMBOLIC = {
    "drs_loss": lambda y, z: drs_loss(y, z, from_logits=True),
    "prs_loss": lambda y, z: prs_loss(y, z, from_logits=True),
    "softmax_diversity": lambda y, z: softmax_diversity(y, z, from_logits=True),
    "linear_drs_loss": lambda y, z: linear_drs_loss(y, z, np.eye(z.shape[-1], dtype="float32")),
} | {name: case.make(from_logits=True, reduction="sum") for name, case in BY_NAME.items()}
each_function = pytest.mark.parametrize("name", some_short(SYMBOLIC, *[*SYMBOLIC][:4], more=BY_NAME))


# A6
@on_jax
@each_size
@each_function
def test_jax_exports_a_symbolic_batch(name, classes):
    import jax

    (rows,) = jax.export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((rows,), "int32"), jax.ShapeDtypeStruct((rows, classes), "float32")
    exported = jax.export.export(jax.jit(SYMBOLIC[name]))(*shapes)
    for count in (3, 8):
        z, ids, _ = draw((count, classes))
        expected = SYMBOLIC[name](ids, z)
        np.testing.assert_allclose(exported.call(ids.astype("int32"), z), expected, rtol=1e-4, atol=1e-5)


# A6
@each_size
@each_function
def test_functional_models_take_losses(name, classes):
    if BACKEND == "torch" and name == "linear_drs_loss":
        pytest.skip("needs XLA")
    y, z = keras.Input((), dtype="int32"), keras.Input((classes,))
    model = keras.Model([y, z], SYMBOLIC[name](y, z))
    logits, ids, _ = draw((4, classes))
    expected = SYMBOLIC[name](ids, logits)
    got = model([ops.convert_to_tensor(ids.astype("int32")), ops.convert_to_tensor(logits)])
    np.testing.assert_allclose(values(got), values(expected), rtol=1e-4, atol=1e-5)


# A6
@each_size
@pytest.mark.parametrize(
    "name",
    some_short(
        ["DRSLoss", "drs_loss", "PRSLoss", "ZLoss", "linear_drs_loss"],
        *("DRSLoss", "linear_drs_loss"),
        more=["drs_loss", "PRSLoss", "ZLoss"],
    ),
)
def test_a_layer_adds_a_loss(name, classes):
    if BACKEND == "torch" and name == "linear_drs_loss":
        pytest.skip("needs XLA")

    class WithLoss(keras.layers.Layer):
        def call(self, y, z):
            self.add_loss(ops.mean(SYMBOLIC[name](y, z)))
            return z

    y, z = keras.Input((), dtype="int32"), keras.Input((classes,))
    model = keras.Model([y, z], keras.layers.Dense(2)(WithLoss()(y, z)))
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0))
    logits, ids, _ = draw((8, classes))
    zeros = np.zeros((8, 2), "float32")
    got = model.fit([ids.astype("int32"), logits], zeros, batch_size=8, verbose=0).history["loss"][0]
    mse = np.mean(model.predict([ids.astype("int32"), logits], verbose=0) ** 2)
    np.testing.assert_allclose(got - mse, np.mean(values(SYMBOLIC[name](ids, logits))), rtol=1e-3)


# A6
@needs_xla
def test_functional_model_with_a_head_has_gradients():
    y, x = keras.Input((), dtype="int32"), keras.Input((5,))
    outputs = keras.layers.Lambda(lambda inputs: linear_drs_loss(*inputs, np.eye(5, dtype="float32")))([y, x])
    z, ids, one_hot = draw()
    got = keras.Model([y, x], outputs)([ids, z])
    np.testing.assert_allclose(values(got), reference.each(reference.drs_loss, one_hot, z), rtol=1e-5)


# A8
@pytest.mark.more
def test_models_with_the_functions_load_in_a_fresh_process(tmp_path):
    x, y = np.ones((4, 3), "float32"), np.arange(4) % 3
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(loss=drs_loss, metrics=[softmax_diversity])
    expected = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    run_python(
        """
        import sys
        import keras, numpy as np, keras_drsl
        model = keras.models.load_model(sys.argv[1])
        got = model.evaluate(np.ones((4, 3), "float32"), np.arange(4) % 3, verbose=0)
        np.testing.assert_allclose(got, [float(value) for value in sys.argv[2:]], rtol=1e-5)
        assert keras.saving.get_registered_object("keras_drsl>prs_loss") is keras_drsl.prs_loss
        """,
        tmp_path / "model.keras",
        *expected,
    )
