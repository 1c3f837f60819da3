"""Provide the functions that differ between TensorFlow, JAX and PyTorch.

`tensorflow.py`, `jax.py` and `torch.py` define the same functions. The docstrings in `tensorflow.py` explain them. No
other module of the package asks which backend runs.
"""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from keras_drsl._backend import tensorflow as _running
else:
    if keras.config.backend() not in ("tensorflow", "jax", "torch"):
        raise ImportError(
            "keras_drsl needs `KERAS_BACKEND` to be 'tensorflow', 'jax' or 'torch'. "
            f"Received: KERAS_BACKEND={keras.config.backend()!r}"
        )
    _running = importlib.import_module(f"{__name__}.{keras.config.backend()}")

NAME = _running.NAME
GATHERS_TRUE_LOGITS = _running.GATHERS_TRUE_LOGITS
HAS_XLA = _running.HAS_XLA
LOGITS_PER_CORE = _running.LOGITS_PER_CORE
READS_WEIGHTS_EACH_CALL = _running.READS_WEIGHTS_EACH_CALL

allows_custom_gradient = _running.allows_custom_gradient
bucket_size = _running.bucket_size
compile_function = _running.compile_function
concrete_value = _running.concrete_value
cpu_cores = _running.cpu_cores
custom_gradient = _running.custom_gradient
custom_vjp = _running.custom_vjp
device_name = _running.device_name
fori_loop = _running.fori_loop
get_mask = _running.get_mask
input_of_softmax = _running.input_of_softmax
is_compiling = _running.is_compiling
is_dense = _running.is_dense
jit = _running.jit
logits_behind = _running.logits_behind
max_of_classes = _running.max_of_classes
multi_step = _running.multi_step
pad_rows = _running.pad_rows
per_replica_value = _running.per_replica_value
repeat_random = _running.repeat_random
replica_id = _running.replica_id
save_native_state = _running.save_native_state
set_mask = _running.set_mask
stop_program = _running.stop_program
sync_state = _running.sync_state
value_and_gradient = _running.value_and_gradient
warn_if_constant = _running.warn_if_constant


def leave_gpus_alone(tensorflow: Any) -> None:
    """Keep TensorFlow from taking the memory of the GPUs where another backend runs, if it has not begun yet."""
    if NAME != "tensorflow":
        with contextlib.suppress(RuntimeError):
            tensorflow.config.set_visible_devices([], "GPU")


def require_tensorflow(feature: str) -> None:
    """Raise `RuntimeError` on JAX and PyTorch, where a feature does not exist."""
    if NAME != "tensorflow":
        raise RuntimeError(f"{feature} needs `KERAS_BACKEND=tensorflow`. Received: KERAS_BACKEND={NAME}")
