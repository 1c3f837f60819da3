"""The notebooks, and the example for Keras's own documentation, run from top to bottom."""

import ast
import re
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.backends import BACKEND

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
SHORTEST = "2_a_model_and_a_folder"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem == SHORTEST else pytest.mark.slow, id=path.stem)
        for path in sorted(FOLDER.glob("*.ipynb"))
    ],
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for library in ("matplotlib", "sklearn", "scipy"):
        pytest.importorskip(library)
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    # What a reader would take out before a commit.
    assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)


@pytest.mark.slow
def test_the_example_for_keras_runs(monkeypatch, capsys):
    random = np.random.default_rng(0)
    places, labels = random.integers(0, 10, 600), random.integers(0, 3, 600)
    # Bars of three brightnesses.
    images = np.zeros((600, 28, 28), "uint8")
    images[np.arange(600), places] = np.array([60, 150, 250])[labels, None]
    data = (images[:500], labels[:500]), (images[500:], labels[500:])
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: data)
    path = FOLDER.parent / "keras_io" / "robust_image_classification.py"
    text = path.read_text(encoding="utf-8")
    head = dict(re.findall(r"^(\w[\w ]*): (.+)$", ast.get_docstring(ast.parse(text)), re.MULTILINE))
    assert list(head) == ["Title", "Author", "Date created", "Last modified", "Description", "Accelerator"]
    exec(compile(text, path, "exec"), {})
    assert "under attack" in capsys.readouterr().out
