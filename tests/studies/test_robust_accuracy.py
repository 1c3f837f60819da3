import argparse
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import keras_drsl
from studies import recipes, robust_accuracy, runner
from tests.backends import BACKEND
from tests.helpers import some_short

RESULTS = Path(__file__).parents[2] / "results"

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="the study is for TensorFlow and JAX")


def fake_run(job, study, data, path, args):
    """Append a record with verdicts drawn at random, in place of training and evaluation."""
    print(job)
    rng = np.random.default_rng(zlib.crc32(repr(job).encode()))
    withstood = "".join("1" if value < 0.6 else "0" for value in rng.random(32))
    record = {
        "clean": 0.9,
        "robust": withstood.count("1") / 32,
        "after": {"fgsm_ce": 0.7},
        "images": 32,
        "withstood": withstood,
        "warnings": [],
        "evaluation": {"max_samples": study["images"]},
        "recipe": study["recipe"],
    }
    runner.append_record(path, job | record)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a quick study without training, and return its folder."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("robust_accuracy")
    robust_accuracy.main(["--quick", "--backend", BACKEND, "--out", str(folder)], run=fake_run)
    return folder


def read(folder):
    path = folder / "robust_accuracy_digits_quick.jsonl"
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def test_records_hold_choices_and_tests(study):
    _, records = read(study)
    test = [record for record in records if record["split"] == "test"]
    validated = {
        record["lam"]: record["robust"]
        for record in records
        if record["split"] == "validation" and record["loss"] == "drs"
    }
    assert {(record["method"], record["loss"]) for record in test} >= {("pgd", "ce"), ("pgd", "ls"), ("pgd", "drs")}
    assert all(record["robust"] == record["withstood"].count("1") / record["images"] for record in records)
    assert {record["lam"] for record in test if record["loss"] == "drs"} <= set(validated)


def test_the_table_has_differences_with_intervals(study):
    path, records = read(study)
    robust = {
        loss: [
            record["robust"]
            for record in records
            if (record["split"], record["method"], record["loss"]) == ("test", "pgd", loss)
        ]
        for loss in ("ls", "ce")
    }
    gains = [100 * (mine - other) for mine, other in zip(robust["ls"], robust["ce"], strict=True)]
    # 12.706 is Student's t for one degree of freedom.
    mean, half = sum(gains) / 2, 12.706 * abs(gains[0] - gains[1]) / 2
    assert f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})" in path.with_suffix(".md").read_text()


def test_a_study_killed_while_writing_continues(study, tmp_path, capsys):
    shutil.copytree(study, tmp_path, dirs_exist_ok=True)
    path, records = read(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:50])
    capsys.readouterr()
    robust_accuracy.main(["--quick", "--backend", BACKEND, "--out", str(tmp_path)], run=fake_run)
    assert capsys.readouterr().out.count("'split'") == 1
    again = path.read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-1]
    assert json.loads(again[-1])["withstood"] == records[-1]["withstood"]


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
def test_published_runs_are_found_and_tabled_again(dataset, tmp_path, capsys, monkeypatch):
    pytest.importorskip("scipy")
    for ending in ("jsonl", "md"):
        shutil.copy(RESULTS / f"robust_accuracy_{dataset}.{ending}", tmp_path)
    # No data set is needed, as nothing is trained.
    monkeypatch.setattr("keras_drsl.datasets.load", lambda *arguments: ((None, None), (None, None)))
    arguments = ["--dataset", dataset, "--backend", BACKEND, "--out", str(tmp_path)]
    robust_accuracy.main(arguments, run=lambda job, *arguments: pytest.fail(f"trained {job}"))
    before = table(RESULTS / f"robust_accuracy_{dataset}.md")
    assert table(tmp_path / f"robust_accuracy_{dataset}.md") == before
    assert len(before) > 2


def table(path):
    """Return the rows of the tables of a file."""
    return [line for line in path.read_text().splitlines() if line.startswith("|")]


@pytest.mark.parametrize("method", some_short(["pgd_loss", "trades_attacked"], more=["trades_attacked"]))
def test_a_job_is_trained_evaluated_and_recorded(method, tmp_path):
    pytest.importorskip("sklearn")
    study = robust_accuracy.quick(robust_accuracy.STUDIES["digits"] | {"recipe": recipes.ADVERSARIAL["digits"]})
    data = tuple((x[:128], y[:128]) for x, y in keras_drsl.datasets.load("digits"))
    args = argparse.Namespace(dataset="digits", backend=BACKEND, device="cpu", device_name="cpu", quick=True)
    path = tmp_path / "runs.jsonl"
    (tmp_path / "models").mkdir()
    job = robust_accuracy.make_job("test", method, "drs", 0.1, 0)
    robust_accuracy.run_job(job, study, data, path, args)
    (record,) = runner.read_records(path)
    assert runner.find(job, [record]) is record
    assert record["robust"] == record["withstood"].count("1") / record["images"] <= record["clean"]
    assert record["images"] == 32
    assert len(record["history"]["loss"]) == 1
    assert len(list((tmp_path / "models").iterdir())) == 1  # the model of a test is kept


@pytest.mark.slow
def test_a_quick_study_trains_all_jobs(tmp_path):
    robust_accuracy.main(["--quick", "--backend", BACKEND, "--out", str(tmp_path)])
    assert (tmp_path / "robust_accuracy_digits_quick.md").exists()
