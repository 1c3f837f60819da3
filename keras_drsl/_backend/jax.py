"""JAX. `tensorflow.py` explains the functions."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import keras

from keras_drsl._backend._common import available_cores, not_a_softmax, step_by_step
from keras_drsl._typing import Array, Tensor

NAME = "jax"
HAS_XLA = True
READS_WEIGHTS_EACH_CALL = False

# Primitives that return their operand, perhaps in another dtype or on other devices.
CASTS = ("convert_element_type", "copy", "sharding_constraint")
# Primitives that call another program.
INLINED = ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2")
CALLS = (*INLINED, "custom_jvp_call")
# Between the largest logit of a row and what `jax.nn.softmax` subtracts from the row; between its sum and the divisor.
SHAPINGS = (*CASTS, "broadcast_in_dim", "reshape", "stop_gradient", "max")


def concrete_value(x: Tensor) -> Array | None:
    """Return the values of a tensor, or None while a program is traced."""
    if isinstance(x, keras.KerasTensor | jax.core.Tracer):
        return None
    values: Array = keras.ops.convert_to_numpy(x)
    return values


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


def gather_rows(x: Tensor, columns: Tensor) -> Tensor:
    """Return one element per row."""
    return keras.ops.take_along_axis(x, columns[:, None], axis=1)[:, 0]


def jit(program: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
    """Compile a program with XLA."""
    compiled: Callable[..., Any] = jax.jit(program)
    return compiled


def compile_function(
    function: Callable[..., Any], variables: list[Any], *, free_axes: Callable[[int], int] = lambda index: 1
) -> Callable[..., Any]:
    """Compile a function for tensors of any number of rows, once per number."""

    @jax.jit
    def stateless(values: list[Tensor], *arguments: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*arguments)

    return lambda *arguments: stateless([variable.value for variable in variables], *arguments)


def multi_step(step: Callable[..., dict[str, Tensor]], variables: list[Any]) -> Callable[..., dict[str, Tensor]]:
    """Make a program of several steps per call."""
    return step_by_step(compile_function(step, variables))


def fori_loop(step: Callable[[Tensor], Tensor], times: int, x: Tensor, variables: list[Any]) -> Tensor:
    """Repeat a step within a program."""
    # In a loop of its own, XLA on a processor computes convolutions several times slower.
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


def custom_gradient(
    value_and_gradient: Callable[..., tuple[Tensor, Tensor]],
    hessian_product: Callable[..., Tensor],
    x: Tensor,
    *constants: Tensor,
) -> Tensor:
    """Compute one value per row of `x` with a gradient that is computed together with the values."""

    @jax.custom_jvp
    def both(x: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(x, *constants)

    @both.defjvp
    def both_forward(primals: Any, tangents: Any) -> Any:
        values, gradient = both(*primals)
        directional = keras.ops.sum(gradient * tangents[0], axis=-1)
        return (values, gradient), (directional, hessian_product(*primals, tangents[0]))

    # A function of its own: the first derivative needs no second one.
    @jax.custom_jvp
    def value(x: Tensor, *constants: Tensor) -> Tensor:
        return value_and_gradient(x, *constants)[0]

    @value.defjvp
    def value_forward(primals: Any, tangents: Any) -> Any:
        values, gradient = both(*primals)
        return values, keras.ops.sum(gradient * tangents[0], axis=-1)

    return value(x, *constants)


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


def sync_state(model: keras.Model) -> None:
    """Write the values that training has computed into the model's variables."""
    model.jax_state_sync()


def input_of_softmax(x: Tensor) -> Tensor | None:
    """Return None: a tensor does not record the operation that made it."""
    return None


def softmax_input(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function return the input of its last softmax."""

    def logits(x: Tensor) -> Tensor:
        variables: list[Any] = []

        def outputs_and_updates(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            with _NestedScope() as scope:
                outputs = function(x)
            variables[:] = scope.updated.values()
            return outputs, [scope.get_current_value(variable) for variable in variables]

        program = jax.make_jaxpr(outputs_and_updates)(x)
        found, *updates = _evaluate_to_softmax(program.jaxpr, program.consts, [x], program.jaxpr.outvars)
        for variable, value in zip(variables, updates, strict=True):
            variable.assign(value)
        return found

    return logits


class _NestedScope(keras.StatelessScope):
    """Keep the updates of variables, and read all other values from the scope around it.

    The updates of a function that is traced by itself are not values of the program around it.

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


def _evaluate_to_softmax(jaxpr: Any, consts: Any, arguments: list[Tensor], outputs: list[Any]) -> list[Tensor]:
    """Evaluate variables of a program, and in place of the first one the input of the softmax that makes it."""
    output, *others = outputs
    operand = _softmax_operand(jaxpr, output)
    if operand is not None:
        return _evaluate(jaxpr, consts, arguments, [operand, *others])
    makers = _makers(jaxpr)
    output = _before(makers, output, CASTS)
    call = makers.get(id(output))
    if call is None or call.primitive.name not in INLINED:
        raise not_a_softmax()
    # The softmax may be inside a function that is compiled on its own, or computed again for its gradient.
    values = _evaluate(jaxpr, consts, arguments, [*call.invars, *others])
    count = len(call.invars)
    inner, inner_consts = _body(call)
    made = inner.outvars[call.outvars.index(output)]
    return [*_evaluate_to_softmax(inner, inner_consts, values[:count], [made]), *values[count:]]


def _evaluate(jaxpr: Any, consts: Any, arguments: list[Tensor], outputs: list[Any]) -> list[Tensor]:
    """Evaluate a program up to some of its variables."""
    from jax.extend import core  # not loaded by Keras

    return list(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr.replace(outvars=outputs), consts))(*arguments))


def _softmax_operand(jaxpr: Any, output: Any) -> Any:
    """Return the variable whose softmax over the last axis is an output of a program, or None.

    `jax.nn.softmax` is no primitive. It divides the exponentials by their sum, after the largest logit of each row was
    subtracted.
    """
    makers = _makers(jaxpr)
    output = _before(makers, output, CASTS)
    equation = makers.get(id(output))
    if equation is None:
        return None
    if equation.primitive.name in CALLS:
        body, _ = _body(equation)
        found = _softmax_operand(body, body.outvars[equation.outvars.index(output)])
        return next((x for x, inner in zip(equation.invars, body.invars, strict=True) if inner is found), None)
    if equation.primitive.name != "div":
        return None
    exponentials, divisor = (_before(makers, *pair) for pair in zip(equation.invars, (CASTS, SHAPINGS), strict=True))
    total, exponential = makers.get(id(divisor)), makers.get(id(exponentials))
    if total is None or total.primitive.name != "reduce_sum" or total.params["axes"] != (output.aval.ndim - 1,):
        return None
    if exponential is None or exponential.primitive.name != "exp":
        return None
    if _before(makers, total.invars[0], CASTS) is not exponentials:
        return None
    difference = makers.get(id(exponential.invars[0]))
    if difference is not None and difference.primitive.name == "sub":
        largest = makers.get(id(_before(makers, difference.invars[1], SHAPINGS)))
        if largest is not None and largest.primitive.name == "reduce_max" and largest.invars[0] is difference.invars[0]:
            return difference.invars[0]
    return exponential.invars[0]


def _body(call: Any) -> tuple[Any, Any]:
    """Return the program that an equation calls, and its constants."""
    body = call.params["call_jaxpr" if "call_jaxpr" in call.params else "jaxpr"]
    return getattr(body, "jaxpr", body), getattr(body, "consts", [])


def _makers(jaxpr: Any) -> dict[int, Any]:
    """Map each variable of a program, by id as constants have no hash, to the equation that makes it."""
    return {id(variable): equation for equation in jaxpr.eqns for variable in equation.outvars}


def _before(makers: dict[int, Any], variable: Any, primitives: tuple[str, ...]) -> Any:
    """Go back from a variable through equations of some primitives."""
    while (equation := makers.get(id(variable))) is not None and equation.primitive.name in primitives:
        variable = max(equation.invars, key=lambda operand: operand.aval.ndim)
    return variable
