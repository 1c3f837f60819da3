"""The examples run small, in process: each is a script of its own, loaded from its file."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_drsl
from tests.backends import on_tensorflow
from tests.helpers import run_python

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = on_tensorflow


def load(name):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_stands_alone(path):
    allowed = {*sys.stdlib_module_names, "keras", "keras_drsl", "keras_hub", "keras_tuner", "numpy", "tensorflow"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed
        assert not any(part.startswith("_") for name in names for part in name.split("."))


@pytest.mark.more
def test_a_tuner_chooses_by_robust_accuracy(tmp_path):
    pytest.importorskip("keras_tuner")
    small = ["--trials", "2", "--epochs", "2", "--held-out", "1100", "--suite", "quick", "--max-samples", "20"]
    tuner, report = load("tune").main([*small, "--out", str(tmp_path)])
    best, second = tuner.oracle.get_best_trials(2)
    assert best.score >= second.score
    # The score is what the monitor wrote: a share of at most 500 images.
    assert best.score * 500 == pytest.approx(round(best.score * 500))
    for trial in (best, second):
        assert 0 <= trial.hyperparameters.values["noise"] <= 0.3
        assert 0.03 <= trial.hyperparameters.values["lam"] <= 3
    assert report.num_examples == 20


@pytest.mark.more
def test_recommendations_are_written_once(tmp_path):
    example = load("recommend")
    example.SETTINGS = {name: settings[:1] for name, settings in example.SETTINGS.items()}
    small = ["--users", "40", "--epochs", "3", "--seeds", "2", "--false-shares", "0.2", "--out", str(tmp_path)]
    results = example.main(small)["0.2"]
    assert set(results) == {"softmax", "bilateral"}
    for row in results.values():
        assert len(row["precision"]) == 2
        assert 0 <= min(row["precision"]) <= max(row["precision"]) <= 1
    assert json.loads((tmp_path / "recommend.json").read_text())["results"]["0.2"] == results
    with pytest.raises(SystemExit, match="without results"):
        example.main(small)


def test_ratings_have_their_share_of_false_ones():
    example = load("recommend")
    digits = np.arange(500) % 10
    liked, ratings = example.draw_ratings(digits, 200, 0.4, seed=0)
    assert (digits[ratings] != liked[:, None]).mean() == pytest.approx(0.4, abs=0.03)


def test_precision_counts_the_best_unrated_images():
    example = load("recommend")
    scores = np.arange(50, 0, -1.0)[None]  # best first
    wanted = np.zeros((1, 50), bool)
    wanted[0, 2:12] = wanted[0, 30:45] = True
    # Without the first two, the best 20 are images 2 to 21, of which 10 are wanted.
    assert example.recall(scores, np.array([[0, 1]]), wanted) == pytest.approx(10 / 20)


@pytest.mark.slow
def test_images_are_described_and_attacked(tmp_path):
    pytest.importorskip("keras_hub")
    example = load("vision_language")
    small = ["--epochs", "2", "--seeds", "1", "--size", "8", "--max-images", "6", "--suite", "quick"]
    example.main([*small, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "vision_language.json").read_text())
    table = (tmp_path / "vision_language.md").read_text()
    assert [row["loss"] for row in record["rows"]] == ["cross-entropy", "DRSLoss", "PRSLoss"]
    rate = record["rows"][0]["setting"][0]
    for row in record["rows"]:
        best = max(row["tried"], key=lambda run: run["tokens right under attack"])
        assert best["setting"] == row["setting"]
        assert len(row["tried"]) == 3
        assert row["setting"][0] == rate
        for run in row["runs"]:
            assert 0 <= run["tokens right under attack"] <= run["tokens right"] <= 1
        assert table.count(f"| {row['loss']} |") == 2
    _, words = example.make_inputs(np.zeros((2, 8, 8, 1)), np.array([3, 8]))
    assert [" ".join(example.WORDS[word] for word in caption) for caption in words] == [
        "odd low three .",
        "even high eight .",
    ]
    with pytest.raises(SystemExit, match="vision_language.json exists"):
        example.main([*small, "--out", str(tmp_path)])


class TestFit:
    @pytest.fixture(scope="class")
    def out(self, tmp_path_factory):
        """Run the demo small and without noise, and return its folder."""
        pytest.importorskip("cleverhans")
        folder = tmp_path_factory.mktemp("fit")
        small = ["--seeds", "1", "--epochs", "2", "--max-images", "40", "--noise", "0"]
        load("fit").main([*small, "--out", str(folder)])
        return folder

    def test_it_writes_table_pictures_and_models(self, out):
        table = (out / "fit_digits.md").read_text()
        assert table.count("\n| cross-entropy |") == table.count("\n| DRSLoss, lam 0.3 |") == 1
        assert {path.name for path in out.glob("*.png")} == {"fit_digits.png", "fit_digits_rivals.png"}
        assert len(list((out / "models").glob("*.keras"))) == 2
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "<h1>DRSLoss, lam 0.3</h1>" in page
        assert '<th scope="row">cross-entropy</th>' in page

    def test_weights_of_a_noisy_model_fit_the_attacked(self):
        fit = load("fit")
        noisy, attacked = (fit.build_model((8, 8, 1), noise) for noise in (0.15, 0))
        attacked.set_weights(noisy.get_weights())
        x = np.random.default_rng(0).random((5, 8, 8, 1), "float32")
        np.testing.assert_array_equal(attacked(x), noisy(x))

    def test_it_records_how_to_repeat_the_run(self, out):
        record = json.loads((out / "fit_digits.json").read_text())
        assert record["settings"]["seeds"] == 1
        assert "--seeds 1" in record["command"]
        assert "--max-images 40" in record["command"]
        assert {"keras", "tensorflow", "cleverhans", "numpy"} <= set(record["versions"])

    def test_its_figures_are_consistent(self, out):
        record = json.loads((out / "fit_digits.json").read_text())
        for row in record["rows"]:
            (run,) = row["runs"]
            assert 0 <= run["worst_case"] <= min(run["fgm"], run["pgd_ce"], run["pgd_margin"]) <= run["clean"]
            assert 0 <= run["apgd"] <= run["clean"]
            radii, accuracy = zip(*run["curve"], strict=True)
            assert radii == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
            assert list(accuracy) == sorted(accuracy, reverse=True)
            assert accuracy[0] == pytest.approx(run["clean"])
            assert run["rivals"] == sorted(run["rivals"], reverse=True)

    @pytest.mark.more
    def test_a_saved_model_has_its_loss_in_a_fresh_process(self, out, tmp_path):
        (path,) = (out / "models").glob("*_drs_noise0_seed0.keras")
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "data.npz", x=rng.random((30, 8, 8, 1)).astype("float32"), y=rng.integers(0, 10, 30))
        code = """
        import sys, keras, keras_drsl, numpy as np
        data = np.load(sys.argv[1])
        print(float(keras.models.load_model(sys.argv[2]).evaluate(data["x"], data["y"], verbose=0)[0]))
        """
        done = run_python(code, tmp_path / "data.npz", path)
        data = np.load(tmp_path / "data.npz")
        expected = keras.models.load_model(path).evaluate(data["x"], data["y"], verbose=0)[0]
        assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-6)

    def test_it_refuses_to_overwrite_results(self, out):
        before = (out / "fit_digits.json").read_text()
        with pytest.raises(SystemExit, match="--overwrite"):
            load("fit").main(["--out", str(out)])
        assert (out / "fit_digits.json").read_text() == before

    @pytest.mark.parametrize(
        "arguments", [("--eps", "0"), ("--lam", "-1"), ("--seeds", "0"), ("--noise", "2"), ("--lam", "inf")]
    )
    def test_bad_arguments_are_named_before_training(self, arguments, tmp_path, capsys):
        with pytest.raises(SystemExit):
            load("fit").main([*arguments, "--out", str(tmp_path / "out")])
        assert f"{arguments[0]} must" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_missing_data_set_is_explained(self, tmp_path):
        pytest.importorskip("tensorflow_datasets")
        arguments = ["--dataset", "mnist", "--data-dir", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match=r"mnist could not be loaded(.|\n)*--data-dir DIR"):
            load("fit").main(arguments)


@pytest.mark.slow
class TestAdversarialTraining:
    @pytest.fixture(scope="class")
    def out(self, tmp_path_factory):
        """Run the example small, on two of its four trainings, and return its folder."""
        folder = tmp_path_factory.mktemp("adversarial")
        small = ["--epochs", "2", "--steps", "2", "--every", "1", "--max-images", "12", "--suite", "quick"]
        example = load("adversarial_training")
        example.TRAININGS = [training for training in example.TRAININGS if "DRSLoss" in training[0]]
        example.main([*small, "--out", str(folder)])
        return folder

    def test_it_compares_usual_and_adversarial_training(self, out):
        rows = json.loads((out / "adversarial_digits.json").read_text())
        table = (out / "adversarial_digits.md").read_text().splitlines()[4:]
        assert len(rows) == len(table) == len(list(out.glob("*.keras"))) == 2
        for row, line in zip(rows, table, strict=True):
            assert f"| {100 * row['report']['robust_accuracy']:.1f} |" in line
            expected = {"accuracy", "clean_accuracy", "attack_strength", "val_robust_accuracy"}
            assert expected <= set(row["history"])
            assert all(len(values) == 2 for values in row["history"].values())
        assert (out / "adversarial_digits.png").stat().st_size > 1000

    def test_it_refuses_to_overwrite_results(self, out):
        with pytest.raises(SystemExit, match="--overwrite"):
            load("adversarial_training").main(["--out", str(out)])


@pytest.mark.slow
class TestEvaluateRobustness:
    ARGUMENTS = ("--max-images", "20", "--epochs", "1", "--suite", "quick", "--eps", "0.1")

    @pytest.fixture(scope="class")
    def out(self, tmp_path_factory):
        """Run the example small, and return its folder."""
        folder = tmp_path_factory.mktemp("evaluate")
        load("evaluate_robustness").main([*self.ARGUMENTS, "--out", str(folder)])
        return folder

    def test_it_puts_two_reports_side_by_side(self, out):
        table = (out / "robustness.md").read_text()
        assert table.startswith("| | cross-entropy | DRSLoss |\n")
        paths = sorted(out.glob("robustness_*.json"))
        assert len(paths) == 2
        for path in paths:
            report = keras_drsl.RobustnessReport.from_json(path)
            assert report.num_examples == 20
            assert f"**{report.robust_accuracy:.1%}**" in table
        assert (out / "robustness.png").stat().st_size > 1000
        assert not list(out.glob("*.state"))

    def test_finished_reports_are_not_made_again(self, out, capsys):
        capsys.readouterr()
        load("evaluate_robustness").main([*self.ARGUMENTS, "--no-curve", "--out", str(out)])
        printed = capsys.readouterr().out
        assert printed.count("exists: it is not made again") == 2
        assert (out / "robustness.md").read_text() in printed
