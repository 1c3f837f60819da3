import argparse
import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import BACKEND

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def imports(monkeypatch):
    """What benchmarks import is found as when they run: each other, and the examples."""
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "examples")
    monkeypatch.syspath_prepend(BENCHMARKS)


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


@pytest.mark.skipif(BACKEND == "torch", reason="the study is for TensorFlow and JAX")
def test_the_study_goes_on_where_it_was_and_writes_its_table(tmp_path):
    arguments = ("--quick", "--backend", BACKEND, "--out", tmp_path)
    done = run("robust_accuracy.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    path = tmp_path / "robust_accuracy_digits_quick.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in whole]
    test = [record for record in records if record["split"] == "test"]
    validated = {one["lam"]: one["robust"] for one in records if one["split"] == "validation" and one["loss"] == "drs"}
    assert {(one["method"], one["loss"]) for one in test} >= {("pgd", "ce"), ("pgd", "ls"), ("pgd", "drs")}
    assert all(one["robust"] == one["withstood"].count("1") / one["images"] for one in records)
    assert {one["lam"] for one in test if one["loss"] == "drs"} <= set(validated)
    table = path.with_suffix(".md").read_text()
    pairs = zip(*([one["robust"] for one in test if (one["method"], one["loss"]) == ("pgd", loss)] for loss in (
        "ls", "ce")), strict=True)  # fmt: skip
    gains = [100 * (one - other) for one, other in pairs]
    mean, half = sum(gains) / 2, 12.706 * abs(gains[0] - gains[1]) / 2
    assert f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})" in table

    # Killed while it wrote the last line: that is made again, and nothing else.
    path.write_text("".join(whole[:-1]) + whole[-1][:50])
    done = run("robust_accuracy.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'split'") == 1
    again = path.read_text().splitlines(keepends=True)
    assert again[:-2] == whole[:-1]
    assert json.loads(again[-1])["withstood"] == records[-1]["withstood"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="is slow elsewhere, and the same")
def test_losses_are_compared_with_what_each_chose_on_validation_images(tmp_path):
    arguments = ("--quick", "--backend", BACKEND, "--out", tmp_path)
    done = run("compare_losses.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    path = tmp_path / "compare_losses_digits_quick.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    test = [one for one in records if one["split"] == "test"]
    assert {(one["loss"], one["noise"] > 0) for one in test} == {
        (loss, noisy) for loss in ("cross_entropy", "Squentropy", "copies") for noisy in (False, True)
    } - {("copies", False)}
    tried = {}
    for one in records:
        if one["split"] == "validation":
            option = (str(one["setting"]), one["noise"])
            tried.setdefault((one["loss"], one["noise"] > 0), {}).setdefault(option, []).append(one["robust"]["0.15"])
    # All were tried with one seed, the best two with a second, and of these the better was taken.
    best = {}
    for key, options in tried.items():
        twice = {option: sum(values) / 2 for option, values in options.items() if len(values) == 2}
        assert len(twice) == min(2, len(options))
        once = [values[0] for option, values in options.items() if option not in twice]
        assert all(values[0] >= max(once, default=0) for option, values in options.items() if option in twice)
        (chosen,) = {(str(one["setting"]), one["noise"]) for one in test if (one["loss"], one["noise"] > 0) == key}
        assert twice[chosen] == best.setdefault(key, max(twice.values()))
    # Cross-entropy and the best on validation are tested with two seeds, the others with one.
    seeds = collections.Counter((one["loss"], one["noise"] > 0) for one in test)
    plain = {("cross_entropy", False), ("cross_entropy", True)}
    more = {key for key, count in seeds.items() if count == 2}
    assert set(seeds.values()) == {1, 2}
    assert plain <= more
    assert len(more) <= 3
    assert max(best.values()) in {best[key] for key in more}
    for one in test:
        small, large = (one["withstood"][radius] for radius in ("0.1", "0.15"))
        in_full = one["seed"] == 0 and one["loss"] != "Squentropy"
        assert one["attacked"] == {"0.15": 16, "0.1": 16 if in_full else large.count("0")}
        assert in_full or all(inner >= outer for inner, outer in zip(small, large, strict=True))
        assert one["robust"] == {"0.15": large.count("1") / 16, "0.1": small.count("1") / 16}
    assert path.with_suffix(".md").read_text().count("| Squentropy | lam") >= 2
    assert path.with_suffix(".png").stat().st_size > 1000
    again = run("compare_losses.py", *arguments)
    assert "'split'" not in again.stdout
    assert path.read_text().count("\n") == len(records)

    # With other test images: what was chosen, and the two copies without the one half, the other, and both.
    redrawn = run("compare_losses.py", *arguments, "--dataset", "digits_redrawn")
    assert redrawn.returncode == 0, redrawn.stderr[-3000:]
    path = tmp_path / "compare_losses_digits_redrawn_quick.jsonl"
    (of_copies,) = {(*one["setting"].values(), one["noise"]) for one in test if one["loss"] == "copies"}
    lam, beta, noise = of_copies
    got = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(*one["setting"].values(), one["noise"]) for one in got if one["loss"] == "copies"] == [
        (lam, beta, noise), (lam, 0.0, noise), (0.0, beta, noise), (0.0, 0.0, noise)
    ]  # fmt: skip
    others = {(one["loss"], str(one["setting"]), one["noise"]) for one in test if one["loss"] != "copies"}
    repeated = {(one["loss"], str(one["setting"]), one["noise"]) for one in got if one["loss"] != "copies"}
    assert repeated == {one for one in others if one[0] != "Squentropy" or one[2] > 0}
    assert "drawn anew for each seed" in path.with_suffix(".md").read_text()

    without = run("compare_losses.py", "--quick", "--dataset", "mnist", "--out", tmp_path / "other")
    assert without.returncode != 0
    assert "Run `--dataset digits` first" in without.stderr


@pytest.mark.usefixtures("imports")
def test_the_interval_over_images_is_that_of_their_mean_difference():
    import shared

    runs = [{"seed": 0, "withstood": "1100"}, {"seed": 1, "withstood": "1000"}, {"seed": 2, "withstood": "1111"}]
    base = [{"seed": 1, "withstood": "1000"}, {"seed": 0, "withstood": "1000"}]
    # Image by image 0, 1/2, 0, 0: a standard deviation of 1/4.
    assert shared.over_images(runs, base) == "+- 24.5"
    assert shared.over_images(runs, []) == ""


@pytest.mark.usefixtures("imports")
def test_a_run_that_is_not_found_by_its_job_is_said_and_not_waited_for():
    import shared

    args, done = argparse.Namespace(worker="1/2"), [{"seed": 0}]
    jobs = [{"seed": seed} for seed in range(4)]
    with pytest.raises(RuntimeError, match="no record of its job {'seed': 1}"):
        shared.share(args, jobs, lambda: done, lambda job: done.append({"seed": job["seed"] + 100}))


@pytest.mark.usefixtures("imports")
def test_what_speaks_against_larger_balls_being_the_harder_ones_is_counted():
    from compare_losses import against_order

    def one(small, large, **attacked):
        return {"images": 4, "withstood": {"0.1": small, "0.2": large}} | attacked

    runs = [one("1101", "1010"), one("1111", "1000", attacked={"0.1": 4, "0.2": 4})]
    skipped = one("0111", "1000", attacked={"0.1": 3, "0.2": 4})
    assert against_order([*runs, skipped], ["0.1", "0.2"]) == (3, 1)


@pytest.mark.usefixtures("imports")
def test_a_study_offers_no_noise_that_cannot_be_trained_with():
    import numpy as np
    from compare_losses import STUDIES, compiled, make_job, noises

    mnist = STUDIES["mnist"]
    assert noises("cross_entropy", mnist) == [0.3, 0.5, 0.7, 1.0]
    # Uniform noise of a standard deviation of 0.7 would be as wide as [-1.21, 1.21].
    assert noises("copies", mnist) == [0.3, 0.5]
    data = np.zeros((1, 8, 8, 1), "float32"), np.zeros(1, "int64")
    for noise in (each for study in STUDIES.values() for each in noises("copies", study)):
        compiled(make_job("test", ("copies", {"lam": 1.0, "beta": 0.3}, noise), 0), data, mnist["recipe"])


@pytest.mark.usefixtures("imports")
def test_the_calibration_error_is_that_of_its_definition():
    import numpy as np

    pytest.importorskip("scipy")
    from compare_losses import calibration_error

    # Two sure of 0.9 of which one is right, two sure of 0.6, both right: half of |0.5 - 0.9| and half of |1 - 0.6|.
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    assert calibration_error(np.log(p), np.array([0, 0, 0, 1])) == pytest.approx(0.4)


def test_a_device_that_is_not_there_is_named():
    done = run("loss_speed.py", "--quick", "--backend", BACKEND, "--device", "gpu")
    if done.returncode == 0:
        pytest.skip("a GPU is there")
    assert done.returncode == 2
    assert f"--backend {BACKEND} --device gpu is not at hand" in done.stderr
