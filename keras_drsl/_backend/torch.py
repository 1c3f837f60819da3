"""Define the functions of `_backend` for PyTorch. `tensorflow.py` explains them."""

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from keras_drsl._backend._common import repeat_random as repeat_random
from keras_drsl._backend._common import step_by_step
from keras_drsl._backend._log_domain import Operation, axes_of, logits_of, matmul_equation, product_equation
from keras_drsl._typing import Array, Tensor

NAME = "torch"
HAS_XLA = False
LOGITS_PER_CORE = 2**18, 2**18
READS_WEIGHTS_EACH_CALL = True
GATHERS_TRUE_LOGITS = True


def concrete_value(x: Tensor) -> Array | None:
    """Return the values of a tensor, or None where they cannot be seen."""
    return keras.ops.convert_to_numpy(x) if _holds_values(x) else None


def _holds_values(x: Tensor) -> bool:
    # Other classes, such as fake tensors, have no values or have them elsewhere.
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or x.is_meta:
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # under a transformation of `torch.func`
        return False
    return True


def allows_custom_gradient(*tensors: Tensor) -> bool:
    """Return whether `custom_gradient` takes these tensors: they have values, and no derivative in forward mode."""
    return all(_holds_values(x) and forward_ad.unpack_dual(x).tangent is None for x in tensors)


def is_compiling() -> bool:
    """Return whether a program is being traced that keeps the present values of Python variables."""
    return bool(torch.compiler.is_compiling())


def is_dense(x: Any) -> bool:
    """Return whether a tensor holds one value per index."""
    return not (isinstance(x, torch.Tensor) and (x.is_nested or x.layout != torch.strided))


def warn_if_constant(variable: Any) -> None:
    """Do nothing: variables are read again."""


def stop_program(condition: Tensor, message: str) -> None:
    """Do nothing: values that PyTorch does not show cannot stop a program."""


def max_of_classes(x: Tensor) -> Tensor:
    """Return the maximum over the last axis. Keras's refuses an empty batch."""
    return keras.ops.max(x, axis=-1, keepdims=True) if isinstance(x, keras.KerasTensor) else torch.amax(x, -1, True)


def get_mask(x: Tensor) -> Tensor | None:
    """Return the Keras mask of a tensor, or None."""
    return getattr(x, "_keras_mask", None)


def set_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return the tensor with a Keras mask."""
    x._keras_mask = mask
    return x


def cpu_cores() -> int | None:
    """Return how many processor cores compute tensors that are not on a graphics card."""
    return int(torch.get_num_threads())


def device_name() -> str:
    """Return the name of the graphics card, or "cpu"."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def jit(program: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
    """Compile a program with XLA, which PyTorch does not have."""
    raise NotImplementedError("`jit` needs TensorFlow or JAX.")


def pad_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors: nothing is compiled for a number of rows."""
    return tensors


def compile_function(
    function: Callable[..., Any],
    variables: list[Any],
    compiled: Callable[[float], None],
    *,
    free_axes: Callable[[int], int] = lambda index: 1,
) -> Callable[..., Any]:
    """Run a function eagerly and without gradients to its inputs."""

    def without_gradient(*arguments: Any) -> Any:
        with torch.no_grad():
            return function(*keras.tree.map_structure(keras.ops.convert_to_tensor, arguments))

    return without_gradient


def multi_step(
    step: Callable[..., dict[str, Tensor]], variables: list[Any], compiled: Callable[[float], None]
) -> Callable[..., dict[str, Tensor]]:
    """Make a program of several steps per call."""
    return step_by_step(compile_function(step, variables, compiled))


def fori_loop(step: Callable[[Tensor], Tensor], times: int, x: Tensor, variables: list[Any]) -> Tensor:
    """Repeat a step within a program."""
    return keras.ops.fori_loop(0, times, lambda _, x: step(x), x)


def replica_id() -> Tensor | int:
    """Return 0, as there are no replicas of `tf.distribute`."""
    return 0


def per_replica_value(x: Any) -> Any:
    """Return anything unchanged."""
    return x


def bucket_size(rows: int) -> int:
    """Return how many rows a call should have to hold `rows`."""
    return rows


def value_and_gradient(function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Return the values of a function, its second result, and the gradient of the sum of the values."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values, auxiliary = function(x)
        total = values.sum()
        if total.requires_grad:
            gradient = torch.autograd.grad(total, x, allow_unused=True, materialize_grads=True)[0]
        else:  # nothing in the function can be differentiated
            gradient = torch.zeros_like(x)
    values, auxiliary = keras.tree.map_structure(lambda tensor: tensor.detach(), (values, auxiliary))
    return values, auxiliary, gradient


def custom_gradient(
    value_and_gradient: Callable[..., tuple[Tensor, Tensor]],
    formula: Callable[..., Tensor],
    x: Tensor,
    *others: Tensor,
) -> Tensor:
    """Compute one value per row of `x` with a gradient that is computed together with the values."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))):
        return formula(x, *others)
    values: Tensor = _CustomGradient.apply(value_and_gradient, formula, x, *others)
    return values


class _CustomGradient(torch.autograd.Function):
    """Hold values whose gradient with respect to the first tensor is known. Other derivatives are the formula's."""

    @staticmethod
    def forward(ctx: Any, value_and_gradient: Any, formula: Any, *tensors: Tensor) -> Tensor:
        values, gradient = value_and_gradient(*tensors)
        ctx.formula = formula
        ctx.save_for_backward(gradient, *tensors)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        create_graph = torch.is_grad_enabled()
        if not create_graph and not any(needed[1:]):
            return None, None, gradient * upstream[:, None], *[None] * len(needed[1:])
        inputs = [x for x, is_needed in zip(tensors, needed, strict=True) if is_needed]
        with torch.enable_grad():
            values = ctx.formula(*tensors)
            found = iter(torch.autograd.grad(values, inputs, upstream, create_graph=create_graph, allow_unused=True))
        return None, None, *(next(found) if is_needed else None for is_needed in needed)


def custom_vjp(
    forward: Callable[..., tuple[Tensor, Any]],
    backward: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
) -> Tensor:
    """Compute values whose gradient another program computes. Only programs of `jit` need it."""
    raise NotImplementedError("`custom_vjp` needs TensorFlow or JAX.")


def save_native_state(model: keras.Model) -> Callable[[], None]:
    """Return a function that restores the buffers of torch modules in a model."""
    buffers = list(model.buffers())
    values = [buffer.clone() for buffer in buffers]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    return restore


def sync_state(model: keras.Model) -> None:
    """Do nothing: variables are current at all times."""


def input_of_softmax(x: Tensor, axis: int = -1) -> Tensor | None:
    """Return None: a tensor does not record the operation that made it."""
    return None


def logits_behind(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function that returns probabilities return logits."""

    def logits(x: Tensor) -> Tensor:
        with _RecordOperations() as record:
            outputs = function(x)
        return logits_of(outputs, record.describe)

    return logits


class _RecordOperations(TorchFunctionMode):
    """Record the softmaxes and exponentials that this thread computes, and the operations on their results."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors are kept beside their operations, as ids of freed objects are used again.
        self._recorded: dict[int, tuple[Tensor, Operation]] = {}

    def describe(self, x: Any) -> Operation | None:
        """Return the operation that made a tensor, or None where `_log_domain.py` has no rule for it."""
        return self._recorded[id(x)][1] if id(x) in self._recorded else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [id(value) for value in keras.tree.flatten((args, kwargs))]
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property such as `x.T`
            name = func.__self__.__name__
        if name == "__setitem__":
            self._forget(args[0])
        known = name in SOURCES or any(value in self._recorded for value in inputs)
        for index, result in enumerate(output if isinstance(output, tuple) else [output]):
            if not known or not isinstance(result, torch.Tensor):
                continue
            if id(result) not in inputs:
                operation = _operation(name, args, kwargs, index if isinstance(output, tuple) else None)
                if operation is not None:
                    self._recorded[id(result)] = result, operation
            elif name not in IDENTITIES:  # an operation in place
                self._forget(result)
        return output

    def _forget(self, written: Tensor) -> None:
        """Forget all operations if one of their results is written to, perhaps through a view."""
        if any(_base(written) is _base(x) for x, _ in self._recorded.values()):
            self._recorded.clear()


def _base(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _operation(name: str, args: Any, kwargs: Any, index: int | None) -> Operation | None:
    """Return the description of a call of a torch function, or None where `_log_domain.py` has no rule for it."""
    x = args[0] if args else kwargs.get("input", kwargs.get("tensors"))
    if name in IDENTITIES:
        return Operation("identity", (x,))
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None:
        return None
    if name in SOURCES:
        axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        return Operation(SOURCES[name], (x,), axis)
    if name in ARITHMETIC:
        inputs = (x, args[1] if len(args) > 1 else kwargs.get("other"))
        return Operation(ARITHMETIC[name], inputs[::-1] if name in REVERSED else inputs)
    if name in ("sum", "mean"):
        axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        keepdims = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        return Operation(name, (x,), (axes_of(axis, x.ndim), keepdims))
    if name in ("stack", "cat", "concat", "concatenate"):
        axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        join = torch.stack if name == "stack" else torch.cat
        return Operation("rearrange", tuple(x), lambda *logs: join(logs, axis))
    if name in REARRANGEMENTS:
        options = {key: value for key, value in kwargs.items() if key != "input"}

        def move(log: Tensor) -> Any:  # the same call on the logarithms
            method = getattr(log, name)
            return method(*args[1:], **options) if callable(method) else method

        return Operation("rearrange", (x,), move if index is None else lambda log: move(log)[index])
    if name == "einsum" and len(args) == 3 and "." not in args[0] and "->" in args[0]:
        return Operation("contract", args[1:], args[0])
    if name in ("matmul", "__matmul__", "mm", "bmm", "tensordot"):
        inputs = (x, args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2")))
        ranks = [value.ndim for value in inputs]
        if name != "tensordot":
            return Operation("contract", inputs, matmul_equation(*ranks))
        dims = kwargs.get("dims", args[2] if len(args) > 2 else 2)
        dims = (range(ranks[0] - dims, ranks[0]), range(dims)) if isinstance(dims, int) else dims
        axes = [[int(axis) % rank for axis in some] for some, rank in zip(dims, ranks, strict=True)]
        return Operation("contract", inputs, product_equation(ranks, axes))
    return None


# What recording starts with. The first three have an axis.
SOURCES = {"softmax": "softmax", "exp": "exp", "sigmoid": "sigmoid"}

# Methods that return their tensor, perhaps in another dtype or layout.
IDENTITIES = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous", "detach"),
    *("requires_grad_", "cpu", "cuda"),
)

ARITHMETIC = {
    **dict.fromkeys(("add", "__add__", "__radd__"), "add"),
    **dict.fromkeys(("sub", "subtract", "rsub", "__sub__", "__rsub__"), "subtract"),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), "multiply"),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__rtruediv__", "__rdiv__"), "divide"),
}
REVERSED = ("rsub", "__rsub__", "__rtruediv__", "__rdiv__")

REARRANGEMENTS = (
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "movedim"),
    *(
        "broadcast_to",
        "swapaxes",
        "unbind",
        "split",
        "chunk",
        "__getitem__",
        "select",
        "narrow",
        "index_select",
        "tile",
    ),
    *("t", "T", "mT", "moveaxis", "flip", "repeat"),
)
