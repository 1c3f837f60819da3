"""A second opinion on the attacks from another library. Slow: `make test-slow` runs it."""

import json

import pytest

from tests.backends import on_tensorflow
from tests.helpers import run_module


@pytest.mark.slow
@on_tensorflow
def test_the_standard_suite_is_as_strong_as_autoattack(tmp_path):
    pytest.importorskip("torchattacks")
    run_module("benchmarks.second_opinion", "--out", tmp_path, timeout=3600)
    record = json.loads((tmp_path / "second_opinion_tensorflow_cpu.json").read_text())
    assert [row["model"] for row in record["rows"]] == ["ce", "drs", "adversarial"]
    for row in record["rows"]:
        assert 100 * (row["ours"] - row["autoattack"]) <= 0.5, row
    # Models of no or full robustness could not tell two suites apart.
    assert 0.4 < record["rows"][2]["ours"] < 0.95
