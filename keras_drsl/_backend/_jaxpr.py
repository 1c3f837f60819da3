"""Find the softmax at the end of a JAX program, and evaluate the program up to its input.

A program is a `jaxpr`: a list of equations, each of which applies a primitive operation to variables.
"""

from typing import Any

from keras_drsl._backend._common import not_a_softmax
from keras_drsl._typing import Tensor

# Primitives that return their operand, perhaps in another dtype or on other devices.
CASTS = ("convert_element_type", "copy", "sharding_constraint")
# Primitives that call another program. The second group has derivatives of its own, so it is not taken apart.
INLINED = ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2")
CALLS = (*INLINED, "custom_jvp_call")
# Primitives that `jax.nn.softmax` applies to the largest logits before it subtracts them, and to the sums before it
# divides by them.
SHAPINGS = (*CASTS, "broadcast_in_dim", "reshape", "stop_gradient", "max")


def evaluate_to_softmax(jaxpr: Any, consts: Any, arguments: list[Tensor], outputs: list[Any]) -> list[Tensor]:
    """Evaluate variables of a program. The first one is replaced by the input of the softmax that computes it."""
    output, *others = outputs
    operand = _softmax_operand(jaxpr, output)
    if operand is not None:
        return _evaluate(jaxpr, consts, arguments, [operand, *others])
    producers = _producers(jaxpr)
    output = _trace_back(producers, output, CASTS)
    call = producers.get(id(output))
    if call is None or call.primitive.name not in INLINED:
        raise not_a_softmax()
    # The softmax may be inside a function that is compiled on its own, or computed again for its gradient.
    values = _evaluate(jaxpr, consts, arguments, [*call.invars, *others])
    count = len(call.invars)
    inner, inner_consts = _body(call)
    inner_output = inner.outvars[call.outvars.index(output)]
    return [*evaluate_to_softmax(inner, inner_consts, values[:count], [inner_output]), *values[count:]]


def _evaluate(jaxpr: Any, consts: Any, arguments: list[Tensor], outputs: list[Any]) -> list[Tensor]:
    """Evaluate a program up to some of its variables."""
    from jax.extend import core  # not loaded by Keras

    return list(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr.replace(outvars=outputs), consts))(*arguments))


def _softmax_operand(jaxpr: Any, output: Any) -> Any:
    """Return the variable whose softmax over the last axis is an output of a program, or None.

    `jax.nn.softmax` is not a primitive. It subtracts the largest logit of each row, and divides the exponentials by
    their sum.
    """
    producers = _producers(jaxpr)
    output = _trace_back(producers, output, CASTS)
    equation = producers.get(id(output))
    if equation is None:
        return None
    if equation.primitive.name in CALLS:
        body, _ = _body(equation)
        found = _softmax_operand(body, body.outvars[equation.outvars.index(output)])
        return next((x for x, inner in zip(equation.invars, body.invars, strict=True) if inner is found), None)
    exponential = _producer(producers, equation.invars[0], "exp", CASTS)
    total = _producer(producers, equation.invars[-1], "reduce_sum", SHAPINGS)
    if equation.primitive.name != "div" or exponential is None or total is None:
        return None
    summed = _producer(producers, total.invars[0], "exp", CASTS)
    if summed is not exponential or total.params["axes"] != (output.aval.ndim - 1,):
        return None
    difference = _producer(producers, exponential.invars[0], "sub")
    if difference is not None:
        largest = _producer(producers, difference.invars[1], "reduce_max", SHAPINGS)
        if largest is not None and largest.invars[0] is difference.invars[0]:
            return difference.invars[0]
    return exponential.invars[0]


def _body(call: Any) -> tuple[Any, Any]:
    """Return the program that an equation calls, and its constants."""
    body = call.params["call_jaxpr" if "call_jaxpr" in call.params else "jaxpr"]
    return getattr(body, "jaxpr", body), getattr(body, "consts", [])


def _producers(jaxpr: Any) -> dict[int, Any]:
    """Map the id of each variable of a program to its equation. The variables themselves may have no hash."""
    return {id(variable): equation for equation in jaxpr.eqns for variable in equation.outvars}


def _trace_back(producers: dict[int, Any], variable: Any, primitives: tuple[str, ...]) -> Any:
    """Follow a variable back through equations of some primitives, and return the variable from which they start."""
    while (equation := producers.get(id(variable))) is not None and equation.primitive.name in primitives:
        variable = max(equation.invars, key=lambda operand: operand.aval.ndim)
    return variable


def _producer(producers: dict[int, Any], variable: Any, name: str, primitives: tuple[str, ...] = ()) -> Any:
    """Return the equation of a primitive that computes a variable, perhaps followed by other primitives, or None."""
    equation = producers.get(id(_trace_back(producers, variable, primitives)))
    return equation if equation is not None and equation.primitive.name == name else None
