"""Define the functions of `_backend` for JAX. `tensorflow.py` explains them."""

import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import keras
from jax.custom_derivatives import SymbolicZero

from keras_drsl._backend._common import available_cores, padded_length, step_by_step
from keras_drsl._backend._jaxpr import Record
from keras_drsl._backend._log_domain import logits_of
from keras_drsl._typing import Array, Tensor

NAME = "jax"
HAS_XLA = True
LOGITS_PER_CORE = 2**10, 2**17
READS_WEIGHTS_EACH_CALL = False
GATHERS_TRUE_LOGITS = False


def concrete_value(x: Tensor) -> Array | None:
    """Return the values of a tensor, or None where they cannot be seen."""
    # The values of an array may lie on the devices of other processes.
    if isinstance(x, keras.KerasTensor | jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    values: Array = keras.ops.convert_to_numpy(x)
    return values


def is_compiling() -> bool:
    """Return whether a program is being traced that keeps the present values of Python variables."""
    with keras.SymbolicScope() as scope:
        computes_shapes_only = scope.original_scope is not None
    # Not so under `jax.grad` alone, where only what depends on its arguments is traced.
    return not computes_shapes_only and isinstance(jax.numpy.zeros(()), jax.core.Tracer)


def is_dense(x: Any) -> bool:
    """Return whether a tensor holds one value per index."""
    # The classes of `jax.experimental.sparse` are the only arrays with this method.
    return not hasattr(x, "todense")


def warn_if_constant(variable: Any) -> None:
    """Warn that the program being traced will keep the present value of a Keras variable."""
    if is_compiling() and not isinstance(variable.value, jax.core.Tracer):
        warnings.warn(
            f"`{variable.name}` is compiled into this program as a constant. JAX reads a variable again in each step "
            "only if the model tracks it: before `compile`, let the model hold it, as in `model.lam = lam`.",
            stacklevel=3,
        )


def stop_program(condition: Tensor, message: str) -> None:
    """Do nothing: a program of XLA cannot be stopped."""


def max_of_classes(x: Tensor) -> Tensor:
    """Return the maximum over the last axis."""
    return keras.ops.max(x, axis=-1, keepdims=True)


def get_mask(x: Tensor) -> Tensor | None:
    """Return the Keras mask of a tensor, or None."""
    mask = getattr(x, "_keras_mask", None)
    if mask is None and keras.ops.is_tensor(x):
        found = _mask_layers()[0](x)
        mask = None if found is x else found
    return mask


def set_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor with a Keras mask."""
    try:
        x._keras_mask = mask
    except AttributeError:
        x = _mask_layers()[1]([x, mask])
    return x


@cache
def _mask_layers() -> tuple[keras.layers.Layer, keras.layers.Layer]:
    """Return one layer that returns the mask of its input and one that sets it.

    Tensors of JAX take no attributes. Keras keeps their masks elsewhere and passes them to layers only.
    """

    class ReadMask(keras.layers.Layer):
        def call(self, x: Tensor, mask: Tensor = None) -> Tensor:
            return x if mask is None else mask

        def compute_mask(self, x: Tensor, mask: Tensor = None) -> None:
            return None

    class SetMask(keras.layers.Layer):
        def call(self, inputs: list[Tensor]) -> Tensor:
            return inputs[0] + 0.0

        def compute_mask(self, inputs: list[Tensor], mask: Tensor = None) -> Tensor:
            return inputs[1]

    return ReadMask(autocast=False), SetMask(autocast=False)


def cpu_cores() -> int | None:
    """Return how many processor cores compute a program; None for an accelerator or several devices."""
    # JAX divides a computation among several devices, unless a program cuts it into blocks itself.
    on_one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return available_cores() if on_one_cpu else None


def device_name() -> str:
    """Return the name of the graphics card, or "cpu"."""
    return str(jax.devices()[0].device_kind)


def jit(program: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
    """Compile a program with XLA."""
    compiled: Callable[..., Any] = jax.jit(program)
    return compiled


def pad_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Add rows of zeros, unless the program around them is compiled for their number."""
    rows = tensors[0].shape[0]
    if any(isinstance(x, jax.core.Tracer) for x in tensors) or padded_length(rows) == rows:
        return tensors
    added = padded_length(rows) - rows
    return tuple(keras.ops.pad(x, [(0, added)] + [(0, 0)] * (x.ndim - 1)) for x in tensors)


def compile_function(
    function: Callable[..., Any],
    variables: list[Any],
    compiled: Callable[[float], None],
    *,
    free_axes: Callable[[int], int] = lambda index: 1,
) -> Callable[..., Any]:
    """Compile a function for tensors of any number of rows, once per number."""

    def stateless(values: list[Tensor], *arguments: Any) -> Any:
        seeds = [index for index, value in enumerate(values) if _is_seed(value)]
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
            before = [scope.get_current_value(variables[index]) for index in seeds]
            results = function(*arguments)
            after = [scope.get_current_value(variables[index]) for index in seeds]
        # Other variables may depend on the inputs, and would carry the trace of a gradient out of it.
        used = {index: new for index, old, new in zip(seeds, before, after, strict=True) if new is not old}
        return results, used

    program = jax.jit(stateless, compiler_options=_quick_compilation())
    seen = set()

    def call(*arguments: Any) -> Any:
        weights, leaves = [variable.value for variable in variables], jax.tree.leaves(arguments)
        if any(isinstance(x, jax.core.Tracer) for x in (*weights, *leaves)):
            results, used = stateless(weights, *arguments)  # within another program, which is compiled as a whole
        else:
            began, key = time.perf_counter(), tuple((x.shape, x.dtype) for x in leaves)
            results, used = program(weights, *arguments)
            if key not in seen:
                # A call returns before its program has run, so this is the time of the compilation.
                compiled(time.perf_counter() - began)
                seen.add(key)
        # The next call must not draw the same random numbers.
        for index, value in used.items():
            variables[index].assign(value)
        return results

    return call


@cache
def _quick_compilation() -> dict[str, Any] | None:
    """Return options with which XLA compiles attacks on a processor in half the time, or None if it lacks them."""
    if jax.default_backend() != "cpu":
        return None
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def multi_step(
    step: Callable[..., dict[str, Tensor]], variables: list[Any], compiled: Callable[[float], None]
) -> Callable[..., dict[str, Tensor]]:
    """Make a program of several steps per call."""
    return step_by_step(compile_function(step, variables, compiled))


def fori_loop(step: Callable[[Tensor], Tensor], times: int, x: Tensor, variables: list[Any]) -> Tensor:
    """Repeat a step within a program."""
    # Inside a loop, XLA computes convolutions several times slower on a processor.
    if jax.default_backend() == "cpu":
        for _ in range(times):
            x = step(x)
        return x
    values = [(variable, variable.value) for variable in variables]

    def body(_: Tensor, x: Tensor) -> Tensor:
        # Updates of variables, such as a layer's random numbers, cannot leave the loop.
        with keras.StatelessScope(state_mapping=values):
            return step(x)

    return jax.lax.fori_loop(0, times, body, x)


def repeat_random(function: Callable[[], Tensor], times: int, variables: list[Any]) -> Tensor:
    """Return the results of several calls of a function that is random, stacked."""
    values = [(variable, variable.value) for variable in variables]

    def call(number: Tensor) -> Tensor:
        # One program for all calls, as XLA takes long to compile as many copies of a model.
        with keras.StatelessScope(state_mapping=[(variable, _skip(value, number)) for variable, value in values]):
            return function()

    results: Tensor = jax.vmap(call)(jax.numpy.arange(times))
    for variable, value in values:
        if _is_seed(value):
            variable.assign(_skip(value, times))
    return results


def _is_seed(value: Tensor) -> bool:
    """Return whether a value is the state of a `keras.random.SeedGenerator`."""
    return bool(value.dtype == "uint32" and value.shape == (2,))


def _skip(value: Tensor, number: Tensor | int) -> Tensor:
    """Return a state that so many calls have used, if the value is one; each call may draw 4,096 times."""
    if not _is_seed(value):
        return value
    return value + jax.numpy.array([0, 4096], "uint32") * jax.numpy.asarray(number, "uint32")


def replica_id() -> Tensor | int:
    """Return 0, as there are no replicas of `tf.distribute`."""
    return 0


def per_replica_value(x: Any) -> Any:
    """Return anything unchanged."""
    return x


def bucket_size(rows: int) -> int:
    """Return a power of two of at least 16."""
    return max(16, 1 << (rows - 1).bit_length())


def value_and_gradient(function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Return the values of a function, its second result, and the gradient of the sum of the values."""

    def total(x: Tensor) -> tuple[Tensor, Any]:
        values, auxiliary = function(x)
        return keras.ops.sum(values), (values, auxiliary)

    gradient, (values, auxiliary) = jax.grad(total, has_aux=True)(x)
    return values, auxiliary, gradient


def allows_custom_gradient(*tensors: Tensor) -> bool:
    """Return True: programs take all tensors."""
    return True


def custom_gradient(
    value_and_gradient: Callable[..., tuple[Tensor, Tensor]],
    formula: Callable[..., Tensor],
    x: Tensor,
    *others: Tensor,
) -> Tensor:
    """Compute one value per row of `x` with a gradient that is computed together with the values."""

    def plain(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        values, pull_back = jax.vjp(lambda x: formula(x, *others), x)
        return values, pull_back(jax.numpy.ones_like(values))[0]

    @jax.custom_jvp
    def both(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(x, *others)

    @both.defjvp
    def both_forward(primals: Any, tangents: Any) -> Any:
        return both(*primals), jax.jvp(plain, primals, tangents)[1]

    # A separate function, so that the first derivative does not compute the second one.
    @jax.custom_jvp
    def value(x: Tensor, *others: Tensor) -> Tensor:
        return value_and_gradient(x, *others)[0]

    def value_forward(primals: Any, tangents: Any) -> Any:
        values, gradient = both(*primals)
        directional = jax.numpy.zeros_like(values)
        if not isinstance(tangents[0], SymbolicZero):
            directional += keras.ops.sum(gradient * tangents[0], axis=-1)
        moving = [i for i in range(1, len(primals)) if not isinstance(tangents[i], SymbolicZero)]
        if moving:

            def of_moving(*arguments: Tensor) -> Tensor:
                every = list(primals)
                for index, argument in zip(moving, arguments, strict=True):
                    every[index] = argument
                return formula(*every)

            given = [[given[i] for i in moving] for given in (primals, tangents)]
            directional += jax.jvp(of_moving, *given)[1]
        return values, directional

    # Zero tangents are marked, so that nothing is computed for them.
    value.defjvp(value_forward, symbolic_zeros=True)
    return value(x, *others)


def custom_vjp(
    forward: Callable[..., tuple[Tensor, Any]],
    backward: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
) -> Tensor:
    """Compute values whose gradient another program computes from statistics of the first program."""

    def with_residuals(*arguments: Tensor) -> Any:
        values, statistics = forward(*arguments)
        return values, (arguments, statistics)

    def pull_back(residuals: Any, upstream: Tensor) -> Any:
        arguments, statistics = residuals
        return *backward(*arguments, statistics, upstream), *[None] * len(constants)

    function = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    function.defvjp(with_residuals, pull_back)
    return function(*inputs, *constants)


def save_native_state(model: keras.Model) -> Callable[[], None]:
    """Return a function that does nothing: JAX has no variables of its own."""
    return lambda: None


def sync_state(model: keras.Model) -> None:
    """Write the values that training has computed into the model's variables."""
    model.jax_state_sync()


def input_of_softmax(x: Tensor, axis: int = -1) -> Tensor | None:
    """Return None: a tensor does not record the operation that made it."""
    return None


def logits_behind(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function that returns probabilities return logits."""

    def logits(x: Tensor) -> Tensor:
        variables: list[Any] = []

        def outputs_and_updates(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            with _NestedScope() as scope:
                outputs = function(x)
            variables[:] = scope.updated.values()
            return outputs, [scope.get_current_value(variable) for variable in variables]

        program = jax.make_jaxpr(outputs_and_updates)(x)
        record = Record()
        outputs, *updates = record.evaluate(program.jaxpr, program.consts, [x])
        for variable, value in zip(variables, updates, strict=True):
            variable.assign(value)
        return logits_of(outputs, record.describe)

    return logits


class _NestedScope(keras.StatelessScope):
    """Collect the updates of variables, and read all other values from the scope around it.

    Updates computed while a function is traced on its own must not reach the program around it.

    Attributes:
        updated: The variables with updates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updated: dict[int, Any] = {}

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        self.updated[id(update[0])] = update[0]
        super().add_update(update)

    def get_current_value(self, variable: Any) -> Tensor | None:
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value
