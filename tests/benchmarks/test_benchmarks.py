"""The benchmarks run in processes of their own: each sets its backend before Keras is imported."""

import json
from pathlib import Path

import pytest

from tests.backends import BACKEND
from tests.helpers import run_module

ROOT = Path(__file__).parents[2]
BENCHMARKS = [
    "attack_speed",
    "loss_speed",
    "step_overhead",
    "linear_head",
    "many_classes",
    "hundred_classes",
    "distances",
    "fast_suite",
    "first_call",
    "method_steps",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_writes_its_record(name, tmp_path):
    if BACKEND == "torch" and name == "linear_head":
        pytest.skip("linear_drs_loss is for TensorFlow and JAX")
    done = run_module(f"benchmarks.{name}", "--quick", "--backend", BACKEND, "--out", tmp_path)
    record = json.loads((tmp_path / f"{name}_{BACKEND}_cpu.json").read_text())
    assert record["command"] == f"python -m benchmarks.{name} --backend {BACKEND} --device cpu --quick"
    assert record["versions"]["keras"]
    assert record["rows"]
    for target in record["targets"]:
        assert target["met"] == (target["value"] <= target["target"])
        assert f"{target['value']:.3f}" in done.stdout


@pytest.mark.slow
def test_the_family_of_losses_has_a_record_of_its_own(tmp_path):
    run_module("benchmarks.loss_speed", "--quick", "--family", "--backend", BACKEND, "--out", tmp_path)
    record = json.loads((tmp_path / f"loss_family_{BACKEND}_cpu.json").read_text())
    assert record["command"] == f"python -m benchmarks.loss_speed --backend {BACKEND} --device cpu --family --quick"
    assert {"DRSLoss, softmax space", "p: DRSLoss", "ZLoss"} <= {
        name.removesuffix("_xla") for name in record["rows"][0]["seconds"]
    }


def test_a_missing_device_is_named():
    done = run_module("benchmarks.loss_speed", "--quick", "--backend", BACKEND, "--device", "gpu", check=False)
    if done.returncode == 0:
        pytest.skip("a GPU is there")
    assert done.returncode == 2
    assert f"--backend {BACKEND} --device gpu is not available" in done.stderr


def test_benchmarks_and_studies_leave_sys_path_alone():
    for folder in ("benchmarks", "studies", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            assert "sys.path" not in path.read_text(), path
