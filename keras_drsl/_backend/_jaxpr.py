"""Evaluate a JAX program, and record which operation made each value.

A program is a `jaxpr`: a list of equations, each of which applies a primitive operation to variables.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from keras_drsl._backend._log_domain import Operation, product_equation
from keras_drsl._typing import Tensor

# Primitives that return their operand, perhaps in another dtype or on other devices.
IDENTITIES = ("convert_element_type", "copy", "copy_p", "sharding_constraint", "stop_gradient", "optimization_barrier")
# Primitives that call another program, which is looked into.
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call")
# Primitives that `jax.nn.softmax` applies to the largest logits before it subtracts them, and to the sums before it
# divides by them.
SHAPINGS = (*IDENTITIES, "broadcast_in_dim", "reshape", "max")

ARITHMETIC = {
    "exp": "exp",
    "logistic": "sigmoid",
    "add": "add",
    "add_any": "add",
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
}
REARRANGEMENTS = (
    *("reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "concatenate", "rev", "split"),
    *("dynamic_slice", "gather", "stack"),
)


class Step(NamedTuple):
    """Hold an equation, the values it was applied to, and which of its results a value is."""

    equation: Any
    inputs: tuple[Any, ...]
    position: int


class Record:
    """Evaluate programs and record how their values were computed."""

    def __init__(self) -> None:
        # Values are kept beside their steps, as ids of freed objects are used again.
        self._steps: dict[int, tuple[Tensor, Step]] = {}
        self._entered: dict[int, list[Any]] = {}

    def evaluate(self, jaxpr: Any, consts: Any, arguments: list[Any]) -> list[Any]:
        """Evaluate a program equation by equation, and return its results."""
        from jax.extend import core  # not loaded by Keras

        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            inputs = tuple(map(read, equation.invars))
            results = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
            results = results if equation.primitive.multiple_results else [results]
            for index, (variable, result) in enumerate(zip(equation.outvars, results, strict=True)):
                known[variable] = result
                if not any(result is value for value in inputs):
                    self._steps[id(result)] = result, Step(equation, inputs, index)
        return [read(variable) for variable in jaxpr.outvars]

    def describe(self, x: Any) -> Operation | None:
        """Return the operation that made a value, or None where `_log_domain.py` has no rule for it."""
        step = self._step(x)
        if step is None:
            return None
        equation, inputs, position = step
        name, params = equation.primitive.name, equation.params
        logits = self._softmax_operand(x, step)
        if logits is not None:
            return Operation("softmax", (logits,), -1)
        if name in CALLS:
            return Operation("identity", (self._enter(step),))
        if name in IDENTITIES:
            return Operation("identity", (inputs[position],))
        if name in ARITHMETIC:
            return Operation(ARITHMETIC[name], inputs)
        if name == "reduce_sum":
            return Operation("sum", inputs, (params["axes"], False))
        if name == "dot_general":
            ranks = [len(value.shape) for value in inputs]
            return Operation("contract", inputs, product_equation(ranks, *params["dimension_numbers"]))
        if name in REARRANGEMENTS:
            return Operation("rearrange", *_rearrangement(step))
        return None

    def _step(self, x: Any) -> Step | None:
        return self._steps[id(x)][1] if id(x) in self._steps else None

    def _enter(self, step: Step) -> Any:
        """Evaluate the program that an equation calls again, recorded, and return the result."""
        key = id(step.inputs)  # shared by the results of one call
        if key not in self._entered:
            params = step.equation.params
            body = next(params[name] for name in ("call_jaxpr", "jaxpr", "fun_jaxpr") if name in params)
            consts = getattr(body, "consts", [])
            self._entered[key] = self.evaluate(getattr(body, "jaxpr", body), consts, list(step.inputs))
        return self._entered[key][step.position]

    def _softmax_operand(self, x: Any, step: Step) -> Any:
        """Return the value whose softmax over the last axis another is, or None.

        `jax.nn.softmax` is not a primitive. It subtracts the largest logit of each row, and divides the exponentials by
        their sum.
        """
        if step.equation.primitive.name != "div":
            return None
        exponential = self._made_by("exp", step.inputs[0], IDENTITIES)
        total = self._made_by("reduce_sum", step.inputs[1], SHAPINGS)
        if exponential is None or total is None or total.equation.params["axes"] != (len(x.shape) - 1,):
            return None
        if self._made_by("exp", total.inputs[0], IDENTITIES) is not exponential:
            return None
        difference = self._made_by("sub", exponential.inputs[0], IDENTITIES)
        if difference is not None:
            largest = self._made_by("reduce_max", difference.inputs[1], SHAPINGS)
            if largest is not None and largest.inputs[0] is difference.inputs[0]:
                return difference.inputs[0]
        return exponential.inputs[0]

    def _made_by(self, name: str, x: Any, passed: tuple[str, ...]) -> Step | None:
        """Return the step of a primitive that computed a value, perhaps followed by other primitives, or None."""
        while (step := self._step(x)) is not None and step.equation.primitive.name in (*passed, *CALLS):
            if step.equation.primitive.name in CALLS:
                x = self._enter(step)
            else:
                x = max(step.inputs, key=lambda operand: len(jax.numpy.shape(operand)))
        return step if step is not None and step.equation.primitive.name == name else None


def _rearrangement(step: Step) -> tuple[tuple[Any, ...], Callable[..., Tensor]]:
    """Return the operands that hold elements, and the function that moves these."""
    equation, inputs, position = step
    name, params = equation.primitive.name, dict(equation.params)
    count = len(inputs) if name in ("concatenate", "stack") else 1

    def move(*logs: Tensor) -> Tensor:
        result = equation.primitive.bind(*logs, *inputs[count:], **params)
        return result[position] if equation.primitive.multiple_results else result

    return inputs[:count], move
