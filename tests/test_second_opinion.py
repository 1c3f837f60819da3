"""A second opinion on the attacks from another library. Slow: `make test-slow` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import on_tensorflow

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "second_opinion.py"


@pytest.mark.slow
@on_tensorflow
def test_the_standard_suite_is_no_weaker_than_autoattack(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path], capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "second_opinion_tensorflow_cpu.json").read_text())
    assert [row["model"] for row in record["rows"]] == ["ce", "drs", "adversarial"]
    for row in record["rows"]:
        assert 100 * (row["ours"] - row["autoattack"]) <= 0.5, row
    # Models of no or full robustness would tell nothing.
    assert 0.4 < record["rows"][2]["ours"] < 0.95
