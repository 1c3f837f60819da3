import json
import shutil
from pathlib import Path

import pytest

from studies import flat, runner
from tests.backends import BACKEND, on_tensorflow

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.slow
@on_tensorflow
def test_settings_are_chosen_tested_and_tabled(tmp_path):
    pytest.importorskip("sklearn")
    arguments = ["--quick", "--backend", BACKEND, "--out", str(tmp_path)]
    flat.main(arguments)
    path = tmp_path / "flat_digits_quick.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["split"] for record in records} == {"validation", "test", "redrawn"}
    for some in records:
        assert some["withstood"].count("1") / some["images"] == some["robust"] <= some["clean"]
    flat.main(arguments, run=lambda *arguments: pytest.fail("A run was repeated."))
    assert path.with_suffix(".md").read_text().count("| flat | DRSLoss |") == 6


def test_both_losses_have_as_many_settings():
    for study in flat.STUDIES.values():
        for losses in study["settings"].values():
            assert len(losses["ce"]) == len(losses["drs"]) <= 24
            assert min(setting["lam"] for setting in losses["drs"]) >= 0.03


def test_the_best_on_validation_are_tried_again_and_tested():
    study = flat.quick(flat.STUDIES["digits"])
    robust = {("ce", 0): 0.4, ("ce", 1): 0.5, ("drs", 0): 0.7, ("drs", 1): 0.6}
    done = []
    for job in flat.first_choice(study, done):
        number = study["settings"]["flat"][job["loss"]].index(job["setting"])
        done.append(job | {"robust": robust[job["loss"], number]})
    again = flat.second_choice(study, done)
    best = {"ce": {"eps": 0.3}, "drs": {"eps": 0.15, "lam": 0.1}}
    assert {job["loss"]: job["setting"] for job in again} == best
    done += [job | {"robust": 0.5} for job in again]
    assert all(job["setting"] == best[job["loss"]] for job in flat.tests(study, done))
    assert all(best[job["loss"]].items() <= job["setting"].items() for job in flat.variants(study, done))


def test_a_step_of_any_share_makes_the_same_penalty():
    setting = {"eps": 0.3, "noise": 0.3, "beta": 0.3}
    for share in (0.1, 1.0):
        job = flat.make_job("validation", "flat_consistency", "ce", setting | {"step_share": share}, 0)
        method, changes = flat.prepare(job)
        # The difference of the two points grows with the step, so its square with the square of the step.
        assert changes["beta"] * changes["step_size"] ** 2 == pytest.approx(0.3 * 0.3**2)
        assert method.start_radius == 1.0


def test_the_published_runs_are_tabled_again(tmp_path):
    for ending in ("jsonl", "md"):
        shutil.copy(RESULTS / f"flat_digits.{ending}", tmp_path)
    before = (tmp_path / "flat_digits.md").read_text()
    study = flat.STUDIES["digits"]
    splits = [run["split"] for run in runner.read_records(tmp_path / "flat_digits.jsonl")]
    if splits.count("redrawn") < study["splits"]:
        pytest.skip("the study is under way")
    flat.main(["--out", str(tmp_path)], run=lambda *arguments: pytest.fail("A run was repeated."))
    assert (tmp_path / "flat_digits.md").read_text() == before
    assert splits.count("test") == 2 * study["seeds"] * len(study["tested"])
