import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import DRSLoss, drs_loss, one_pass
from tests import reference
from tests.backends import BACKEND, compiled, gradient, on_tensorflow, values

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="torch computes the formula")


def draw(shape=(7, 6), scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, shape).astype("float32"), rng.integers(0, shape[-1], shape[:-1]).astype("int32")


@pytest.fixture(params=[None, 3], ids=["one block", "blocks of a few rows"])
def small_blocks(request, monkeypatch):
    """The same with blocks small enough that there are several, the last one overlapping."""
    one_pass._programs.cache_clear()
    if request.param:
        monkeypatch.setattr(one_pass, "LOGITS_PER_CORE", 6)
        monkeypatch.setattr(one_pass._backend, "cpu_cores", lambda: request.param)
    yield
    one_pass._programs.cache_clear()


def loss(ids, z, scale=None, lam=0.3, spread="sum_of_squares", label_smoothing=0.0):
    scale = np.ones(ids.shape, "float32") if scale is None else scale
    return one_pass.drs_loss(
        ops.convert_to_tensor(ids),
        ops.convert_to_tensor(z),
        ops.convert_to_tensor(scale),
        lam=lam,
        spread=spread,
        label_smoothing=label_smoothing,
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sum_of_squares", "variance"])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 5), (1, 4)])
def test_value_and_gradient_are_those_of_the_formula(small_blocks, shape, kind, label_smoothing):
    z, ids = draw(shape)
    y = reference.one_hot(ids, shape[-1])
    loop = lambda z: reference.each(reference.drs_loss, y, z, kind=kind, label_smoothing=label_smoothing)
    one = lambda z: loss(ids, z, spread=kind, label_smoothing=label_smoothing)
    np.testing.assert_allclose(values(one(z)), loop(z), rtol=1e-5)
    np.testing.assert_allclose(gradient(one, z), reference.gradient(loop, z), rtol=1e-4, atol=1e-5)


def test_scale_multiplies_rows_and_zero_hides_whatever_they_hold(small_blocks):
    z, ids = draw()
    z[2], z[5] = np.nan, np.inf
    scale = np.array([1, 2, 0, np.nan, 1, 0, -1], "float32")
    kept = [0, 1, 4, 6]
    expected = reference.each(reference.drs_loss, reference.one_hot(ids[kept], 6), z[kept]) * scale[kept]
    got, slope = values(loss(ids, z, scale)), gradient(lambda z: loss(ids, z, scale), z)
    np.testing.assert_allclose(got[kept], expected, rtol=1e-5)
    assert got[2] == got[5] == 0
    assert np.all(slope[[2, 5]] == 0)
    assert np.isnan(got[3])
    assert np.all(np.isnan(slope[3]))
    assert np.all(np.isfinite(slope[kept]))


def test_a_small_spread_is_not_lost_beside_a_true_class_far_away(small_blocks):
    z, ids = draw(scale=0.01)
    z[np.arange(7), ids] += 100
    expected = reference.each(reference.spread, reference.one_hot(ids, 6), z)
    # The cross-entropy is exp(-100).
    np.testing.assert_allclose(values(loss(ids, z, lam=1.0)), expected, rtol=2e-3)


def test_an_upstream_gradient_scales_each_row(small_blocks):
    z, ids = draw()
    weights = np.arange(7, dtype="float32")
    expected = gradient(lambda z: loss(ids, z), z) * weights[:, None]
    np.testing.assert_allclose(gradient(lambda z: loss(ids, z) * weights, z), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sum_of_squares", "variance"])
def test_it_can_be_differentiated_twice(small_blocks, kind):
    z, ids = draw()
    vector = np.random.default_rng(1).normal(size=z.shape).astype("float32")
    weights = np.linspace(0.5, 2, 7).astype("float32")
    y = reference.one_hot(ids, 6)
    slope = lambda z: reference.gradient(
        lambda z: weights * reference.each(reference.drs_loss, y, z, kind=kind), z, step=1e-4
    )
    expected = (slope(z + 1e-3 * vector) - slope(z - 1e-3 * vector)) / 2e-3
    one = lambda z: ops.sum(loss(ids, z, spread=kind) * weights)
    if BACKEND == "jax":
        import jax

        got = jax.grad(lambda z: ops.sum(jax.grad(one)(z) * vector))(ops.convert_to_tensor(z))
    else:
        import tensorflow as tf

        z_tensor = tf.constant(z)
        with tf.GradientTape() as outer:
            outer.watch(z_tensor)
            with tf.GradientTape() as inner:
                inner.watch(z_tensor)
                total = one(z_tensor)
            product = tf.reduce_sum(inner.gradient(total, z_tensor) * vector)
        got = outer.gradient(product, z_tensor)
    np.testing.assert_allclose(values(got), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("classes", [1_000, 32_000, 262_144])
def test_level_rivals_far_below_the_true_class_are_not_pulled_together(classes):
    z = np.full((2, classes), -0.7, "float32")
    z[:, 5] = 19.6
    ids = np.array([5, 5], "int32")
    exact = classes * np.exp(-20.3)  # the cross-entropy, and what it pulls the rivals by together
    np.testing.assert_allclose(values(loss(ids, z)), exact, rtol=0.1, atol=1e-5)
    pull = np.delete(gradient(lambda z: loss(ids, z), z)[0].astype("float64"), 5)
    np.testing.assert_allclose(pull.sum(), exact, rtol=0.1, atol=1e-4)


def test_no_positions_have_no_values():
    z = np.zeros((0, 70), "float32")
    program = compiled(
        lambda z: one_pass.drs_loss(
            ops.zeros((0,), "int32"), z, ops.ones((0,)), lam=0.3, spread="variance", label_smoothing=0.0
        )
    )
    assert values(program(ops.convert_to_tensor(z))).shape == (0,)
    assert gradient(lambda z: loss(np.zeros(0, "int32"), z), z).shape == (0, 70)


def nested_gradients(function, z, vector):
    """The first, second and third derivative of a function along a vector, the last as a gradient."""
    if BACKEND == "jax":
        import jax

        first = lambda z: ops.sum(jax.grad(function)(z) * vector)
        second = lambda z: ops.sum(jax.grad(first)(z) * vector)
        return first(z), second(z), jax.grad(second)(z)
    import tensorflow as tf

    z = tf.constant(z)
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as middle:
            middle.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                value = function(z)
            first = tf.reduce_sum(inner.gradient(value, z) * vector)
        second = tf.reduce_sum(middle.gradient(first, z) * vector)
    return first, second, outer.gradient(second, z)


def test_a_third_derivative_is_that_of_the_formula(monkeypatch):
    z, ids = draw((2, 64), scale=1.0)
    vector = np.random.default_rng(1).normal(size=z.shape).astype("float32")
    function = lambda z: ops.sum(ops.exp(0.3 * drs_loss(ids, z, 0.01, from_logits=True)))
    one = nested_gradients(function, z, vector)
    monkeypatch.setattr(one_pass, "helps", lambda classes: False)
    for got, expected in zip(one, nested_gradients(function, z, vector), strict=True):
        np.testing.assert_allclose(values(got), values(expected), rtol=1e-3, atol=1e-4)


def test_a_second_derivative_is_zero_where_what_stands_there_does_not_count():
    z, ids = draw()
    z[2] = np.nan
    scale = np.array([1, 1, 0, 1, 1, 1, 1], "float32")
    _, _, third = nested_gradients(lambda z: ops.sum(loss(ids, z, scale)), z, np.ones_like(z))
    assert np.all(values(third)[2] == 0)
    assert np.all(np.isfinite(values(third)))


@pytest.mark.skipif(BACKEND != "jax", reason="is about JAX's forward mode")
def test_it_can_be_differentiated_forwards():
    import jax

    z, ids = draw()
    vector = np.random.default_rng(1).normal(size=z.shape).astype("float32")
    _, along = jax.jvp(lambda z: ops.sum(loss(ids, z)), (z,), (vector,))
    np.testing.assert_allclose(along, np.sum(gradient(lambda z: loss(ids, z), z) * vector), rtol=1e-4)


def test_drs_loss_takes_it_for_class_ids_and_logits_of_many_classes_and_the_formula_otherwise(monkeypatch):
    calls = []
    real = one_pass.drs_loss
    monkeypatch.setattr(one_pass, "drs_loss", lambda *args, **options: calls.append(1) or real(*args, **options))
    z, ids = draw((7, one_pass.MIN_CLASSES))
    y = reference.one_hot(ids, one_pass.MIN_CLASSES)
    got = drs_loss(ids, z, from_logits=True)
    assert len(calls) == 1
    np.testing.assert_allclose(values(got), reference.each(reference.drs_loss, y, z), rtol=1e-5)
    drs_loss(ids, z, 0, from_logits=True)
    drs_loss(ids, z, from_logits=True, space="softmax")
    drs_loss(y, z, from_logits=True)
    drs_loss(ids, np.exp(z) / np.exp(z).sum(1, keepdims=True))
    drs_loss(ids % 63, z[:, :-1], from_logits=True)
    assert len(calls) == 1


@pytest.mark.parametrize("ignore_class", [None, 3])
def test_masks_ignored_classes_and_bad_labels_are_those_of_the_formula(monkeypatch, ignore_class):
    z, ids = draw((4, 6, 64))
    z[:, 4:] = 0.0
    ids[:, 4:] = 99
    ids[0, 0] = 3
    kept = np.broadcast_to(np.arange(6) < 4, (4, 6)) & (ids != ignore_class)
    expected = reference.each(reference.drs_loss, reference.one_hot(ids[kept], 64), z[kept]).mean()
    masked = keras.layers.Masking()(z)
    fit = DRSLoss(from_logits=True, ignore_class=ignore_class)
    np.testing.assert_allclose(values(fit(ids, masked)), expected, rtol=1e-5)
    program = compiled(lambda ids, z: drs_loss(ids, z, from_logits=True))
    got = values(program(ops.convert_to_tensor(ids), ops.convert_to_tensor(z)))
    assert np.array_equal(np.isnan(got), ids == 99)


@on_tensorflow
def test_on_tensorflow_the_loss_is_compiled_by_xla_without_being_asked_to():
    import tensorflow as tf

    @tf.function
    def both(ids, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = DRSLoss(from_logits=True)(ids, z)
        return value, tape.gradient(value, z)

    graph = both.get_concrete_function(tf.TensorSpec((None,), "int32"), tf.TensorSpec((None, 1000))).graph
    compiled = [op for op in graph.get_operations() if op.type.endswith("PartitionedCall")]
    assert any(
        graph._get_function(op.get_attr("f").name).cached_definition.attr["_XlaMustCompile"].b for op in compiled
    )


@pytest.mark.parametrize("cores", [2, 64])
@pytest.mark.parametrize("batch", [512, 509])
def test_the_compiled_program_keeps_no_second_array_of_the_size_of_the_logits(batch, cores, monkeypatch):
    monkeypatch.setattr(one_pass._backend, "cpu_cores", lambda: cores)
    one_pass._programs.cache_clear()
    classes = 32_000
    program, _ = one_pass._programs(0.0, classes, "float32")
    if BACKEND == "jax":
        import jax

        shapes = [jax.ShapeDtypeStruct((batch, classes), "float32")]
        shapes += [jax.ShapeDtypeStruct((batch,), dtype) for dtype in ("int32", "float32")]
        shapes += [jax.ShapeDtypeStruct((), "float32")]
        temporary = jax.jit(program).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    else:
        import tensorflow as tf

        if tuple(map(int, tf.__version__.split(".")[:2])) < (2, 21):
            pytest.skip("older versions of XLA copy the gradient's buffer once more")
        z, ids, scale = np.zeros((batch, classes), "float32"), np.zeros(batch, "int32"), np.ones(batch, "float32")
        inputs = [ops.convert_to_tensor(x) for x in (z, ids, scale, np.float32(0.3))]
        temporary = peak_of_temporaries(program.experimental_get_compiler_ir(*inputs)(stage="optimized_hlo"))
    one_pass._programs.cache_clear()
    assert temporary <= 0.02 * batch * classes * 4


def peak_of_temporaries(hlo):
    """The memory an optimised, scheduled program keeps beside its inputs and outputs at its worst, from its text.

    Results of instructions outside of fusions live from where they are made to where they are last used, less those
    that only name, pass on or update in place what is there already, and less the empty outputs.
    """
    size = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "s64": 8}
    no_memory = ("parameter", "get-tuple-element", "tuple", "while", "constant", "dynamic-update-slice", "broadcast")
    computations = re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    roots = {
        name: re.search(r"ROOT [^\n]* = (?:\([^\n]*?\)|\S+) ([\w-]+)\(", body).group(1) for name, body in computations
    }
    assert "dynamic-update-slice" in roots.values()
    peak_of_all = 0
    for name, body in computations:
        if "fused" in name:
            continue
        lines = body.splitlines()
        alive, peak = {}, 0
        for number, line in enumerate(lines):
            made = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line)
            if made:
                result, kind, shape, operation = made.groups()
                called = re.search(r"calls=%?([\w.-]+)", line)
                if operation not in no_memory and not (called and roots.get(called.group(1)) in no_memory):
                    uses = [i for i, other in enumerate(lines) if re.search(rf"%{re.escape(result)}\b(?![.-])", other)]
                    alive[result] = size[kind] * int(np.prod([int(n) for n in shape.split(",") if n])), max(uses)
            peak = max(peak, sum(amount for amount, _ in alive.values()))
            alive = {result: (amount, last) for result, (amount, last) in alive.items() if last > number}
        peak_of_all += peak
    return peak_of_all


def test_mixed_precision_logits_are_taken():
    z, ids = draw()
    half = ops.cast(z, "float16")
    expected = reference.each(reference.drs_loss, reference.one_hot(ids, 6), values(half))
    np.testing.assert_allclose(values(drs_loss(ids, half, from_logits=True)), expected, rtol=1e-5)
    assert keras.backend.standardize_dtype(drs_loss(ids, half, from_logits=True).dtype) == "float32"
