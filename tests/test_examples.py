import argparse
import importlib
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
    assert len(list(tmp_path.glob("curve_digits_*.json"))) == 2
    for report in reports:
        assert f"**{report.robust_accuracy:.1%}**" in table
    again = run(*arguments, script="evaluate_robustness.py").stdout
    assert again.count("is there already") == 2
    assert table in again


def test_adversarial_training_compares_four_models_and_draws_them_by_epoch(tmp_path):
    small = ("--epochs", "2", "--steps", "2", "--watch", "20", "--every", "1", "--max-images", "12")
    arguments = (*small, "--method", "fgsm", "--lam", "0.1", "--out", tmp_path)
    printed = run(*arguments, script="adversarial_training.py").stdout
    table = (tmp_path / "adversarial_digits.md").read_text()
    assert table in printed
    assert (tmp_path / "adversarial_digits.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "adversarial_digits.json").read_text())["rows"]
    names = [(row["method"], row["loss"], row["lam"]) for row in rows]
    assert names == [("clean", "ce", None), ("clean", "drs", 0.3), ("fgsm", "ce", None), ("fgsm", "drs", 0.1)]
    for row, line in zip(rows, table.splitlines()[4:], strict=False):
        (found,) = row["runs"]
        assert 0 <= found["robust"] <= min(found["after"].values()) <= found["clean"] <= 1
        assert f"| {100 * found['robust']:.1f} |" in line
        assert {"accuracy", "clean_accuracy", "attack_strength", "val_robust_accuracy"} <= set(found["history"])
        assert all(len(values) == 2 for values in found["history"].values())
    assert len(list((tmp_path / "models").glob("*.keras"))) == 4
    again = run(*arguments, script="adversarial_training.py", check=False)
    assert again.returncode != 0
    assert "--overwrite" in again.stderr


def test_the_example_of_diversity_tells_how_well_each_score_foretells_the_attack(tmp_path, monkeypatch):
    arguments = (
        "--losses",
        "ce",
        "drs_3",
        "--epochs",
        "4",
        "--max-images",
        "40",
        "--suite",
        "quick",
        "--out",
        tmp_path,
    )
    printed = run(*arguments, script="diversity_and_attacks.py").stdout
    table = (tmp_path / "diversity_digits.md").read_text()
    assert table in printed
    assert (tmp_path / "diversity_digits.png").stat().st_size > 1000
    models = json.loads((tmp_path / "diversity_digits.json").read_text())["models"]
    for model in models:
        radius, right, withstood = (np.array(model[name]) for name in ("radius", "right", "withstood"))
        assert np.all((radius == 0) == ~right)
        # Bisection and suite are different attacks, and agree but for images on the edge.
        assert np.mean((radius > 0.15) == withstood) > 0.9
    # Against other libraries: rho and AUC of a whole model, partial rho by regression of ranks.
    from scipy import stats
    from sklearn.metrics import roc_auc_score

    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("diversity_and_attacks")
    model = models[1]
    kept = np.array(model["right"])
    score, margin = (np.array(model["scores"][name])[kept] for name in ("entropy", "logit margin"))
    radius, withstood = np.array(model["radius"])[kept], np.array(model["withstood"])[kept]
    ranks = np.array([stats.rankdata(one) for one in (score, radius, margin)])
    given = np.stack([ranks[2], np.ones(len(radius))], axis=1)
    rests = [one - given @ np.linalg.lstsq(given, one, rcond=None)[0] for one in ranks[:2]]
    expected = (
        stats.spearmanr(score, radius).statistic, np.corrcoef(*rests)[0, 1], roc_auc_score(withstood, score)
    )  # fmt: skip
    assert example.within(model, "entropy", np.arange(40)) == pytest.approx(expected)
    again = run(*arguments, script="diversity_and_attacks.py", check=False)
    assert again.returncode != 0
    assert "--overwrite" in again.stderr

    # Stopped after the first model: that one is not trained again.
    begun = tmp_path / "diversity_digits.begun.jsonl"
    assert not begun.exists()
    key = {"dataset": "digits", "eps": 0.15, "epochs": 4, "suite": "quick", "max_images": 40, "loss": "ce", "seed": 0}
    begun.write_text(json.dumps({"key": key, "run": models[0]}) + "\n")
    again = run(*arguments, "--overwrite", script="diversity_and_attacks.py")
    assert again.stdout.count("loss=") == 1
    assert json.loads((tmp_path / "diversity_digits.json").read_text())["models"][0] == models[0]


def test_the_figures_of_several_models_are_those_of_scipy_and_their_intervals_those_of_a_bootstrap(monkeypatch):
    from scipy import stats

    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("diversity_and_attacks")
    rng = np.random.default_rng(0)
    losses = ["ce", "ls", "gce", "cot", "squeezing", "drs_1"]
    models = []
    for loss in losses:
        for seed in range(2):
            right = rng.random(60) < 0.9
            radius = np.where(right, rng.uniform(0, 0.3, 60), 0)
            scores = {name: radius + rng.normal(0, 0.2, 60) for name in example.SCORES}
            one = {"loss": loss, "seed": seed, "clean": right.mean(), "robust": (radius > 0.15).mean(), "right": right}
            models.append(one | {"radius": radius, "withstood": radius > 0.15, "scores": scores})
    args = argparse.Namespace(dataset="digits", losses=losses, seeds=2, eps=0.15, suite="quick")
    lines = example.make_table(models, 60, args).splitlines()

    def figures(section, row, column):
        """The value and the ends of the interval of a cell."""
        start = next(place for place, line in enumerate(lines) if line.startswith(section))
        cells = next(line for line in lines[start:] if line.startswith(f"| {row} |")).split("|")
        return [float(one) for one in cells[column + 1].replace("(", "").replace(")", "").replace("to", "").split()]

    def rho(model, score):
        kept = model["right"]
        return stats.spearmanr(model["scores"][score][kept], model["radius"][kept]).statistic

    def over(some):
        means = [one["scores"]["entropy"][one["right"]].mean() for one in some]
        return stats.spearmanr(means, [one["robust"] for one in some]).statistic

    value, low, high = figures("Within a model, mean over 12", "entropy", 1)
    assert value == pytest.approx(np.mean([rho(one, "entropy") for one in models]), abs=0.006)
    assert low < value < high
    # Of one loss, against the normal approximation of a mean of two rhos.
    score = "variance, log space"
    value, low, high = figures("Loss by loss", "cross-entropy", 5)
    assert value == pytest.approx(np.mean([rho(one, score) for one in models[:2]]), abs=0.006)
    assert high - low == pytest.approx(2 * 1.96 * (1 - value**2) / np.sqrt(2 * 54), rel=0.4)
    for column, some in ((1, models), (2, models[:10])):
        value, low, high = figures("Over models", "entropy", column)
        assert value == pytest.approx(over(some), abs=0.006)
        # Losses are drawn, each with both its models.
        pairs = [some[place : place + 2] for place in range(0, len(some), 2)]
        drawn = rng.integers(0, len(pairs), (500, len(pairs)))
        draws = [over([model for place in row for model in pairs[place]]) for row in drawn]
        assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.12)


def test_runs_are_kept_until_what_came_of_them_is_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    records = importlib.import_module("records")
    path, made = tmp_path / "begun.jsonl", []

    def begun(*seeds):
        one = records.Begun(path)
        for seed in seeds:
            assert one.run({"seed": seed}, lambda seed=seed: made.append(seed) or {"clean": seed / 2}) == {
                "clean": seed / 2
            }
        return one

    begun(1)  # stopped
    begun(2)  # and so was another command
    begun(1, 3).end()
    assert made == [1, 2, 3]
    begun(2).end()
    assert made == [1, 2, 3]
    assert not path.exists()


def test_a_record_says_how_to_run_it_again(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    records = importlib.import_module("records")
    args = argparse.Namespace(eps=[0.1, 8 / 255], max_images=None, data_dir="data", out="runs", plot=True)
    assert (
        records.command("examples/a.py", args, unsaid=["plot"]) == "python examples/a.py --eps 0.1 0.03137254901960784"
    )
    assert records.spread([1, 2, 3], digits=2) == "2.00 +- 1.00"
    assert records.spread([1.25]) == "1.2"


def test_bisection_finds_the_radius_of_a_linear_model(monkeypatch):
    from keras_drsl.attacks import Classifier
    from tests.linear import distance, inputs, linear_model

    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("diversity_and_attacks")
    model, (x, y) = linear_model(), inputs()
    classifier = Classifier(model)
    right = classifier.logits(x).argmax(1) == y
    found = example.breaking_radius(classifier, x[right], y[right], 0.25)
    expected = np.minimum(distance(x, y, "inf")[right], 0.25)
    np.testing.assert_allclose(found, expected, atol=0.25 / 2**example.LEVELS)
    assert 0 < (found < 0.24).sum() < right.sum()


def test_the_example_of_text_shows_what_each_loss_restrains(tmp_path):
    small = ("--epochs", "2", "--steps", "3", "--eps", "3", "--max-windows", "200", "--out", tmp_path)
    printed = run(*small, script="caption_or_text.py").stdout
    table = (tmp_path / "text.md").read_text()
    assert table in printed
    record = json.loads((tmp_path / "text.json").read_text())
    plain, drs, prs = (row["runs"][0] for row in record["rows"])
    for one in (plain, drs, prs):
        assert one["next word right"] >= one["after PGD on CE"] >= one["and on the margin"]
        # Better than a blind guess, and a large attack breaks most.
        assert one["next word right"] > 0.01
        assert one["perplexity"] < 1000
        assert one["and on the margin"] < one["next word right"] / 2
    assert drs["variance of wrong words"] < plain["variance of wrong words"]
    between = "variance of their top 4 between places"
    assert prs[between] < plain[between]


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("networks")


def test_the_residual_networks_return_logits_and_resnet18_has_the_weights_of_its_paper(networks):
    sizes = {}
    for name in networks.NAMES:
        model = networks.build(name, (32, 32, 3))
        assert model.output_shape == (None, 10)
        assert model.layers[-1].activation is keras.activations.linear
        sizes[name] = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    # 3x3 convolutions, 1x1 shortcuts where the width changes, a scale and a shift a normalised channel, and the head.
    widths = (64, 128, 256, 512)
    expected = 27 * 64 + 512 * 10 + 10 + 2 * 512
    for stage, width in enumerate(widths):
        before = widths[max(stage - 1, 0)]
        expected += 9 * width * (before + 3 * width) + (before * width if stage else 0) + 2 * (before + 3 * width)
    assert sizes["resnet18"] == expected
    assert sizes["small_resnet"] < 400_000


def test_augmented_batches_hold_each_image_once_moved_or_flipped(networks):
    rng = np.random.default_rng(0)
    x, y = rng.random((10, 8, 8, 3)).astype("float32"), np.arange(10)
    batches = networks.CroppedAndFlipped(x, y, 4, seed=0)
    images, labels = (np.concatenate(parts) for parts in zip(*(batches[place] for place in range(3)), strict=True))
    assert sorted(labels) == list(range(10))
    flips = 0
    for image, label in zip(images, labels, strict=True):
        padded = np.pad(x[label], ((4, 4), (4, 4), (0, 0)))
        crops = [padded[top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
        straight, flipped = (any(np.array_equal(image, one) for one in both) for both in (
            crops, [crop[:, ::-1] for crop in crops]
        ))  # fmt: skip
        assert straight or flipped
        flips += flipped
    assert 0 < flips < 10
    before = [batch[1].tolist() for batch in (batches[0], batches[1])]
    batches.on_epoch_end()
    assert before != [batch[1].tolist() for batch in (batches[0], batches[1])]


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
