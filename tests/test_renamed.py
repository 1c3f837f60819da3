"""Old names are refused with an error that names the new one."""

import importlib

import pytest

import keras_drsl
from keras_drsl._renamed import RENAMED
from tests.linear import linear_model


@pytest.mark.parametrize(("old", "new"), RENAMED["import"].items())
def test_an_old_import_path_names_the_new_one(old, new):
    with pytest.raises(ImportError, match=f"`{old}` was moved to `{new}`"):
        importlib.import_module(old)
    package, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=f"`{old}` was moved to `{new}`"):
        exec(f"from {package} import {name}")
    module, _, name = new.rpartition(".")
    assert hasattr(importlib.import_module(module), name) or importlib.import_module(new)


def test_an_old_method_names_the_new_one():
    with pytest.raises(ValueError, match="`method='noise'` was renamed to 'consistency'. Received: method='noise'"):
        keras_drsl.AdversarialTraining(linear_model(), 0.1, method="noise")


def test_new_names_are_no_old_names():
    for kind, names in RENAMED.items():
        assert not set(names) & set(names.values()), kind
