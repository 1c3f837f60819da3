import argparse
import collections
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import keras_drsl
from studies import compare_losses, runner
from studies.compare_losses import STUDIES
from tests.backends import BACKEND

RESULTS = Path(__file__).parents[2] / "results"

on_tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="slower elsewhere, and the same")


def fake_run(job, study, data, path, args):
    """Append a record with verdicts drawn at random, in place of training and evaluation."""
    print(job)
    rng = np.random.default_rng(zlib.crc32(repr(job).encode()))
    in_full = job["seed"] == 0 and job["loss"] in compare_losses.IN_FULL
    robust, attacked, withstood = np.zeros(16, bool), {}, {}
    radii = sorted(study["eps"], reverse=True) if job["split"] == "test" else study["eps"][-1:]
    for eps in radii:
        left = ~robust | in_full
        robust = np.where(left, rng.random(16) < 0.5, robust)
        attacked[f"{eps:g}"] = int(left.sum())
        withstood[f"{eps:g}"] = "".join("1" if value else "0" for value in robust)
    record = {
        **job,
        "attacks": [*compare_losses.ATTACKS],
        "robust": {eps: digits.count("1") / 16 for eps, digits in withstood.items()},
        "attacked": attacked,
        "after": {f"{study['eps'][-1]:g}": {"apgd_ce": 0.5}},
        "withstood": withstood,
        "warnings": {f"{eps:g}": [] for eps in study["eps"]},
        "clean": 0.9,
        "under_noise": 0.8,
        "calibration_error": 0.1,
        "images": 16,
        "study": compare_losses.conditions(study),
    }
    runner.append_record(path, record)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a quick study on digits, and one with redrawn images, without training; return the folder of both."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("compare_losses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_losses, "time_steps", lambda rows, *arguments: {})
        for dataset in ("digits", "digits_redrawn"):
            compare_losses.main(["--quick", "--dataset", dataset, "--out", str(folder)], run=fake_run)
    return folder


@pytest.fixture(scope="module")
def records(study):
    lines = (study / "compare_losses_digits_quick.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tests(records):
    return [record for record in records if record["split"] == "test"]


def key_of(record):
    return record["loss"], record["noise"] > 0


def option_of(record):
    return str(record["setting"]), record["noise"]


@on_tensorflow_only
def test_each_loss_is_tested_without_and_with_noise(tests):
    losses = ("cross_entropy", "Squentropy", "copies")
    expected = {(loss, noisy) for loss in losses for noisy in (False, True)} - {("copies", False)}
    assert {key_of(record) for record in tests} == expected


@on_tensorflow_only
def test_the_best_setting_on_validation_is_tested(records, tests):
    tried = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records:
        if record["split"] == "validation":
            tried[key_of(record)][option_of(record)].append(record["robust"]["0.15"])
    best = {}
    for key, options in tried.items():
        # All settings were tried with one seed, and the best two with a second.
        twice = {option: sum(values) / 2 for option, values in options.items() if len(values) == 2}
        assert len(twice) == min(2, len(options))
        once = [values[0] for option, values in options.items() if option not in twice]
        assert all(values[0] >= max(once, default=0) for option, values in options.items() if option in twice)
        (chosen,) = {option_of(record) for record in tests if key_of(record) == key}
        best[key] = max(twice.values())
        assert twice[chosen] == best[key]
    # Cross-entropy and the best on validation are tested with two seeds, the others with one.
    seeds = collections.Counter(key_of(record) for record in tests)
    more = {key for key, count in seeds.items() if count == 2}
    assert set(seeds.values()) == {1, 2}
    assert {("cross_entropy", False), ("cross_entropy", True)} <= more
    assert len(more) <= 3
    assert max(best.values()) in {best[key] for key in more}


@on_tensorflow_only
def test_images_robust_at_a_large_radius_are_kept(tests):
    for record in tests:
        small, large = (record["withstood"][radius] for radius in ("0.1", "0.15"))
        in_full = record["seed"] == 0 and record["loss"] != "Squentropy"
        assert record["attacked"] == {"0.15": 16, "0.1": 16 if in_full else large.count("0")}
        assert in_full or all(inner >= outer for inner, outer in zip(small, large, strict=True))
        assert record["robust"] == {"0.15": large.count("1") / 16, "0.1": small.count("1") / 16}


@on_tensorflow_only
def test_a_finished_study_trains_nothing(study, capsys):
    path = study / "compare_losses_digits_quick.jsonl"
    before, table = path.read_text(), path.with_suffix(".md").read_text()
    assert table.count("| Squentropy | lam") >= 2
    capsys.readouterr()
    compare_losses.main(["--quick", "--dataset", "digits", "--out", str(study)], run=fake_run)
    assert "'split'" not in capsys.readouterr().out
    assert path.read_text() == before
    assert path.with_suffix(".md").read_text() == table


@on_tensorflow_only
def test_redrawn_images_test_the_chosen_and_its_parts(study, tests):
    path = study / "compare_losses_digits_redrawn_quick.jsonl"
    (copies,) = {(*record["setting"].values(), record["noise"]) for record in tests if record["loss"] == "copies"}
    lam, beta, noise = copies
    redrawn = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(*record["setting"].values(), record["noise"]) for record in redrawn if record["loss"] == "copies"]
    assert found == [(lam, beta, noise), (lam, 0.0, noise), (0.0, beta, noise), (0.0, 0.0, noise)]
    others = {(record["loss"], *option_of(record)) for record in tests if record["loss"] != "copies"}
    repeated = {(record["loss"], *option_of(record)) for record in redrawn if record["loss"] != "copies"}
    assert repeated == {option for option in others if option[0] != "Squentropy" or option[2] > 0}
    assert "drawn anew for each seed" in path.with_suffix(".md").read_text()


@on_tensorflow_only
def test_mnist_needs_the_choices_of_digits(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(SystemExit, match="Run `--dataset digits` first"):
        compare_losses.main(["--quick", "--dataset", "mnist", "--out", str(tmp_path)])


@pytest.mark.parametrize("dataset", [pytest.param("digits", marks=pytest.mark.more), "digits_redrawn", "mnist"])
@on_tensorflow_only
def test_published_runs_are_found_and_tabled_again(dataset, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    for path in RESULTS.glob("compare_losses_*.jsonl"):
        shutil.copy(path, tmp_path)
    shutil.copy(RESULTS / f"compare_losses_{dataset}.md", tmp_path)
    # No data set is needed, as nothing is trained.
    monkeypatch.setattr("keras_drsl.datasets.load", lambda *arguments: ((None, None), (None, None)))
    arguments = ["--dataset", dataset, "--out", str(tmp_path)]
    compare_losses.main(arguments, run=lambda job, *arguments: pytest.fail(f"trained {job}"))
    before = rows(RESULTS / f"compare_losses_{dataset}.md")
    assert rows(tmp_path / f"compare_losses_{dataset}.md") == before
    assert len(before) > 5


def rows(path):
    """Return the rows of the tables of a file, with the present names of checks."""
    renamed = {
        "control (": "attack_self_test (",
        "budget (": "larger_eps (",
        "steps_beat_one (": "many_steps_beat_one (",
    }
    text = path.read_text()
    for old, new in renamed.items():
        text = text.replace(old, new)
    return [line for line in text.splitlines() if line.startswith("|")]


def test_contradictions_of_radii_are_counted():
    def run(small, large, **attacked):
        return {"images": 4, "withstood": {"0.1": small, "0.2": large}} | attacked

    runs = [run("1101", "1010"), run("1111", "1000", attacked={"0.1": 4, "0.2": 4})]
    skipped = run("0111", "1000", attacked={"0.1": 3, "0.2": 4})
    assert compare_losses.against_order([*runs, skipped], ["0.1", "0.2"]) == (3, 1)


def test_every_noise_that_is_offered_can_be_trained_with():
    mnist = STUDIES["mnist"]
    assert compare_losses.noises("cross_entropy", mnist) == [0.3, 0.5, 0.7, 1.0]
    # Uniform noise of a standard deviation of 0.7 would be as wide as [-1.21, 1.21].
    assert compare_losses.noises("copies", mnist) == [0.3, 0.5]
    data = np.zeros((1, 8, 8, 1), "float32"), np.zeros(1, "int64")
    for noise in (noise for study in STUDIES.values() for noise in compare_losses.noises("copies", study)):
        job = compare_losses.make_job("test", ("copies", {"lam": 1.0, "beta": 0.3}, noise), 0)
        compare_losses.compiled(job, data, mnist["recipe"])


def test_the_calibration_error_equals_its_definition():
    pytest.importorskip("scipy")
    # Two images at a confidence of 0.9, one of them right, and two at 0.6, both right: half of |0.5 - 0.9| plus half of
    # |1 - 0.6|.
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    assert compare_losses.calibration_error(np.log(p), np.array([0, 0, 0, 1])) == pytest.approx(0.4)


@on_tensorflow_only
def test_a_job_is_trained_evaluated_and_recorded(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    study = compare_losses.quick(STUDIES["digits"])
    data = tuple((x[:128], y[:128]) for x, y in keras_drsl.datasets.load("digits"))
    args = argparse.Namespace(dataset="digits", backend=BACKEND, device="cpu", device_name="cpu", quick=True)
    path = tmp_path / "runs.jsonl"
    job = compare_losses.make_job("test", ("copies", {"lam": 1.0, "beta": 0.3}, 0.2), 0)
    compare_losses.run_job(job, study, data, path, args)
    (record,) = runner.read_records(path)
    assert runner.find(job, [record]) is record
    for eps, digits in record["withstood"].items():
        assert record["robust"][eps] == digits.count("1") / 16
    assert record["attacked"] == {"0.15": 16, "0.1": 16}
    assert 0 <= record["calibration_error"] <= 1
    assert record["study"] == compare_losses.conditions(study)


@pytest.mark.slow
@on_tensorflow_only
def test_a_quick_study_trains_all_jobs(tmp_path):
    for dataset in ("digits", "digits_redrawn"):
        compare_losses.main(["--quick", "--dataset", dataset, "--out", str(tmp_path)])
    table = (tmp_path / "compare_losses_digits_quick.md").read_text()
    # The time of a step was measured.
    assert "| 1.00 (1.00 to 1.00) |" in table
