import json
import shutil
from pathlib import Path

import pytest

from studies import robust_accuracy
from tests.backends import BACKEND

RESULTS = Path(__file__).parents[2] / "results"

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="the study is for TensorFlow and JAX")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a quick study, and return its folder."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("robust_accuracy")
    robust_accuracy.main(["--quick", "--backend", BACKEND, "--out", str(folder)])
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
    robust_accuracy.main(["--quick", "--backend", BACKEND, "--out", str(tmp_path)])
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
    monkeypatch.setattr(robust_accuracy, "run", lambda job, *arguments: pytest.fail(f"trained {job}"))
    robust_accuracy.main(["--dataset", dataset, "--backend", BACKEND, "--out", str(tmp_path)])
    before = table(RESULTS / f"robust_accuracy_{dataset}.md")
    assert table(tmp_path / f"robust_accuracy_{dataset}.md") == before
    assert len(before) > 2


def table(path):
    """Return the rows of the tables of a file."""
    return [line for line in path.read_text().splitlines() if line.startswith("|")]
