"""Define the functions of `_backend` for TensorFlow. Their docstrings hold for `jax.py` and `torch.py` too."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_drsl._backend._common import available_cores, padded_length
from keras_drsl._backend._common import repeat_random as repeat_random
from keras_drsl._backend._log_domain import Operation, logits_of, matmul_equation
from keras_drsl._typing import Array, Tensor

NAME = "tensorflow"

# Whether XLA can compile programs.
HAS_XLA = True

# How many logits one core works on at a time in `losses/fused.py`, for few classes and for many: measured on two cores.
LOGITS_PER_CORE = 2**13, 2**17

# Whether a compiled function reads the weights it closes over again in each call.
READS_WEIGHTS_EACH_CALL = True

# Whether Keras's sparse cross-entropy reads the true logits only, so that others may be minus infinity.
GATHERS_TRUE_LOGITS = True


def concrete_value(x: Tensor) -> Array | None:
    """Return the values of a tensor, or None where they cannot be seen: while a program is traced or transformed."""
    if isinstance(x, keras.KerasTensor) or tf.is_symbolic_tensor(x):
        return None
    values: Array = keras.ops.convert_to_numpy(x)
    return values


def is_compiling() -> bool:
    """Return whether a program is being traced that keeps the present values of Python variables."""
    return not tf.executing_eagerly()


def is_dense(x: Any) -> bool:
    """Return whether a tensor holds one value per index: not ragged, nested or sparse."""
    return not isinstance(x, tf.RaggedTensor | tf.SparseTensor | tf.IndexedSlices)


def warn_if_constant(variable: Any) -> None:
    """Warn that the program being traced will keep the present value of a Keras variable: only JAX does."""


def stop_program(condition: Tensor, message: str) -> None:
    """Stop a program at a wrong value, where the backend can: in a graph of TensorFlow that XLA does not compile.

    Args:
        condition: Bool, any shape; False is wrong.
        message: The message of the error.
    """
    if tf.is_symbolic_tensor(condition):
        tf.debugging.Assert(tf.reduce_all(condition), [message])


def max_of_classes(x: Tensor) -> Tensor:
    """Return the maximum over the last axis, shape `(..., 1)`. Keras's refuses an empty batch."""
    if isinstance(x, keras.KerasTensor):
        return keras.ops.max(x, axis=-1, keepdims=True)
    return tf.reduce_max(x, axis=-1, keepdims=True)


def get_mask(x: Tensor) -> Tensor | None:
    """Return the Keras mask of a tensor, or None."""
    return getattr(x, "_keras_mask", None)


def set_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor with a Keras mask. Keras then averages over the valid positions only."""
    x._keras_mask = mask
    return x


def cpu_cores() -> int | None:
    """Return how many processor cores compute a program; None for an accelerator, or for several devices on JAX."""
    on_accelerator = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU")
    return None if on_accelerator else available_cores()


def device_name() -> str:
    """Return the name of the graphics card, or "cpu"."""
    cards = tf.config.list_physical_devices("GPU")
    return str(tf.config.experimental.get_device_details(cards[0]).get("device_name", "gpu")) if cards else "cpu"


def jit(program: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
    """Compile a program with XLA. It can be called eagerly, in a graph, or in a program that XLA compiles.

    Args:
        program: A function of tensors that returns tensors.
        *specs: The shape and dtype of each argument, or a tuple of such pairs for a tuple of tensors. None stands for a
            length that differs from call to call.
    """

    def to_spec(spec: Any) -> Any:
        return tf.TensorSpec(*spec) if isinstance(spec[1], str) else tuple(map(to_spec, spec))

    to_function = partial(tf.function, program, input_signature=list(map(to_spec, specs)), autograph=False)
    compiled = to_function(jit_compile=True)
    operations = compiled.get_concrete_function().graph.get_operations()
    # XLA cannot compile what `tf.debugging.enable_check_numerics` adds to each operation.
    is_watched = any(operation.type.startswith("Debug") for operation in operations)
    function: Callable[..., Any] = to_function() if is_watched else compiled
    return function


def pad_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Add rows of zeros to tensors of the same length, so that a program of `jit` is compiled for a few lengths only.

    XLA compiles a program for each length and keeps them all. The length becomes one of four between a power of two and
    the next. Where it is known while a program is traced, that program is compiled for it anyway: nothing is added.
    """
    rows = tensors[0].shape[0]
    if rows is None:
        rows = tf.shape(tensors[0])[0]
        step = 2 ** tf.reduce_sum(tf.cast(rows > [2**power for power in range(3, 31)], "int32"))
        length = (rows + step - 1) // step * step
    else:
        length = padded_length(rows) if tf.executing_eagerly() else rows
        if length == rows:
            return tensors
    # Nothing is copied where nothing is added.
    padded = tuple(tf.pad(x, [(0, length - rows)] + [(0, 0)] * (len(x.shape) - 1)) for x in tensors)
    for x, given in zip(padded, tensors, strict=True):
        x.set_shape((None, *given.shape[1:]))
    return padded


def compile_function(
    function: Callable[..., Any],
    variables: list[Any],
    compiled: Callable[[float], None],
    *,
    free_axes: Callable[[int], int] = lambda index: 1,
) -> Callable[..., Any]:
    """Compile a function for tensors of any number of rows.

    Args:
        function: Takes and returns nested structures of tensors.
        variables: The Keras variables it reads. Their values are read again in each call.
        compiled: Is called with the seconds of each compilation.
        free_axes: Maps the index of an argument to how many of its first axes change their lengths from call to call.

    Returns:
        A function of the same arguments, as arrays or tensors.
    """
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def to_spec(x: Any, free: int) -> Any:
        free = min(len(x.shape), free)
        return tf.TensorSpec((None,) * free + tuple(x.shape[free:]), x.dtype)

    def call(*arguments: Any) -> Any:
        signature = [
            tf.nest.map_structure(partial(to_spec, free=free_axes(index)), argument)
            for index, argument in enumerate(arguments)
        ]
        key = tuple(tf.nest.flatten(signature))
        if key not in programs:
            if tf.config.functions_run_eagerly():
                return function(*tf.nest.map_structure(tf.convert_to_tensor, arguments))
            began = time.perf_counter()
            # Not compiled by XLA: on a processor, TensorFlow's own convolutions are several times faster. In a lambda,
            # as the signature of a partial function has its keywords, which a concrete function then asks for.
            program = tf.function(lambda *given: function(*given), input_signature=signature, autograph=False)
            programs[key] = program.get_concrete_function()
            compiled(time.perf_counter() - began)
        return programs[key](*arguments)

    return call


def multi_step(
    step: Callable[..., dict[str, Tensor]], variables: list[Any], compiled: Callable[[float], None]
) -> Callable[..., dict[str, Tensor]]:
    """Compile a program that runs several steps per call, to amortize dispatch overhead.

    Args:
        step: Maps `(rows, *arguments)` to the next rows, a dictionary of tensors.
        variables: The Keras variables it reads. Their values are read again in each call.
        compiled: Is called with the seconds of each compilation.

    Returns:
        A function of the rows and the stacked arguments. It takes one step per element of their first axis.
    """

    def steps(rows: dict[str, Tensor], *stacked: Any) -> dict[str, Tensor]:
        def body(number: Tensor, rows: dict[str, Tensor]) -> Any:
            return number + 1, step(rows, *tf.nest.map_structure(lambda x: x[number], stacked))

        count = tf.shape(tf.nest.flatten(stacked)[0])[0]
        shapes = tf.nest.map_structure(lambda x: tf.TensorShape((None, *x.shape[1:])), rows)
        invariants = (tf.TensorShape(()), shapes)
        last: dict[str, Tensor] = tf.while_loop(lambda number, rows: number < count, body, (0, rows), invariants)[1]
        return last

    # In the stacked arguments, both the number of steps and the number of rows differ from call to call.
    return compile_function(steps, variables, compiled, free_axes=lambda index: 2 if index else 1)


def fori_loop(step: Callable[[Tensor], Tensor], times: int, x: Tensor, variables: list[Any]) -> Tensor:
    """Repeat a step within a program.

    Args:
        step: Maps a tensor to the next tensor.
        times: The number of steps.
        x: The first tensor.
        variables: The Keras variables that the step reads.
    """
    return keras.ops.fori_loop(0, times, lambda _, x: step(x), x)


def replica_id() -> Tensor | int:
    """Return the index of the replica of `tf.distribute` that computes this program; 0 without replicas."""
    context = tf.distribute.get_replica_context()
    return context.replica_id_in_sync_group if context else 0


def per_replica_value(x: Any) -> Any:
    """Return one replica's part of a batch that `tf.distribute` has divided; anything else unchanged."""
    return x.values[0] if isinstance(x, tf.distribute.DistributedValues) else x


def bucket_size(rows: int) -> int:
    """Return how many rows a call of a `compile_function` program should have to hold `rows`.

    JAX compiles a program again for each number of rows, so on JAX this function returns only a few different numbers.
    """
    return rows


def value_and_gradient(function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Return the values of a function, its second result, and the gradient of the sum of the values.

    Args:
        function: Maps `x` to one value per row and any structure of tensors.
        x: The tensor to differentiate with respect to.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        values, auxiliary = function(x)
    return values, auxiliary, tape.gradient(values, x, unconnected_gradients="zero")


def allows_custom_gradient(*tensors: Tensor) -> bool:
    """Return whether `custom_gradient` takes these tensors."""
    return True


def custom_gradient(
    value_and_gradient: Callable[..., tuple[Tensor, Tensor]],
    formula: Callable[..., Tensor],
    x: Tensor,
    *others: Tensor,
) -> Tensor:
    """Compute one value per row of `x` with a gradient that is computed together with the values.

    All other derivatives, of higher orders and with respect to the other tensors, are those of the formula.

    Args:
        value_and_gradient: Maps `(x, *others)` to values `(rows,)` and their gradient, of the shape of `x`.
        formula: Maps `(x, *others)` to the values, computed in the usual way.
        x: Shape `(rows, columns)`.
        *others: The other arguments.

    Returns:
        Shape `(rows,)`.
    """

    @tf.custom_gradient
    def of_x(x: Tensor) -> Any:
        # TensorFlow must not look into it for a derivative: some operations that XLA compiles have none there.
        values, gradient = value_and_gradient(*map(tf.stop_gradient, (x, *others)))

        @tf.custom_gradient
        def scaled(upstream: Tensor, *arguments: Tensor) -> Any:
            return gradient * upstream[:, None], lambda vector: _gradient_of_gradient(
                formula, vector, upstream, arguments
            )

        return values, lambda upstream: scaled(upstream, x, *others)

    # Zero, and apart: its gradient is computed only where a tape watches one of these tensors.
    @tf.custom_gradient
    def of_others(*others: Tensor) -> Any:
        def backward(upstream: Tensor) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([other for other in others if other.dtype.is_floating])
                total = tf.reduce_sum(upstream * formula(x, *others))
            return tape.gradient(total, others, unconnected_gradients="zero")

        return tf.zeros(tf.shape(x)[:1], x.dtype), backward

    return of_x(x) + of_others(*others)


def _gradient_of_gradient(
    formula: Callable[..., Tensor], vector: Tensor, upstream: Tensor, arguments: tuple[Tensor, ...]
) -> list[Tensor]:
    """Return the gradient of `vector` times the gradient of a formula, scaled by `upstream`."""
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        outer.watch([upstream, *(value for value in arguments if value.dtype.is_floating)])
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(arguments[0])
            total = tf.reduce_sum(upstream * formula(*arguments))
        product = tf.reduce_sum(vector * inner.gradient(total, arguments[0]))
    gradients: list[Tensor] = outer.gradient(product, [upstream, *arguments], unconnected_gradients="zero")
    return gradients


def custom_vjp(
    forward: Callable[..., tuple[Tensor, Any]],
    backward: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
) -> Tensor:
    """Compute values whose gradient another program computes from statistics of the first program.

    Args:
        forward: Maps `(*inputs, *constants)` to values `(rows,)` and a tuple of statistics.
        backward: Maps `(*inputs, *constants, statistics, upstream)` to the gradients of the inputs.
        inputs: Tensors to differentiate with respect to.
        constants: Tensors that need no gradient.

    Returns:
        Shape `(rows,)`.
    """

    @tf.custom_gradient
    def differentiable(*inputs: Tensor) -> Any:
        values, statistics = forward(*map(tf.stop_gradient, (*inputs, *constants)))
        return values, lambda upstream: backward(*inputs, *constants, statistics, upstream)

    # The gradient reaches a variable through the tensor of its value.
    return differentiable(*map(tf.convert_to_tensor, inputs))


def save_native_state(model: keras.Model) -> Callable[[], None]:
    """Return a function that restores the backend's own variables in a model, which Keras does not list."""
    variables = [found for layer in model._flatten_layers() for found in _native_variables(list(vars(layer).values()))]
    values = [tf.identity(variable) for variable in variables]

    def restore() -> None:
        for variable, value in zip(variables, values, strict=True):
            if not tf.reduce_all(variable == value):
                variable.assign(value)

    return restore


def _native_variables(value: Any) -> list[tf.Variable]:
    """Return the variables of TensorFlow that an attribute of a layer holds."""
    if isinstance(value, tf.Variable):
        return [value]
    if isinstance(value, tf.random.Generator):
        return [value.state]
    if isinstance(value, tf.Module):
        return list(value.variables)
    if isinstance(value, list | tuple | dict):
        items = value.values() if isinstance(value, dict) else value
        return [found for item in items for found in _native_variables(item)]
    return []


def sync_state(model: keras.Model) -> None:
    """Write the values that training has computed into the model's variables; only JAX keeps them elsewhere."""


def input_of_softmax(x: Tensor, axis: int = -1) -> Tensor | None:
    """Return the input of the softmax that made a tensor; None where there is none or it cannot be found.

    Only TensorFlow records it: a graph as an operation, Keras as an attribute, which its sigmoid sets too.

    Args:
        x: Any tensor.
        axis: The axis of the softmax.
    """
    if isinstance(x, keras.KerasTensor):
        return None
    if not tf.is_symbolic_tensor(x):
        logits = getattr(x, "_keras_logits", None)
        return logits if logits is not None and _is_softmax(logits, x, axis) else None
    axis %= len(x.shape)
    if x.op.type == "Softmax":
        return x.op.inputs[0] if axis == len(x.shape) - 1 else None
    return getattr(x, "_keras_logits", None) if axis == _axis_of_transposed_softmax(x.op) else None


def _axis_of_transposed_softmax(operation: Any) -> int | None:
    """Return the axis of a softmax over another axis than the last one, which TensorFlow moves there and back."""
    if operation.type != "Transpose" or operation.inputs[0].op.type != "Softmax":
        return None
    # The axes are in the order `[*range(axis), last, *range(axis + 1, last), axis]`.
    order = operation.inputs[1].op
    before = order.inputs[0].op if order.type == "ConcatV2" else order
    axis = tf.get_static_value(before.inputs[1]) if before.type == "Range" else None
    return None if axis is None else int(axis)


def _is_softmax(logits: Tensor, outputs: Tensor, axis: int) -> bool:
    """Return whether values are the softmax of logits, and not their sigmoid.

    The first row decides, unless softmax and sigmoid are equal there.
    """
    across = 1 if axis % len(outputs.shape) == 0 else 0
    for count in (1, None):
        rows = (slice(None),) * across + (slice(count),)
        given, z = (np.asarray(tf.cast(x[rows], "float64")) for x in (outputs, logits))
        with np.errstate(all="ignore"):
            exp_z = np.exp(z - z.max(axis, keepdims=True, initial=-np.inf))
            softmax, sigmoid = exp_z / exp_z.sum(axis, keepdims=True), 1 / (1 + np.exp(-z))
        half = outputs.dtype.size < 4
        close = partial(np.allclose, given, rtol=0.1 if half else 1e-3, atol=1e-4 if half else 1e-37, equal_nan=True)
        if not close(softmax):
            return False
        if not close(sigmoid):
            return True
    # Where the two are equal, so are the results, unless values of 0 hide logits that differ.
    return not given.size or bool(np.any(given == 0))


def logits_behind(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function that returns probabilities return logits: values whose softmax they are.

    The function is called as it is: nothing in it is changed, so other threads may call it at the same time.

    Args:
        function: Maps a tensor to a tensor `(batch, C)`. It ends with a softmax over the last axis, or with an average
            or other operations of `_log_domain.py` on softmaxes.

    Returns:
        A function of the same argument, differentiable where `function` is. It can be called in a program. It returns
        the input of the softmax where that is the last operation, and log-probabilities where others follow. It raises
        `LookupError` if no softmax is found.
    """

    def logits(x: Tensor) -> Tensor:
        return logits_of(function(x), _describe)

    program = tf.function(logits, autograph=False)

    def call(x: Tensor) -> Tensor:
        if tf.inside_function():
            return logits(x)
        # Only a graph records which operation made a tensor, also under `tf.config.run_functions_eagerly`.
        traced = program.get_concrete_function(tf.TensorSpec((None, *x.shape[1:]), x.dtype))
        return traced(x)

    return call


def _describe(x: Any) -> Operation | None:
    """Return the operation of a graph that made a tensor, or None where `_log_domain.py` has no rule for it."""
    if not tf.is_symbolic_tensor(x):
        return None
    operation, kind = x.op, x.op.type
    inputs = tuple(operation.inputs)
    if kind in IDENTITIES:
        return Operation("identity", (inputs[x.value_index],))
    if kind in ("PartitionedCall", "StatefulPartitionedCall"):
        return Operation("identity", (_inline(x),))
    if kind in ARITHMETIC:
        return Operation(ARITHMETIC[kind], inputs)
    # Keras adds a batch of one row in this way.
    if kind == "BiasAdd" and (operation.get_attr("data_format") == b"NHWC" or len(x.shape) == 2):
        return Operation("add", inputs)
    if kind in REARRANGEMENTS:
        return Operation("rearrange", *REARRANGEMENTS[kind](operation, x))
    if kind == "Softmax":
        return Operation("softmax", inputs, -1)
    if kind in ("Sum", "Mean"):
        axes = tf.get_static_value(inputs[1])
        axes = None if axes is None else tuple(axes.reshape(-1).tolist())
        return None if axes is None else Operation(kind.lower(), inputs[:1], (axes, operation.get_attr("keep_dims")))
    if kind == "Einsum":
        return Operation("contract", inputs, operation.get_attr("equation").decode())
    if kind in ("MatMul", "BatchMatMulV2"):
        names = ("transpose_a", "transpose_b") if kind == "MatMul" else ("adj_x", "adj_y")
        transpose, transpose_other = map(operation.get_attr, names)
        ranks = [len(value.shape) for value in inputs]
        return Operation(
            "contract", inputs, matmul_equation(*ranks, transpose=transpose, transpose_other=transpose_other)
        )
    return None


def _inline(x: Any) -> Tensor:
    """Return the result of a call of a `tf.function`, computed by its operations instead of the call."""
    call = x.op
    body = call.graph._get_function(call.get_attr("f").name).graph
    inputs = {inner.name: outer for inner, outer in zip(body.inputs, call.inputs, strict=True)}
    output: Tensor
    (output,) = tf.graph_util.import_graph_def(body.as_graph_def(), inputs, [body.outputs[x.value_index].name])
    return output


# Operations that return their input, perhaps in another dtype.
IDENTITIES = ("Cast", "Identity", "IdentityN", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape")

ARITHMETIC = {
    "Exp": "exp",
    "Sigmoid": "sigmoid",
    "Add": "add",
    "AddV2": "add",
    "AddN": "add",
    "Sub": "subtract",
    "Mul": "multiply",
    "RealDiv": "divide",
}

# Each maps an operation and its result to the inputs that hold elements, and a function of these that moves them.
REARRANGEMENTS: dict[str, Callable[[Any, Tensor], tuple[tuple[Tensor, ...], Callable[..., Tensor]]]] = {
    **dict.fromkeys(
        ("Reshape", "ExpandDims", "Squeeze"),
        lambda op, result: (tuple(op.inputs)[:1], lambda log: tf.reshape(log, tf.shape(result))),
    ),
    "BroadcastTo": lambda op, result: (tuple(op.inputs)[:1], lambda log: tf.broadcast_to(log, op.inputs[1])),
    "Tile": lambda op, result: (tuple(op.inputs)[:1], lambda log: tf.tile(log, op.inputs[1])),
    "Transpose": lambda op, result: (tuple(op.inputs)[:1], lambda log: tf.transpose(log, op.inputs[1])),
    "Pack": lambda op, result: (tuple(op.inputs), lambda *logs: tf.stack(logs, op.get_attr("axis"))),
    "ConcatV2": lambda op, result: (tuple(op.inputs)[:-1], lambda *logs: tf.concat(logs, op.inputs[-1])),
    "Unpack": lambda op, result: (
        tuple(op.inputs),
        lambda log: tf.unstack(log, op.get_attr("num"), op.get_attr("axis"))[result.value_index],
    ),
    "StridedSlice": lambda op, result: (tuple(op.inputs)[:1], partial(_strided_slice, op)),
    "Slice": lambda op, result: (tuple(op.inputs)[:1], lambda log: tf.slice(log, *op.inputs[1:])),
    "Split": lambda op, result: (
        tuple(op.inputs)[1:],
        lambda log: tf.split(log, op.get_attr("num_split"), op.inputs[0])[result.value_index],
    ),
    "GatherV2": lambda op, result: (
        tuple(op.inputs)[:1],
        lambda log: tf.gather(log, op.inputs[1], axis=op.inputs[2], batch_dims=op.get_attr("batch_dims")),
    ),
}


def _strided_slice(operation: Any, log: Tensor) -> Tensor:
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    return tf.strided_slice(log, *operation.inputs[1:], **{name: operation.get_attr(name) for name in masks})
