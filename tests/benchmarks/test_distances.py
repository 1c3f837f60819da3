"""Distances beside the suite "standard" and another library. Slow: `make test-slow` runs them."""

import json

import pytest

from tests.backends import on_tensorflow
from tests.helpers import run_module


@pytest.mark.slow
@on_tensorflow
def test_distances_are_as_strong_as_the_curve_and_adv_lib(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("adv_lib")
    run_module("benchmarks.distances", "--out", tmp_path, timeout=3600)
    record = json.loads((tmp_path / "distances_tensorflow_cpu.json").read_text())
    assert len(record["rows"]) == 4
    assert sum("medians" in row for row in record["rows"]) == 2
    for target in record["targets"]:
        # No test asserts a time.
        assert "time" in target["name"] or target["met"], target
