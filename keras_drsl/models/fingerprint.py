"""A fingerprint that tells models apart."""

import hashlib
import json
from typing import Any

import numpy as np
from keras import ops


def fingerprint(model: Any) -> str:
    """Return the SHA-256 of the weights of a model and, for a Keras model, of its configuration without names.

    Args:
        model: A Keras model or any function. A function without weights is known by the name of its type only.
    """
    digest = hashlib.sha256()
    for weight in getattr(model, "weights", ()):
        values = np.ascontiguousarray(ops.convert_to_numpy(weight))
        digest.update(f"{values.shape} {weight.dtype}".encode())
        digest.update(values.tobytes())
    try:
        config = model.get_config()
    except (AttributeError, NotImplementedError):
        config = type(model).__qualname__
    nameless = _replace_names(config, {})
    digest.update(json.dumps(nameless, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()


def _replace_names(value: Any, names: dict[str, str]) -> Any:
    """Replace the names of layers by numbers: Keras counts layers up in each process."""
    if isinstance(value, dict):
        for key in ("name", "layer_name"):
            if isinstance(value.get(key), str):
                names.setdefault(value[key], f"name {len(names)}")
        return {str(key): _replace_names(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_names(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value
