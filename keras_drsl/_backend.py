"""The only file that knows which backend runs."""

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import keras
import numpy as np


def known_values(x: Any) -> np.ndarray | None:
    """The values of a tensor, or None while a program is traced and there are none yet."""
    if isinstance(x, keras.KerasTensor):
        return None
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.is_symbolic_tensor(x):
            return None
    elif backend == "jax":
        import jax

        if isinstance(x, jax.core.Tracer):
            return None
    elif backend == "torch":
        import torch

        if torch.compiler.is_compiling() or x.is_meta:
            return None
    return keras.ops.convert_to_numpy(x)


def mask_of(x: Any) -> Any:
    """The Keras mask of a tensor, or None."""
    mask = getattr(x, "_keras_mask", None)
    if mask is None and keras.config.backend() == "jax" and keras.ops.is_tensor(x):
        found = _mask_layers()[0](x)
        mask = None if found is x else found
    return mask


def with_mask(x: Any, mask: Any) -> Any:
    """The tensor with a Keras mask, for Keras to average over the valid positions only."""
    try:
        x._keras_mask = mask
    except AttributeError:
        x = _mask_layers()[1]([x, mask])
    return x


def compiles() -> bool:
    """Whether the backend has a compiler of its own to hand a program to: XLA, on TensorFlow and JAX."""
    return keras.config.backend() in ("tensorflow", "jax")


def cpu_cores() -> int | None:
    """How many processor cores compute a program, or None where an accelerator does, or several devices on JAX."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        on_cpu = not (tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))
    else:
        import jax

        # What several devices share, JAX divides among them, unless a program cuts it into blocks itself.
        on_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    # Those this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if on_cpu else None


def device_name() -> str:
    """What computes: the graphics card's name, or "cpu"."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        cards = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(cards[0]).get("device_name", "gpu") if cards else "cpu"
    if backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def pick(x: Any, columns: Any) -> Any:
    """One element of each row: `x[i, columns[i]]`, shape `(rows,)`."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # Older versions of `ops.take_along_axis` cannot be compiled for a number of rows not known while tracing.
        return tf.gather(x, columns, batch_dims=1)
    return keras.ops.take_along_axis(x, columns[:, None], axis=1)[:, 0]


def compiled(program: Callable, *arguments: Any) -> Callable:
    """The program compiled by XLA, called from anywhere: eagerly, in a graph, in a program compiled itself.

    Args:
        program: takes and returns tensors.
        *arguments: the shape and dtype of each of its arguments, or a tuple of such pairs for a tuple of tensors, with
            None for lengths that differ from call to call.
    """
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def specification(argument: Any) -> Any:
            if isinstance(argument[1], str):
                return tf.TensorSpec(*argument)
            return tuple(map(specification, argument))

        signature = list(map(specification, arguments))
        return tf.function(program, input_signature=signature, jit_compile=True, autograph=False)

    import jax

    return jax.jit(program)


def graph(function: Callable, variables: list, *, free_axes: Callable = lambda place: 1) -> Callable:
    """The function as a program for tensors of any number of rows.

    It is not handed to XLA on TensorFlow, whose own convolutions are several times faster on a processor.

    Args:
        function: takes and returns nested structures of tensors.
        variables: the Keras variables it reads, looked up anew in each call.
        free_axes: maps the place of an argument to how many of its first axes change their lengths from call to call.

    Returns:
        A function of the same arguments, as arrays or tensors.
    """
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        programs: dict[tuple, Callable] = {}

        def specification(x: Any, free: int) -> Any:
            free = min(len(x.shape), free)
            return tf.TensorSpec((None,) * free + tuple(x.shape[free:]), x.dtype)

        def call(*arguments: Any) -> Any:
            signature = [
                tf.nest.map_structure(partial(specification, free=free_axes(place)), argument)
                for place, argument in enumerate(arguments)
            ]
            key = tuple(tf.nest.flatten(signature))
            if key not in programs:
                programs[key] = tf.function(function, input_signature=signature, autograph=False)
            return programs[key](*arguments)

        return call

    if keras.config.backend() == "jax":
        import jax

        @jax.jit
        def stateless(values: list, *arguments: Any) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*arguments)

        return lambda *arguments: stateless([variable.value for variable in variables], *arguments)

    import torch

    def without_gradient(*arguments: Any) -> Any:
        with torch.no_grad():
            return function(*keras.tree.map_structure(keras.ops.convert_to_tensor, arguments))

    return without_gradient


def stepper(step: Callable, variables: list) -> Callable:
    """A program that takes several steps in one call, where calls are dear.

    Args:
        step: maps `(rows, *arguments)` to the next rows, a dictionary of tensors.
        variables: the Keras variables it reads, looked up anew in each call.

    Returns:
        A function of the rows and the arguments, these stacked: one step for each element of their first axis.
    """
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def steps(rows: dict, *stacked: Any) -> Any:
            def body(number: Any, rows: dict) -> Any:
                return number + 1, step(rows, *tf.nest.map_structure(lambda x: x[number], stacked))

            count = tf.shape(tf.nest.flatten(stacked)[0])[0]
            shapes = tf.nest.map_structure(lambda x: tf.TensorShape((None, *x.shape[1:])), rows)
            invariants = (tf.TensorShape(()), shapes)
            return tf.while_loop(lambda number, rows: number < count, body, (0, rows), invariants)[1]

        # Of the stacked arguments, the number of steps and that of rows.
        return graph(steps, variables, free_axes=lambda place: 2 if place else 1)

    one = graph(step, variables)

    def several(rows: dict, *stacked: Any) -> dict:
        flat = keras.tree.flatten(stacked)
        for arguments in zip(*flat, strict=True):
            rows = one(rows, *keras.tree.pack_sequence_as(stacked, arguments))
        return rows

    return several


def repeat(step: Callable, times: int, x: Any, variables: list) -> Any:
    """A step taken several times, within a program.

    Args:
        step: maps a tensor to the next.
        times: how often.
        x: the first tensor.
        variables: the Keras variables the step reads.
    """
    if keras.config.backend() != "jax":
        return keras.ops.fori_loop(0, times, lambda _, x: step(x), x)

    import jax

    # In a loop of its own, XLA on a processor computes convolutions several times slower.
    if jax.default_backend() == "cpu":
        for _ in range(times):
            x = step(x)
        return x
    values = [(variable, variable.value) for variable in variables]

    def body(_: Any, x: Any) -> Any:
        # What the step does to variables, a layer's random numbers for example, cannot leave the loop.
        with keras.StatelessScope(state_mapping=values):
            return step(x)

    return jax.lax.fori_loop(0, times, body, x)


def replica() -> Any:
    """Which of the replicas of `tf.distribute` computes this program; 0 without them."""
    if keras.config.backend() != "tensorflow":
        return 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.replica_id_in_sync_group if context else 0


def one_replicas(x: Any) -> Any:
    """What one of the replicas of `tf.distribute` has of a batch; anything else as it is."""
    if keras.config.backend() != "tensorflow":
        return x
    import tensorflow as tf

    return x.values[0] if isinstance(x, tf.distribute.DistributedValues) else x


def looks_up_weights() -> bool:
    """Whether a compiled function reads the weights it closes over anew in each call."""
    return keras.config.backend() != "jax"


def padded(rows: int) -> int:
    """How many rows to hand to a program of `graph` for so many: few different numbers where each is compiled anew."""
    return max(16, 1 << (rows - 1).bit_length()) if keras.config.backend() == "jax" else rows


def input_gradient(function: Callable, x: Any) -> tuple[Any, Any, Any]:
    """Both results of a function, one value a row and anything else, and the gradient of the values' sum."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            values, rest = function(x)
        gradient = tape.gradient(values, x, unconnected_gradients="zero")
    elif keras.config.backend() == "jax":
        import jax

        def total(x: Any) -> Any:
            values, rest = function(x)
            return keras.ops.sum(values), (values, rest)

        gradient, (values, rest) = jax.grad(total, has_aux=True)(x)
    else:
        import torch

        with torch.enable_grad():
            x = x.detach().requires_grad_()
            values, rest = function(x)
            gradient = torch.autograd.grad(values.sum(), x, allow_unused=True, materialize_grads=True)[0]
        values, rest = keras.tree.map_structure(lambda tensor: tensor.detach(), (values, rest))
    return values, rest, gradient


def with_gradient(value_and_gradient: Callable, hessian_product: Callable, x: Any, *constants: Any) -> Any:
    """One value a row of `x`, differentiable although its gradient is computed with it rather than derived from it.

    Args:
        value_and_gradient: maps `(x, *constants)` to values `(rows,)` and their gradient, of the shape of `x`.
        hessian_product: maps `(x, *constants, vector)` to the product of the second derivative with a vector of the
            shape of `x`.
        x: shape `(rows, columns)`.
        *constants: tensors no gradient is asked for.

    Returns:
        Shape `(rows,)`.
    """
    if keras.config.backend() == "jax":
        import jax

        @jax.custom_jvp
        def both(x: Any, *constants: Any) -> Any:
            return value_and_gradient(x, *constants)

        @both.defjvp
        def both_forward(primals: Any, tangents: Any) -> Any:
            values, gradient = both(*primals)
            along = keras.ops.sum(gradient * tangents[0], axis=-1)
            return (values, gradient), (along, hessian_product(*primals, tangents[0]))

        # The first derivative needs nothing of the second.
        @jax.custom_jvp
        def value(x: Any, *constants: Any) -> Any:
            return value_and_gradient(x, *constants)[0]

        @value.defjvp
        def value_forward(primals: Any, tangents: Any) -> Any:
            values, gradient = both(*primals)
            return values, keras.ops.sum(gradient * tangents[0], axis=-1)

        return value(x, *constants)

    import tensorflow as tf

    # TensorFlow does not look into `value_and_gradient` for a second derivative: without `hessian_product` it would
    # silently be zero.
    @tf.custom_gradient
    def differentiable(x: Any) -> Any:
        # Nor may it try to: not all that XLA compiles has a derivative there.
        values, gradient = value_and_gradient(*map(tf.stop_gradient, (x, *constants)))

        @tf.custom_gradient
        def scaled(x: Any, upstream: Any) -> Any:
            def backward(vector: Any) -> Any:
                product = hessian_product(x, *constants, vector * upstream[:, None])
                # For a third derivative, the gradient must still depend on `x`.
                return product, tf.reduce_sum(vector * scaled(x, tf.ones_like(upstream)), axis=-1)

            return gradient * upstream[:, None], backward

        return values, lambda upstream: scaled(x, upstream)

    return differentiable(x)


def with_backward(forward: Callable, backward: Callable, inputs: tuple, constants: tuple) -> Any:
    """Values whose gradient another program computes from statistics of the first.

    Args:
        forward: maps `(*inputs, *constants)` to values `(rows,)` and a tuple of statistics.
        backward: maps `(*inputs, *constants, statistics, upstream)` to the gradients of the inputs.
        inputs: tensors to differentiate with respect to.
        constants: tensors no gradient is asked for.

    Returns:
        Shape `(rows,)`.
    """
    if keras.config.backend() == "jax":
        import jax

        def kept(*arguments: Any) -> Any:
            values, statistics = forward(*arguments)
            return values, (arguments, statistics)

        def pull_back(residuals: Any, upstream: Any) -> Any:
            arguments, statistics = residuals
            return *backward(*arguments, statistics, upstream), *[None] * len(constants)

        function = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        function.defvjp(kept, pull_back)
        return function(*inputs, *constants)

    import tensorflow as tf

    @tf.custom_gradient
    def differentiable(*inputs: Any) -> Any:
        values, statistics = forward(*map(tf.stop_gradient, (*inputs, *constants)))
        return values, lambda upstream: backward(*inputs, *constants, statistics, upstream)

    # A variable's value, for the gradient to reach the variable by way of it.
    return differentiable(*map(tf.convert_to_tensor, inputs))


@cache
def _mask_layers() -> tuple[keras.layers.Layer, keras.layers.Layer]:
    """One layer that returns the mask of its input and one that sets it.

    In a JAX program being traced, tensors take no attributes. Keras keeps their masks elsewhere and hands them out to
    layers alone.
    """

    class ReadMask(keras.layers.Layer):
        def call(self, x: Any, mask: Any = None) -> Any:
            return x if mask is None else mask

        def compute_mask(self, x: Any, mask: Any = None) -> Any:
            return None

    class SetMask(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs[0] + 0.0

        def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
            return inputs[1]

    return ReadMask(autocast=False), SetMask(autocast=False)
