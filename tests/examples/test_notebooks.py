"""The notebooks run from top to bottom."""

from pathlib import Path

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
