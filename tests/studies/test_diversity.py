import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.backends import on_tensorflow
from tests.linear import distance, inputs, linear_model

stats = pytest.importorskip("scipy.stats")

from keras_drsl.models import Classifier  # noqa: E402
from studies import diversity  # noqa: E402

RESULTS = Path(__file__).parents[2] / "results"
SMALL = ["--losses", "ce", "drs_3", "--epochs", "4", "--max-images", "40", "--suite", "quick"]

pytestmark = on_tensorflow


def draw_model(loss, seed, train, x, y, args):
    """Return figures drawn at random, in place of those of a trained model."""
    rng = np.random.default_rng([len(loss), seed])
    right, radius = rng.random(60) < 0.9, rng.uniform(0, 0.3, 60)
    print(f"loss={loss}")
    return {
        "clean": right.mean(),
        "robust": float((radius > 0.15).mean()),
        "right": right.tolist(),
        "withstood": (right & (radius > 0.15)).tolist(),
        "radius": np.where(right, radius, 0).tolist(),
        "scores": {name: (radius + rng.normal(0, 0.2, 60)).tolist() for name in diversity.SCORES},
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run the study without training, and return its folder."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("diversity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "DRAWS", 20)
        diversity.main([*SMALL, "--out", str(folder)], measure=draw_model)
    return folder


@pytest.fixture(scope="module")
def models(study):
    return json.loads((study / "diversity_digits.json").read_text())["models"]


@pytest.mark.slow
def test_radii_agree_with_the_suite(tmp_path):
    diversity.main([*SMALL, "--out", str(tmp_path)])
    for model in json.loads((tmp_path / "diversity_digits.json").read_text())["models"]:
        radius, right, withstood = (np.array(model[name]) for name in ("radius", "right", "withstood"))
        assert np.all((radius == 0) == ~right)
        # Bisection and suite use different attacks, and agree except for images at the edge.
        assert np.mean((radius > 0.15) == withstood) > 0.9


def test_figures_within_a_model_equal_other_libraries(models):
    from sklearn.metrics import roc_auc_score

    model = models[1]
    kept = np.array(model["right"])
    score, margin = (np.array(model["scores"][name])[kept] for name in ("entropy", "logit margin"))
    radius, withstood = np.array(model["radius"])[kept], np.array(model["withstood"])[kept]
    ranks = np.array([stats.rankdata(values) for values in (score, radius, margin)])
    # The partial rho is the correlation of the residuals of a regression on the ranks of the margin.
    given = np.stack([ranks[2], np.ones(len(radius))], axis=1)
    residuals = [values - given @ np.linalg.lstsq(given, values, rcond=None)[0] for values in ranks[:2]]
    rho, partial = stats.spearmanr(score, radius).statistic, np.corrcoef(*residuals)[0, 1]
    expected = (rho, partial, roc_auc_score(withstood, score))
    assert diversity.within(model, "entropy", np.arange(60)) == pytest.approx(expected)


def test_results_are_not_overwritten(study):
    with pytest.raises(SystemExit, match="--overwrite"):
        diversity.main([*SMALL, "--out", str(study)], measure=draw_model)


def test_a_stopped_study_continues(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diversity, "DRAWS", 20)
    key = {"dataset": "digits", "eps": 0.15, "epochs": 4, "suite": "quick", "max_images": 40, "loss": "ce", "seed": 0}
    (tmp_path / "diversity_digits.begun.jsonl").write_text(json.dumps({"key": key, "run": models[0]}) + "\n")
    capsys.readouterr()
    diversity.main([*SMALL, "--out", str(tmp_path)], measure=draw_model)
    assert capsys.readouterr().out.count("loss=") == 1
    again = json.loads((tmp_path / "diversity_digits.json").read_text())["models"]
    assert again[0] == models[0]
    assert not (tmp_path / "diversity_digits.begun.jsonl").exists()


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10"])
def test_published_tables_are_drawn_again(dataset, tmp_path, monkeypatch):
    shutil.copy(RESULTS / f"diversity_{dataset}.json", tmp_path)
    # Few samples: intervals are compared by their centres only.
    monkeypatch.setattr(diversity, "DRAWS", 3)
    diversity.main(["--dataset", dataset, "--redraw", "--out", str(tmp_path)])
    before, after = (cells(folder / f"diversity_{dataset}.md") for folder in (RESULTS, tmp_path))
    assert after == before
    assert len(before) > 5


def cells(path):
    """Return the cells of the tables of a file without the intervals."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.partition(" (")[0].strip() for cell in line.split("|")] for line in lines]


@pytest.mark.slow
def test_figures_of_several_models_equal_scipy():
    rng = np.random.default_rng(0)
    losses = ["ce", "ls", "gce", "cot", "squeezing", "drs_1"]
    models = []
    for loss in losses:
        for seed in range(2):
            right = rng.random(60) < 0.9
            radius = np.where(right, rng.uniform(0, 0.3, 60), 0)
            scores = {name: radius + rng.normal(0, 0.2, 60) for name in diversity.SCORES}
            facts = {"clean": right.mean(), "robust": (radius > 0.15).mean(), "right": right}
            models.append(
                {"loss": loss, "seed": seed, **facts, "radius": radius, "withstood": radius > 0.15, "scores": scores}
            )
    args = argparse.Namespace(dataset="digits", losses=losses, seeds=2, eps=0.15, suite="quick")
    lines = diversity.make_table(models, 60, args).splitlines()

    def figures(section, row, column):
        """Return the value of a cell and the ends of its interval."""
        start = next(number for number, line in enumerate(lines) if line.startswith(section))
        line = next(line for line in lines[start:] if line.startswith(f"| {row} |"))
        return [
            float(part)
            for part in line.split("|")[column + 1].replace("(", "").replace(")", "").replace("to", "").split()
        ]

    def rho(model, score):
        kept = model["right"]
        return stats.spearmanr(model["scores"][score][kept], model["radius"][kept]).statistic

    def over(some):
        means = [model["scores"]["entropy"][model["right"]].mean() for model in some]
        return stats.spearmanr(means, [model["robust"] for model in some]).statistic

    value, low, high = figures("Within a model, mean over 12", "entropy", 1)
    assert value == pytest.approx(np.mean([rho(model, "entropy") for model in models]), abs=0.006)
    assert low < value < high
    # Of one loss, against the normal approximation of a mean of two rhos.
    score = "variance, log space"
    value, low, high = figures("By loss", "cross-entropy", 5)
    assert value == pytest.approx(np.mean([rho(model, score) for model in models[:2]]), abs=0.006)
    assert high - low == pytest.approx(2 * 1.96 * (1 - value**2) / np.sqrt(2 * 54), rel=0.4)
    for column, some in ((1, models), (2, models[:10])):
        value, low, high = figures("Over models", "entropy", column)
        assert value == pytest.approx(over(some), abs=0.006)
        # Losses are drawn, each with both of its models.
        pairs = [some[number : number + 2] for number in range(0, len(some), 2)]
        drawn = rng.integers(0, len(pairs), (500, len(pairs)))
        draws = [over([model for number in row for model in pairs[number]]) for row in drawn]
        assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.12)


def test_bisection_finds_the_radius_of_a_linear_model():
    model, (x, y) = linear_model(), inputs(15)
    classifier = Classifier(model)
    right = classifier.logits(x).argmax(1) == y
    largest = 0.125
    found = diversity.breaking_radius(classifier, x[right], y[right], largest)
    expected = np.minimum(distance(x, y, "inf")[right], largest)
    np.testing.assert_allclose(found, expected, atol=largest / 2**diversity.LEVELS)
    assert 0 < (expected < largest).sum() < right.sum()
