import itertools
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import DRSLoss, drs_loss
from keras_drsl.losses import fused
from keras_drsl.losses.fused import BlockPlan, fused_drs_loss
from keras_drsl.predictions import read_inputs
from tests import reference
from tests.backends import BACKEND, compiled, gradient, needs_xla, on_jax, on_tensorflow, on_torch, values
from tests.helpers import few_of, some_short


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Compute few logits in one pass too."""
    monkeypatch.setattr(fused, "FEW_LOGITS", 0)


def draw(shape=(7, 6), scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, shape).astype("float32"), rng.integers(0, shape[-1], shape[:-1]).astype("int32")


# One block of all rows, or blocks of a few rows; the last of these overlaps the one before.
each_plan = pytest.mark.parametrize(
    "plan", [None, BlockPlan(cores=3, logits_per_core=6)], ids=["one block", "blocks of a few rows"]
)


def loss(labels, z, scale=None, lam=0.3, spread="sum_of_squares", label_smoothing=0.0, plan=None):
    scale = np.ones(z.shape[:-1], "float32") if scale is None else scale
    tensors = map(ops.convert_to_tensor, (labels, z, scale))
    return fused_drs_loss(*tensors, lam=lam, spread=spread, label_smoothing=label_smoothing, plan=plan)


def draw_labels(shape, form):
    """Return labels of a form, and the same as a distribution."""
    _, ids = draw(shape)
    y = reference.one_hot(ids, shape[-1])
    if form == "ids":
        return ids, y
    if form == "soft":
        y = np.random.default_rng(1).dirichlet(np.ones(shape[-1]), shape[:-1])
    return y.astype("float32"), y


FORMS = ["ids", "one-hot", "soft"]
each_form = pytest.mark.parametrize("form", FORMS)


SHORT_CASES = [
    ((7, 6), "sum_of_squares", 0.1),
    ((5, 67), "variance", 0.0),
    ((5, 67), "sum_of_squares", 0.1),
    ((2, 3, 5), "variance", 0.1),
]


@each_plan
@each_form
@pytest.mark.parametrize(
    ("shape", "kind", "label_smoothing"),
    [
        pytest.param(*case, marks=pytest.mark.short if case in SHORT_CASES else pytest.mark.more)
        for case in itertools.product([(7, 6), (2, 3, 5), (1, 4), (5, 67)], ["sum_of_squares", "variance"], [0.0, 0.1])
    ],
)
def test_value_and_gradient_equal_the_formula(plan, shape, kind, label_smoothing, form):
    z, _ = draw(shape)
    labels, y = draw_labels(shape, form)
    loop = lambda z: reference.each(reference.drs_loss, y, z, kind=kind, label_smoothing=label_smoothing)
    function = lambda z: loss(labels, z, spread=kind, label_smoothing=label_smoothing, plan=plan)
    np.testing.assert_allclose(values(function(z)), loop(z), rtol=1e-5)
    np.testing.assert_allclose(gradient(function, z), reference.gradient(loop, z), rtol=1e-4, atol=1e-4)


PLANS = {"all cores": BlockPlan(None), "one core": BlockPlan(1), "few rows": BlockPlan(3, logits_per_core=6)}


@pytest.mark.parametrize(
    ("plan", "classes", "form"),
    few_of(
        PLANS,
        [6, 67],
        FORMS,
        keep=[
            ("all cores", 67, "ids"),
            ("all cores", 6, "soft"),
            ("one core", 6, "one-hot"),
            ("one core", 67, "soft"),
            ("few rows", 6, "ids"),
            ("few rows", 67, "one-hot"),
        ],
    ),
)
def test_eager_program_equals_the_formula(plan, classes, form):
    z, _ = draw((7, classes))
    labels, y = draw_labels((7, classes), form)
    loop = lambda z: reference.each(reference.drs_loss, y, z)
    inputs = map(ops.convert_to_tensor, (z, labels, np.ones(7, "float32"), np.float32(0.3), np.float32(0)))
    of = fused.Form("sum_of_squares", smooth=False, masked=True, sparse=form == "ids")
    got, grad = fused.value_and_gradient(of, PLANS[plan], *inputs)
    np.testing.assert_allclose(values(got), loop(z), rtol=1e-5)
    np.testing.assert_allclose(values(grad), reference.gradient(loop, z), rtol=1e-4, atol=1e-4)


@pytest.mark.short
@each_plan
@pytest.mark.parametrize("kind", ["sum_of_squares", "variance"])
def test_gradient_of_labels_equals_the_formula(plan, kind):
    z, _ = draw()
    labels, y = draw_labels(z.shape, "soft")
    loop = lambda y: reference.each(reference.drs_loss, y, z, kind=kind, label_smoothing=0.1)
    got = gradient(lambda y: loss(y, z, spread=kind, label_smoothing=0.1, plan=plan), labels)
    np.testing.assert_allclose(got, reference.gradient(loop, y), rtol=1e-4, atol=1e-4)


def product_with_gradient(function, vector, x):
    """Return the sum of a vector times the gradient of a function, which can be differentiated."""
    if BACKEND == "jax":
        import jax

        return ops.sum(jax.grad(function)(x) * vector)
    if BACKEND == "torch":
        import torch

        x = x.requires_grad_()
        return torch.sum(torch.autograd.grad(function(x), x, create_graph=True)[0] * torch.tensor(vector))
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tf.reduce_sum(tape.gradient(value, x) * vector)


@pytest.mark.short
def test_mixed_derivatives_equal_the_formula():
    z, _ = draw()
    labels, y = draw_labels(z.shape, "soft")
    vector = np.random.default_rng(2).normal(size=z.shape).astype("float32")
    # How the gradient along a direction changes with the other argument, in both orders.
    of_z = lambda z, y: np.sum(vector * reference.gradient(lambda z: reference.each(reference.drs_loss, y, z), z))
    of_y = lambda z, y: np.sum(vector * reference.gradient(lambda y: reference.each(reference.drs_loss, y, z), y))
    z_tensor, y_tensor = map(ops.convert_to_tensor, (z, labels))
    total = lambda z, y: ops.sum(loss(y, z))
    by_y = gradient(lambda y: product_with_gradient(lambda z: total(z, y), vector, z_tensor), labels)
    by_z = gradient(lambda z: product_with_gradient(lambda y: total(z, y), vector, y_tensor), z)
    expected = reference.gradient(lambda y: of_z(z, y), y, step=1e-3)
    np.testing.assert_allclose(by_y, expected, rtol=1e-3, atol=1e-3)
    expected = reference.gradient(lambda z: of_y(z, y), z, step=1e-3)
    np.testing.assert_allclose(by_z, expected, rtol=1e-3, atol=1e-3)


@needs_xla  # PyTorch knows the values, and `read_inputs` raises an error
@pytest.mark.short
@each_plan
def test_wrong_distributions_are_nan_unless_masked(plan):
    z, _ = draw()
    labels, y = draw_labels(z.shape, "soft")
    labels[1] *= 1.1
    labels[2] = [-0.2, 1.2, 0, 0, 0, 0]
    labels[4:6] = 0
    z[4] = np.nan
    scale = np.array([1, 1, 1, 1, 0, 1, 1], "float32")
    got = values(loss(labels, z, scale, plan=plan))
    np.testing.assert_array_equal(np.isnan(got), [False, True, True, False, False, True, False])
    assert got[4] == 0
    kept = [0, 3, 6]
    np.testing.assert_allclose(got[kept], reference.each(reference.drs_loss, y[kept], z[kept]), rtol=1e-5)
    grad = gradient(lambda z: loss(labels, z, scale, plan=plan), z)
    np.testing.assert_array_equal(np.isnan(grad).all(axis=1), np.isnan(got))


def test_a_subclass_with_another_formula_keeps_it():
    class Twice(DRSLoss):
        def values(self, inputs):
            return 2 * super().values(inputs)

    z, ids = draw()
    expected = 2 * reference.each(reference.drs_loss, reference.one_hot(ids, 6), z)
    np.testing.assert_allclose(values(Twice(from_logits=True, reduction=None)(ids, z)), expected, rtol=1e-5)


def test_few_logits_are_computed_as_the_formula_is_written(monkeypatch):
    monkeypatch.undo()
    few, many = (
        read_inputs(ids, z, from_logits=True, ignore_class=None, axis=-1)
        for z, ids in map(draw, [(128, 10), (128, 100)])
    )
    assert not fused.should_fuse(few, "log_softmax")
    assert fused.should_fuse(many, "log_softmax")


@each_plan
def test_scale_multiplies_rows_and_0_masks_them(plan):
    z, ids = draw()
    z[2], z[5] = np.nan, np.inf
    scale = np.array([1, 2, 0, np.nan, 1, 0, -1], "float32")
    kept = [0, 1, 4, 6]
    expected = reference.each(reference.drs_loss, reference.one_hot(ids[kept], 6), z[kept]) * scale[kept]
    got = values(loss(ids, z, scale, plan=plan))
    grad = gradient(lambda z: loss(ids, z, scale, plan=plan), z)
    np.testing.assert_allclose(got[kept], expected, rtol=1e-5)
    assert got[2] == got[5] == 0
    assert np.all(grad[[2, 5]] == 0)
    assert np.isnan(got[3])
    assert np.all(np.isnan(grad[3]))
    assert np.all(np.isfinite(grad[kept]))


@each_plan
def test_small_spread_is_exact_for_a_large_true_logit(plan):
    z, ids = draw(scale=0.01)
    z[np.arange(7), ids] += 100
    expected = reference.each(reference.spread, reference.one_hot(ids, 6), z)
    # The cross-entropy is exp(-100).
    np.testing.assert_allclose(values(loss(ids, z, lam=1.0, plan=plan)), expected, rtol=2e-3)


@each_plan
def test_upstream_gradient_scales_each_row(plan):
    z, ids = draw()
    weights = np.arange(7, dtype="float32")
    expected = gradient(lambda z: loss(ids, z, plan=plan), z) * weights[:, None]
    weighted = lambda z: loss(ids, z, plan=plan) * ops.convert_to_tensor(weights)
    np.testing.assert_allclose(gradient(weighted, z), expected, rtol=1e-6)


@each_plan
@pytest.mark.parametrize("kind", ["sum_of_squares", "variance"])
def test_second_derivative_equals_the_formula(plan, kind):
    z, ids = draw()
    vector = np.random.default_rng(1).normal(size=z.shape).astype("float32")
    weights = np.linspace(0.5, 2, 7).astype("float32")
    y = reference.one_hot(ids, 6)
    grad = lambda z: reference.gradient(
        lambda z: weights * reference.each(reference.drs_loss, y, z, kind=kind), z, step=1e-4
    )
    expected = (grad(z + 1e-3 * vector) - grad(z - 1e-3 * vector)) / 2e-3
    total = lambda z: ops.sum(loss(ids, z, spread=kind, plan=plan) * ops.convert_to_tensor(weights))
    got = gradient(lambda z: product_with_gradient(total, vector, z), z)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("classes", [1_000, 32_000, 262_144])
def test_equal_logits_far_below_the_true_one_are_exact(classes):
    z = np.full((2, classes), -0.7, "float32")
    z[:, 5] = 19.6
    ids = np.array([5, 5], "int32")
    exact = classes * np.exp(-20.3)  # the cross-entropy, and the sum of its gradient over the non-true logits
    np.testing.assert_allclose(values(loss(ids, z)), exact, rtol=0.1, atol=1e-5)
    grad = np.delete(gradient(lambda z: loss(ids, z), z)[0].astype("float64"), 5)
    np.testing.assert_allclose(grad.sum(), exact, rtol=0.1, atol=1e-4)


def test_takes_an_empty_batch():
    z = np.zeros((0, 70), "float32")
    ids = np.zeros(0, "int32")
    assert gradient(lambda z: loss(ids, z), z).shape == (0, 70)
    program = compiled(lambda z: loss(ids, z, spread="variance"))
    assert values(program(ops.convert_to_tensor(z))).shape == (0,)


def nested_gradients(function, z, vector):
    """Compute the first, second and third derivative of a function along a vector, the last as a gradient."""
    if BACKEND == "jax":
        import jax

        first = lambda z: ops.sum(jax.grad(function)(z) * vector)
        second = lambda z: ops.sum(jax.grad(first)(z) * vector)
        return first(z), second(z), jax.grad(second)(z)
    if BACKEND == "torch":
        import torch

        z = ops.convert_to_tensor(z).requires_grad_()
        first = product_with_gradient(function, vector, z)
        second = product_with_gradient(lambda _: first, vector, z)
        return first.detach(), second.detach(), torch.autograd.grad(second, z)[0]
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


def test_third_derivative_equals_the_formula():
    z, ids = draw((2, 64), scale=1.0)
    vector = np.random.default_rng(1).normal(size=z.shape).astype("float32")
    inputs = lambda z: read_inputs(ids, z, from_logits=True, ignore_class=None, axis=-1)
    plain = lambda z: DRSLoss(0.01, from_logits=True).values(inputs(z))
    in_one_pass = lambda z: drs_loss(ids, z, 0.01, from_logits=True)
    fused, formula = (
        nested_gradients(lambda z, of=of: ops.sum(ops.exp(0.3 * of(z))), z, vector) for of in (in_one_pass, plain)
    )
    for got, expected in zip(fused, formula, strict=True):
        np.testing.assert_allclose(values(got), values(expected), rtol=1e-3, atol=1e-4)


def test_third_derivative_of_masked_rows_is_zero():
    z, ids = draw()
    z[2] = np.nan
    scale = np.array([1, 1, 0, 1, 1, 1, 1], "float32")
    _, _, third = nested_gradients(lambda z: ops.sum(loss(ids, z, scale)), z, np.ones_like(z))
    assert np.all(values(third)[2] == 0)
    assert np.all(np.isfinite(values(third)))


@on_jax
def test_forward_mode_equals_the_gradient():
    import jax

    z, ids = draw()
    vector = np.random.default_rng(1).normal(size=z.shape).astype("float32")
    _, grad = jax.jvp(lambda z: ops.sum(loss(ids, z)), (z,), (vector,))
    np.testing.assert_allclose(grad, np.sum(gradient(lambda z: loss(ids, z), z) * vector), rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_is_used_for_logits_in_log_space(classes):
    z, ids = draw((7, classes))
    y = reference.one_hot(ids, classes).astype("float32")
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)

    def is_used(y, z, space="log_softmax", from_logits=True):
        inputs = read_inputs(y, z, from_logits=from_logits, ignore_class=None, axis=-1)
        return fused.should_fuse(inputs, space)

    assert is_used(ids, z)
    assert not is_used(ids, z, space="softmax")
    assert is_used(y, z)
    assert not is_used(ids, p, from_logits=False)
    got = values(drs_loss(ids, z, from_logits=True))
    np.testing.assert_allclose(got, reference.each(reference.drs_loss, y, z), rtol=1e-5)


@pytest.mark.parametrize("ignore_class", some_short([None, 3], more=[None]))
def test_masks_and_wrong_labels_are_as_in_the_formula(ignore_class):
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
def test_tensorflow_graph_compiles_it_by_xla():
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


@needs_xla
@pytest.mark.parametrize(
    ("batch", "cores", "sparse"), few_of([512, 509], [2, 64], [True, False], keep=[(509, 2, True), (512, 64, False)])
)
def test_program_stores_no_second_array_of_that_size(batch, cores, sparse):
    classes = 32_000
    form = fused.Form("sum_of_squares", smooth=False, masked=False, sparse=sparse)
    program = fused.compiled_program(classes, "float32", form, BlockPlan(cores))
    label_shape, label_dtype = ((batch,), "int32") if sparse else ((batch, classes), "float32")
    if BACKEND == "jax":
        import jax

        shapes = [jax.ShapeDtypeStruct((batch, classes), "float32"), jax.ShapeDtypeStruct(label_shape, label_dtype)]
        shapes += [jax.ShapeDtypeStruct((batch,), "float32")]
        shapes += [jax.ShapeDtypeStruct((), "float32")] * 2
        temporary = jax.jit(program).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    else:
        import tensorflow as tf

        if tuple(map(int, tf.__version__.split(".")[:2])) < (2, 21):
            pytest.skip("older versions of XLA copy the gradient's buffer once more")
        z, labels = np.zeros((batch, classes), "float32"), np.zeros(label_shape, label_dtype)
        numbers = np.ones(batch, "float32"), np.float32(0.3), np.float32(0)
        inputs = [ops.convert_to_tensor(x) for x in (z, labels, *numbers)]
        temporary = peak_of_temporaries(program.experimental_get_compiler_ir(*inputs)(stage="optimized_hlo"))
    assert temporary <= 0.02 * batch * classes * 4


def peak_of_temporaries(hlo):
    """Compute the peak memory of a program beside its inputs and outputs, from its optimized and scheduled text.

    The result of an instruction outside a fusion is stored from that instruction to its last use. Instructions that
    only name, pass on or update in place an array need no memory, and neither do the empty outputs.
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


@on_torch
@pytest.mark.short
@pytest.mark.parametrize("form", ["ids", "one-hot"])
def test_torch_stores_one_array_of_that_size(form):
    import torch

    z, _ = draw((64, 1_000))
    labels, _ = draw_labels(z.shape, form)
    z = ops.convert_to_tensor(z).requires_grad_()
    stored = {}

    def pack(x):
        stored[x.data_ptr()] = x.numel()
        return x

    labels = ops.convert_to_tensor(labels)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(labels, z).sum()
    own = [count for pointer, count in stored.items() if pointer not in (z.data_ptr(), labels.data_ptr())]
    assert sum(own) <= 1.02 * z.numel()


@on_torch
def test_torch_transforms_use_the_formula():
    import torch

    z, ids = draw()
    labels, z = map(ops.convert_to_tensor, (ids, z))
    function = lambda z: drs_loss(labels, z, from_logits=True).sum()
    expected = gradient(lambda z: drs_loss(labels, z, from_logits=True), values(z))
    np.testing.assert_allclose(values(torch.func.grad(function)(z)), expected, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(function, (z,), (torch.ones_like(z),))
    np.testing.assert_allclose(values(tangent), expected.sum(), rtol=1e-4, atol=1e-4)


def test_takes_float16_logits():
    z, ids = draw()
    half = ops.cast(z, "float16")
    expected = reference.each(reference.drs_loss, reference.one_hot(ids, 6), values(half))
    np.testing.assert_allclose(values(drs_loss(ids, half, from_logits=True)), expected, rtol=1e-5)
    assert keras.backend.standardize_dtype(drs_loss(ids, half, from_logits=True).dtype) == "float32"
