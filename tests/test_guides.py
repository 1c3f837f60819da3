"""The code of each guide runs from top to bottom."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.backends import BACKEND
from tests.helpers import run_python, some_short

FOLDER = Path(__file__).parents[1] / "docs" / "guides"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# These train a model on digits, and the one on language on random texts.
TRAINED = ("drsloss", "measure", "compare", "adversarial-training", "publish", "language")
SEVERAL_DEVICES = FOLDER / "devices.md"
GUIDES = sorted(set(FOLDER.glob("*.md")) - {SEVERAL_DEVICES})
SLOW = ("binary-and-multilabel", "language", "compare", "publish")

CASES = [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else (), id=path.stem) for path in GUIDES]


@pytest.mark.parametrize("path", CASES)
def test_the_code_of_a_guide_runs(path):
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    report = namespace["report"]
    assert 0 <= report.robust_accuracy <= report.clean_accuracy
    # The last report of each guide that trains nothing is on the predictions of its model.
    assert report.clean_accuracy == 1 or path.stem in TRAINED


@pytest.mark.parametrize("name", some_short(["certificates", "shift"], more=["shift"]))
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    for module in ("skimage", "albumentations", "matplotlib") if name == "shift" else ("matplotlib", "jinja2"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    x, y = random.random((40, 28, 28, 1)).astype("float32"), np.arange(40) % 3
    namespace = dict.fromkeys(("x_train", "x_test"), x) | dict.fromkeys(("y_train", "y_test"), y)
    for model in ("model", "plain_model"):
        namespace[model] = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(4, activation="relu"),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )
    page = (FOLDER.parent / f"{name}.md").read_text(encoding="utf-8")
    # Fewer images, as this is about the code.
    for block in BLOCK.findall(re.sub(r"max_samples=[\d_]+", "max_samples=4", page)):
        exec(block, namespace)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"} | ({".html"} if name == "certificates" else set())


@pytest.mark.more
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no replicas on torch")
def test_the_guide_to_several_devices_runs(tmp_path):
    blocks = BLOCK.findall(SEVERAL_DEVICES.read_text(encoding="utf-8"))
    assert len(blocks) == 2
    printed = run_python(blocks[BACKEND == "jax"], cwd=tmp_path).stdout
    if BACKEND == "jax":
        assert (tmp_path / "robust.keras").exists()
    else:
        assert "robust accuracy" in printed
