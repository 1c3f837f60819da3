"""What tells models and runs apart."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _backend


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


def provenance(model: Any, data: str) -> dict[str, Any]:
    """Return model, data, versions and device, for a reader who wants to repeat a run.

    Args:
        model: A Keras model or any function.
        data: The digest of the data.
    """
    return {
        "model": fingerprint(model),
        "data": data,
        "versions": {"python": platform.python_version()}
        | package_versions("keras-drsl", "keras", _backend.NAME, "numpy"),
        "backend": _backend.NAME,
        "device": _backend.device_name(),
    }


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages by name, "unknown" for those that were not installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # such as this one, run from a folder
            versions[package] = "unknown"
    return versions


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
