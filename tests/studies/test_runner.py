import argparse
import json

import numpy as np
import pytest

from studies import records, runner


def test_the_interval_over_images_is_that_of_the_mean():
    pytest.importorskip("scipy")
    runs = [{"seed": 0, "withstood": "1100"}, {"seed": 1, "withstood": "1000"}, {"seed": 2, "withstood": "1111"}]
    base = [{"seed": 1, "withstood": "1000"}, {"seed": 0, "withstood": "1000"}]
    # Image by image 0, 1/2, 0, 0: a standard deviation of 1/4.
    assert runner.half_width_over_images(runs, base) == "+- 24.5"
    assert runner.half_width_over_images(runs, []) == ""


def test_the_difference_is_taken_seed_by_seed():
    stats = pytest.importorskip("scipy.stats")
    runs = [{"seed": seed, "robust": value} for seed, value in enumerate((0.5, 0.6, 0.7))]
    base = [{"seed": seed, "robust": value} for seed, value in ((2, 0.4), (0, 0.3), (1, 0.5))]
    gains = [20.0, 10.0, 30.0]
    low, high = stats.t.interval(0.95, 2, np.mean(gains), stats.sem(gains))
    assert runner.difference(runs, base) == f"+20.0 ({low:+.1f} to {high:+.1f})"
    assert runner.difference(runs[:1], base) == "+20.0"
    assert runner.difference(runs, []) == ""


def test_a_run_without_a_record_is_an_error():
    args, done = argparse.Namespace(worker="1/2"), [{"seed": 0}]
    jobs = [{"seed": seed} for seed in range(4)]
    with pytest.raises(RuntimeError, match="no record of its job {'seed': 1}"):
        runner.run_jobs(args, jobs, lambda: done, lambda job: done.append({"seed": job["seed"] + 100}))


def test_workers_divide_the_jobs():
    done = [{"seed": 0}, {"seed": 2}]
    args, jobs = argparse.Namespace(worker="1/2"), [{"seed": seed} for seed in range(4)]
    assert runner.run_jobs(args, jobs, lambda: done, done.append) == 2
    assert [record["seed"] for record in done] == [0, 2, 1, 3]


def test_records_survive_an_unfinished_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    runner.append_record(path, {"seed": 0})
    path.write_text(path.read_text() + '{"seed": 1, "ro')
    runner.append_record(path, {"seed": 2})
    assert runner.read_records(path) == [{"seed": 0}, {"seed": 2}]


def test_old_names_of_checks_are_replaced(tmp_path):
    path = tmp_path / "runs.jsonl"
    runner.append_record(path, {"warnings": ["budget (warn)", "noise (fail)"]})
    runner.append_record(path, {"warnings": {"0.1": ["control (fail)"]}})
    first, second = runner.read_records(path)
    assert first["warnings"] == ["larger_eps (warn)", "noise (fail)"]
    assert second["warnings"] == {"0.1": ["attack_self_test (fail)"]}


def test_partial_runs_are_kept_until_the_end(tmp_path):
    path, made = tmp_path / "begun.jsonl", []

    def begin(*seeds):
        runs = runner.PartialRuns(path)
        for seed in seeds:
            found = runs.run({"seed": seed}, lambda seed=seed: made.append(seed) or {"clean": seed / 2})
            assert found == {"clean": seed / 2}
        return runs

    begin(1)  # stopped
    begin(2)  # another command, stopped as well
    begin(1, 3).end()
    assert made == [1, 2, 3]
    begin(2).end()
    assert made == [1, 2, 3]
    assert not path.exists()


def test_a_record_has_the_command_that_repeats_it():
    args = argparse.Namespace(eps=[0.1, 8 / 255], max_images=None, data_dir="data", out="runs", plot=True)
    expected = "python -m studies.text --eps 0.1 0.03137254901960784"
    assert records.command("studies.text", args, leave_out=["plot"]) == expected
    assert records.spread([1, 2, 3], digits=2) == "2.00 +- 1.00"
    assert records.spread([1.25]) == "1.2"
    assert json.loads(json.dumps(records.versions()))["keras"]
