"""Define the functions of `_backend` for PyTorch. `tensorflow.py` explains them."""

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch.overrides import TorchFunctionMode

from keras_drsl._backend._common import not_a_softmax, step_by_step
from keras_drsl._typing import Array, Tensor

NAME = "torch"
HAS_XLA = False
READS_WEIGHTS_EACH_CALL = True
GATHERS_TRUE_LOGITS = True

SOFTMAXES = (torch.softmax, torch.special.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)

# Methods that return their tensor, perhaps in another dtype or layout.
CASTS = tuple(
    getattr(torch.Tensor, name)
    for name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous")
)


def concrete_value(x: Tensor) -> Array | None:
    """Return the values of a tensor, or None where they cannot be seen."""
    # Other classes, such as fake tensors, have no values or have them elsewhere.
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or x.is_meta:
        return None
    try:
        values: Array = keras.ops.convert_to_numpy(x)
    except RuntimeError:  # under a transformation of `torch.func`
        return None
    return values


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
    """Return how many processor cores compute a program of `jit`, which PyTorch does not have."""
    raise NotImplementedError("`cpu_cores` needs TensorFlow or JAX.")


def device_name() -> str:
    """Return the name of the graphics card, or "cpu"."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def gather_rows(x: Tensor, columns: Tensor) -> Tensor:
    """Return one element per row."""
    return keras.ops.take_along_axis(x, columns[:, None], axis=1)[:, 0]


def jit(program: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
    """Compile a program with XLA, which PyTorch does not have."""
    raise NotImplementedError("`jit` needs TensorFlow or JAX.")


def pad_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Add rows of zeros. Only programs of `jit` need it."""
    raise NotImplementedError("`pad_rows` needs TensorFlow or JAX.")


def compile_function(
    function: Callable[..., Any], variables: list[Any], *, free_axes: Callable[[int], int] = lambda index: 1
) -> Callable[..., Any]:
    """Run a function eagerly and without gradients to its inputs."""

    def without_gradient(*arguments: Any) -> Any:
        with torch.no_grad():
            return function(*keras.tree.map_structure(keras.ops.convert_to_tensor, arguments))

    return without_gradient


def multi_step(step: Callable[..., dict[str, Tensor]], variables: list[Any]) -> Callable[..., dict[str, Tensor]]:
    """Make a program of several steps per call."""
    return step_by_step(compile_function(step, variables))


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
    hessian_product: Callable[..., Tensor],
    x: Tensor,
    *constants: Tensor,
) -> Tensor:
    """Compute values with a gradient of their own. Only programs of `jit` need it."""
    raise NotImplementedError("`custom_gradient` needs TensorFlow or JAX.")


def custom_vjp(
    forward: Callable[..., tuple[Tensor, Any]],
    backward: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
) -> Tensor:
    """Compute values whose gradient another program computes. Only programs of `jit` need it."""
    raise NotImplementedError("`custom_vjp` needs TensorFlow or JAX.")


def sync_state(model: keras.Model) -> None:
    """Do nothing: variables are current at all times."""


def input_of_softmax(x: Tensor, axis: int = -1) -> Tensor | None:
    """Return None: a tensor does not record the operation that made it."""
    return None


def softmax_input(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function return the input of its last softmax."""

    def logits(x: Tensor) -> Tensor:
        with _RecordSoftmax() as record:
            outputs = function(x)
        if id(outputs) not in record.inputs:
            raise not_a_softmax()
        return record.inputs[id(outputs)][1]

    return logits


class _RecordSoftmax(TorchFunctionMode):
    """Record the input and output of each softmax of shape `(batch, C)` that this thread computes.

    Attributes:
        inputs: Maps the id of an output to the output and the input. The output is kept, as ids of freed objects are
            used again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        source = args[0] if args else kwargs.get("input")
        if func in SOFTMAXES:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if source.ndim == 2 and axis in (-1, 1):
                self.inputs[id(output)] = output, source
        elif func in CASTS and id(source) in self.inputs:
            self.inputs[id(output)] = output, self.inputs[id(source)][1]
        return output
