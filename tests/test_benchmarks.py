import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import BACKEND

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("name", ["loss_speed", "step_overhead", "linear_head", "attack_speed"])
def test_each_benchmark_runs_small_and_writes_what_it_measured(name, tmp_path):
    if BACKEND == "torch" and name == "linear_head":
        pytest.skip("linear_drs_loss is for TensorFlow and JAX")
    done = run(f"{name}.py", "--quick", "--backend", BACKEND, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / f"{name}_{BACKEND}_cpu.json").read_text())
    assert record["command"] == f"python benchmarks/{name}.py --backend {BACKEND} --device cpu --quick"
    assert record["versions"]["keras"]
    assert record["rows"]
    for target in record["targets"]:
        assert target["met"] == (target["value"] <= target["target"])
        assert f"{target['value']:.3f}" in done.stdout


def test_a_device_that_is_not_there_is_named():
    done = run("loss_speed.py", "--quick", "--backend", BACKEND, "--device", "gpu")
    if done.returncode == 0:
        pytest.skip("a GPU is there")
    assert done.returncode == 2
    assert f"--backend {BACKEND} --device gpu is not at hand" in done.stderr
