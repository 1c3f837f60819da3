import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_drsl.evaluation import RobustnessReport, datasets
from tests.backends import on_tensorflow

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("TFDS_DATA_DIR", "")

pytestmark = [on_tensorflow]
pytest.importorskip("cleverhans")


def run(*arguments, check=True, script="fit.py"):
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=check, cwd=ROOT)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The example's default, small: one seed and few epochs."""
    out = tmp_path_factory.mktemp("fit")
    done = run("--seeds", "1", "--epochs", "2", "--max-images", "40", "--out", out)
    return out, done.stdout


def test_fit_prints_a_table_of_four_models_and_writes_it_with_figures_and_models(small_run):
    out, printed = small_run
    table = (out / "fit_digits.md").read_text()
    assert table in printed
    assert table.count("\n| cross-entropy |") == table.count("\n| DRSLoss, lam 0.3 |") == 2
    assert {path.name for path in out.glob("*.png")} == {"fit_digits.png", "fit_digits_rivals.png"}
    assert len(list((out / "models").glob("*.keras"))) == 4


def test_fit_records_what_is_needed_to_run_it_again_and_keeps_its_own_rules(small_run):
    record = json.loads((small_run[0] / "fit_digits.json").read_text())
    assert record["settings"]["seeds"] == 1
    assert record["settings"]["attacked_images"] == 40
    assert "--seeds 1" in record["command"]
    assert "--max-images 40" in record["command"]
    assert {"keras", "tensorflow", "cleverhans", "numpy", "python"} <= set(record["versions"])
    for row in record["rows"]:
        (run,) = row["runs"]
        assert 0 <= run["worst_case"] <= min(run["fgm"], run["pgd_ce"], run["pgd_margin"])
        radii, accuracy = zip(*run["curve"], strict=True)
        assert radii == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
        assert list(accuracy) == sorted(accuracy, reverse=True)
        assert accuracy[0] == pytest.approx(run["clean"])


def test_a_model_it_saved_evaluates_to_the_same_loss_in_a_fresh_process(small_run, tmp_path):
    (path,) = (small_run[0] / "models").glob("*_drs_noise0_seed0.keras")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.random((30, 8, 8, 1)).astype("float32"), y=rng.integers(0, 10, 30))
    code = f"""
import keras, keras_drsl, numpy as np
data = np.load({str(tmp_path / "data.npz")!r})
print(float(keras.models.load_model({str(path)!r}).evaluate(data["x"], data["y"], verbose=0)[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    data = np.load(tmp_path / "data.npz")
    expected = keras.models.load_model(path).evaluate(data["x"], data["y"], verbose=0)[0]
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-6)


def test_fit_refuses_to_overwrite_results_and_says_how_to(small_run):
    before = (small_run[0] / "fit_digits.json").read_text()
    done = run("--out", small_run[0], check=False)
    assert done.returncode != 0
    assert "--overwrite" in done.stderr
    assert (small_run[0] / "fit_digits.json").read_text() == before


def test_evaluate_robustness_puts_two_reports_side_by_side_and_goes_on_where_it_was(tmp_path):
    arguments = ("--max-images", "20", "--epochs", "1", "--suite", "quick", "--eps", "0.1", "--out", tmp_path)
    printed = run(*arguments, script="evaluate_robustness.py").stdout
    table = (tmp_path / "robustness_digits.md").read_text()
    assert table in printed
    assert table.startswith("| | cross-entropy | DRSLoss |\n")
    assert (tmp_path / "robustness_digits.png").stat().st_size > 1000
    reports = [RobustnessReport.from_json(path) for path in sorted(tmp_path.glob("robustness_digits_*.json"))]
    assert [report.images for report in reports] == [20, 20]
    for report in reports:
        assert f"**{report.robust_accuracy:.1%}**" in table
    again = run(*arguments, script="evaluate_robustness.py").stdout
    assert again.count("is there already") == 2
    assert table in again


def test_a_data_set_that_is_not_there_is_explained(tmp_path):
    done = run("--dataset", "mnist", "--data-dir", tmp_path / "empty", "--out", tmp_path / "out", check=False)
    assert done.returncode != 0
    assert "mnist could not be loaded" in done.stderr
    assert "--data-dir DIR" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--eps", "0"), ("--lam", "-1"), ("--seeds", "0"), ("--noise", "2"), ("--lam", "inf")]
)
def test_bad_arguments_are_named_before_anything_is_trained(arguments, tmp_path):
    done = run(*arguments, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert f"{arguments[0]} must" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path(DATA, "mnist").exists(), reason="needs MNIST under the folder TFDS_DATA_DIR names")
def test_mnist_loads_through_tensorflow_datasets():
    (x_train, y_train), (x_test, y_test) = datasets.load("mnist", DATA)
    assert x_train.shape == (60000, 28, 28, 1)
    assert x_test.shape == (10000, 28, 28, 1)
    assert (x_train.min(), x_train.max(), x_train.dtype) == (0, 1, "float32")
    assert np.bincount(y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert len(y_train) == 60000
