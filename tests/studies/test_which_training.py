import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from studies import which_training
from tests.backends import BACKEND, on_tensorflow

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.slow
@on_tensorflow
def test_a_run_of_each_kind_is_recorded_and_tabled(tmp_path):
    pytest.importorskip("sklearn")
    arguments = ["--quick", "--backend", BACKEND, "--out", str(tmp_path)]
    kept = {name: which_training.TRAININGS[name] for name in ("usual", "pgd")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(which_training, "TRAININGS", kept)
        which_training.main(arguments)
        records = [json.loads(line) for line in (tmp_path / "which_training_quick.jsonl").read_text().splitlines()]
        assert [(some["training"], some["row"]) for some in records] == [
            (training, row) for training in kept for row in ("DRSLoss", "cross-entropy")
        ]
        for some in records:
            assert some["withstood"].count("1") / some["images"] == some["robust"] <= some["clean"]
        which_training.main(arguments, run=lambda *arguments: pytest.fail("A run was repeated."))
    assert (tmp_path / "which_training_quick.md").read_text().count("| usual |") == 2


def test_earlier_runs_are_those_of_the_published_table():
    # `results/compare_losses_digits.md` and `results/robust_accuracy_digits.md`.
    published = {
        ("usual", "DRSLoss"): 25.1,
        ("usual", "cross-entropy"): 15.6,
        ("noise", "DRSLoss"): 57.8,
        ("noise", "cross-entropy"): 55.9,
        ("consistency", "DRSLoss"): 63.1,
        ("consistency", "cross-entropy"): 51.7,
        ("pgd", "DRSLoss"): 75.1,
        ("pgd", "cross-entropy"): 70.9,
    }
    for (training, row), percent in published.items():
        found = which_training.earlier(which_training.TRAININGS[training][row])
        assert len(found) == 5
        assert round(100 * np.mean(found), 1) == pytest.approx(percent, abs=0.051)


def test_the_published_runs_are_tabled_again(tmp_path):
    for ending in ("jsonl", "md"):
        shutil.copy(RESULTS / f"which_training.{ending}", tmp_path)
    before = (tmp_path / "which_training.md").read_text()
    which_training.main(["--out", str(tmp_path)], run=lambda *arguments: pytest.fail("A run was repeated."))
    assert (tmp_path / "which_training.md").read_text() == before
