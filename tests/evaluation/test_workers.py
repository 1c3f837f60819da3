"""Evaluations by several processes: equal reports, workers that die, and what cannot be sent."""

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from keras_drsl import evaluate_robustness
from keras_drsl.attacks import APGD, Noise
from tests.layers import Random
from tests.linear import inputs, linear_model

pytest.importorskip("joblib")

OPTIONS = {"eps": 0.1, "checks": ["clean_accuracy", "restarts"], "batch_size": 8, "verbose": 0}


class Deadly(Noise):
    """Noise that kills its process, unless that is the one of the test, as often as there are files to delete."""

    def __init__(self, eps=None, *, folder="", **options):
        super().__init__(eps, points=3, **options)
        self.folder = folder
        self.parent = os.getpid()

    def run(self, classifier, batch):
        lives = sorted(Path(self.folder).iterdir())
        if lives and os.getpid() != self.parent:
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(classifier, batch)


def content(report):
    """Return what does not depend on time."""
    found = report.to_dict()
    return {
        "settings": found["settings"],
        "per_example": found["per_example"],
        "checks": found["checks"],
        "attacks": [
            {name: value for name, value in attack.items() if "seconds" not in name} for attack in found["attacks"]
        ],
        "provenance": found["provenance"],
    }


def attacks():
    return [APGD(0.1, steps=10), APGD(0.1, loss="margin", targeted=True, steps=10), Noise(0.1, points=5)]


@pytest.mark.parametrize("workers", ["processes:2", pytest.param("ray", marks=pytest.mark.slow)])
def test_the_report_is_that_of_one_process(workers):
    if workers == "ray":
        pytest.importorskip("ray")
    x, y = inputs(40)
    reports = [
        evaluate_robustness(linear_model(), x, y, attacks=attacks(), workers=some, keep_examples=True, **OPTIONS)
        for some in (None, workers)
    ]
    assert 0 < reports[0].robust_accuracy < reports[0].clean_accuracy
    assert content(reports[1]) == content(reports[0])
    np.testing.assert_array_equal(reports[1].x_adv, reports[0].x_adv)


@pytest.mark.parametrize("workers", ["processes:2", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_batch_of_a_dead_worker_is_attacked_again(workers, tmp_path):
    if workers == "ray":
        pytest.importorskip("ray")
    x, y = inputs(40)
    folder = tmp_path / "lives"
    folder.mkdir()
    attack = Deadly(0.1, folder=str(folder))
    expected = evaluate_robustness(linear_model(), x, y, attacks=[attack], **OPTIONS)
    (folder / "0").touch()
    report = evaluate_robustness(linear_model(), x, y, attacks=[attack], workers=workers, **OPTIONS)
    assert list(folder.iterdir()) == []
    assert content(report) == content(expected)


@pytest.mark.more
def test_workers_that_die_again_and_again_leave_the_state(tmp_path):
    x, y = inputs(40)
    folder, state = tmp_path / "lives", tmp_path / "e.state"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}").touch()
    run = [APGD(0.1, steps=10), Deadly(0.1, folder=str(folder))]
    with pytest.raises(RuntimeError, match="`workers` died 4 times before one more batch of deadly was done"):
        evaluate_robustness(linear_model(), x, y, attacks=run, workers="processes:2", state_path=state, **OPTIONS)
    assert "apgd_ce" in state.read_text()
    report = evaluate_robustness(linear_model(), x, y, attacks=run, state_path=state, **OPTIONS)
    assert content(report) == content(evaluate_robustness(linear_model(), x, y, attacks=run, **OPTIONS))


@pytest.mark.parametrize("workers", ["processes", "processes:0", "threads:2", 4, True, ""])
def test_unknown_workers_are_refused(workers):
    x, y = inputs(8)
    with pytest.raises(ValueError, match='`workers` must be "processes:N", "ray" or None. Received: workers='):
        evaluate_robustness(linear_model(), x, y, workers=workers, **OPTIONS)


@pytest.mark.parametrize(("workers", "package"), [("processes:2", "joblib"), ("ray", "ray")])
def test_a_missing_package_is_told(workers, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    x, y = inputs(8)
    with pytest.raises(ImportError, match=f"needs `pip install {package} cloudpickle`"):
        evaluate_robustness(linear_model(), x, y, workers=workers, **OPTIONS)


@keras.saving.register_keras_serializable(package="tests")
class Scaled(layers.Layer):
    """A layer with an attribute that Keras does not save."""

    factor = 1.0

    def call(self, x):
        return self.factor * x


def test_a_model_that_changes_when_it_is_loaded_is_refused():
    model = linear_model()
    scaled = keras.Sequential([keras.Input((4,)), Scaled(), *model.layers])
    scaled.layers[0].factor = 5.0
    x, y = inputs(8)
    with pytest.raises(ValueError, match="it returns other outputs after it was loaded"):
        evaluate_robustness(scaled, x, y, workers="processes:1", **OPTIONS)


@pytest.mark.more
def test_a_random_model_has_the_report_of_one_process():
    x, y = inputs(40)
    model = keras.Sequential([keras.Input((4,)), Random(0.05), *linear_model().layers])
    options = OPTIONS | {"attacks": attacks()[:2], "expectation_draws": 4, "checks": []}
    reports = [evaluate_robustness(model, x, y, workers=some, **options) for some in (None, "processes:2")]
    assert 0 < reports[0].robust_accuracy < reports[0].clean_accuracy
    assert content(reports[1]) == content(reports[0])


def test_a_model_that_cannot_be_saved_is_refused():
    class Unregistered(layers.Layer):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def call(self, x):
            return self.function(x)

    x, y = inputs(8)
    model = keras.Sequential([keras.Input((4,)), Unregistered(lambda x: 2 * x), linear_model()])
    with pytest.raises(ValueError, match="`model` must be one that Keras can save and load, to be sent to `workers`"):
        evaluate_robustness(model, x, y, workers="processes:2", **OPTIONS)


def test_embeddings_are_attacked_in_one_process():
    tokens = np.arange(20).reshape(5, 4) % 7
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), layers.Embedding(7, 3), layers.Flatten(), layers.Dense(2)]
    )
    options = {"attack_input": "embeddings", "clip_min": -3, "clip_max": 3, "workers": "processes:2"}
    with pytest.raises(ValueError, match="`workers` must be None where embeddings are attacked"):
        evaluate_robustness(model, tokens, np.arange(5) % 2, **OPTIONS, **options)
