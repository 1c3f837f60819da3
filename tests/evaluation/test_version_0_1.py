"""Models and reports of version 0.1.0, written by tests/fixtures/make_0_1.py, load and mean the same."""

from pathlib import Path

import keras
import numpy as np
import pytest

import keras_drsl
from tests.backends import on_tensorflow

FOLDER = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def model():
    return keras.models.load_model(FOLDER / "digits_0.1.keras")


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("sklearn")
    x, y = keras_drsl.datasets.load("digits")[1]
    return x[:200], y[:200]


@pytest.fixture(scope="module")
def before():
    return keras_drsl.RobustnessReport.from_json(FOLDER / "digits_0.1_report.json")


def test_a_model_loads_with_its_loss_and_metric(model, images):
    outputs = np.load(FOLDER / "digits_0.1_outputs.npz")["outputs"]
    np.testing.assert_allclose(model.predict(images[0], verbose=0), outputs, atol=1e-5)
    assert isinstance(model.loss, keras_drsl.DRSLoss)
    assert model.loss.lam == 0.3
    assert "softmax_diversity" in model.evaluate(*images, verbose=0, return_dict=True)


def test_a_report_loads_and_is_written_as_format_2(before, tmp_path):
    assert before.num_examples == 200
    assert (before.clean_accuracy, before.robust_accuracy) == (0.965, 0.54)
    names = {check.name for check in before.checks}
    assert {"attack_self_test", "many_steps_beat_one", "larger_eps"} <= names
    assert not {"control", "steps_beat_one", "budget"} & names
    before.to_json(tmp_path / "report.json")
    again = keras_drsl.RobustnessReport.from_json(tmp_path / "report.json")
    assert again.to_dict()["format"] == 2
    assert again.to_dict() == before.to_dict()


def verdicts(report):
    return [by if by in (None, "clean") else "broken" for by in report.per_example["broken_by"]]


@on_tensorflow
@pytest.mark.slow
def test_each_verdict_is_the_same(model, images, before):
    half = tuple(part[:100] for part in images)
    report = keras_drsl.evaluate_robustness(model, *half, x_pool=images, eps=0.12, verbose=0)
    for name in ("index", "label"):
        assert report.per_example[name] == before.per_example[name][:100]
    # Random starts are drawn otherwise since then, so another attack may be the first to break an example.
    assert verdicts(report) == verdicts(before)[:100]
    assert [attack["settings"] for attack in report.attacks] == [attack["settings"] for attack in before.attacks]


def test_model_and_data_have_the_same_fingerprints(model, images, before):
    report = keras_drsl.evaluate_robustness(model, *images, eps=0.12, attacks=["fgsm_ce"], checks=[], verbose=0)
    for key in ("model", "data"):
        assert report.provenance[key] == before.provenance[key]


def test_a_state_is_refused_with_the_version_that_reads_it(model, images, tmp_path):
    path = tmp_path / "digits.state"
    path.write_bytes((FOLDER / "digits_0.1.state").read_bytes())
    with pytest.raises(ValueError, match=r"keras-drsl 0\.1\.0 is the last that reads it"):
        keras_drsl.evaluate_robustness(model, *images, eps=0.12, state_path=path, verbose=0)
    assert path.read_bytes() == (FOLDER / "digits_0.1.state").read_bytes()
