"""The names, arguments and defaults of all public functions and classes are those of a file.

A difference is a change for users: if it is meant, change the file as well, and tell of it in CHANGELOG.md.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import keras
import pytest

import keras_drsl

SIGNATURES = Path(__file__).parent / "fixtures" / "signatures.txt"


def public():
    """Return the public functions, classes and methods by name, each once: all that a public module lists."""
    names = [module.name for module in pkgutil.iter_modules(keras_drsl.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"keras_drsl.{name}") for name in names]
    found = {}
    for module in (keras_drsl, *(module for module in modules if hasattr(module, "__all__"))):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if callable(value) and value not in found.values():
                found[f"{module.__name__}.{name}"] = value
    for name, value in list(found.items()):
        if inspect.isclass(value):
            members = [key for key in vars(value) if not key.startswith("_") and is_method(value, key)]
            found |= {f"{name}.{key}": getattr(value, key) for key in members}
    return found


def is_method(cls, key):
    # Python takes a cached property for a routine, although it cannot be called.
    value = getattr(cls, key)
    return inspect.isroutine(value) and callable(value)


def describe(function):
    """Return the arguments of a function with their defaults, without types."""
    signature = inspect.signature(function)
    arguments = [argument.replace(annotation=argument.empty) for argument in signature.parameters.values()]
    text = str(signature.replace(parameters=arguments, return_annotation=signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def test_signatures_are_those_of_the_file():
    lines = [f"{name}{describe(value)}" for name, value in public().items()]
    assert lines == SIGNATURES.read_text().splitlines()


def is_loss_or_metric(value):
    return inspect.isclass(value) and issubclass(value, keras.losses.Loss | keras.metrics.Metric)


CLASSES = [name for name in keras_drsl.__all__ if is_loss_or_metric(getattr(keras_drsl, name))]


@pytest.mark.parametrize("name", [*CLASSES, "drs_loss", "prs_loss", "softmax_diversity"])
def test_losses_and_metrics_are_registered_with_keras(name):
    assert keras.saving.get_registered_object(f"keras_drsl>{name}") is getattr(keras_drsl, name)
