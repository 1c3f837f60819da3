"""What every test and docstring example finds ready."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each process has a core. Threads of several processes would wait for each other.
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import keras
import numpy as np
import pytest

import keras_drsl
from keras_drsl.evaluation.checks.registry import CHECKS

# Of the three backends, only the modules of the running one can be imported.
collect_ignore_glob = ["keras_drsl/_backend/*", "keras_drsl/losses/fused_torch.py"]


@pytest.fixture(autouse=True)
def seeded(doctest_namespace):
    """Seed all weights, and provide the names that docstring examples use."""
    keras.utils.set_random_seed(0)
    doctest_namespace.update(keras=keras, keras_drsl=keras_drsl, np=np)


@pytest.fixture(autouse=True)
def restored_checks():
    """Take back the checks that a test or docstring example registers, so that no other one sees them."""
    before = dict(CHECKS)
    yield
    CHECKS.clear()
    CHECKS.update(before)


def _fail_if_required(report):
    """Turn a test that was skipped for a missing package into a failure, where REQUIRE_ALL is set."""
    if os.environ.get("REQUIRE_ALL") and report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Look at the outcome of each test."""
    return _fail_if_required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Look at test files that were skipped as a whole."""
    return _fail_if_required((yield))
