import shutil
from pathlib import Path

import pytest

from studies import robustness
from tests.backends import on_tensorflow

RESULTS = Path(__file__).parents[2] / "results"


@on_tensorflow
@pytest.mark.parametrize(
    ("dataset", "arguments"),
    [("digits", []), ("mnist", ["--noise", "0", "0.3", "--eps", "0.1", "0.2", "--max-images", "300"])],
)
def test_published_reports_are_tabled_again(dataset, arguments, tmp_path, monkeypatch):
    for path in RESULTS.glob(f"robustness_{dataset}_*.json"):
        shutil.copy(path, tmp_path)
    # The reports are finished: neither data nor models are needed.
    monkeypatch.setattr("keras_drsl.datasets.load", lambda *arguments: ((None, None), (None, None)))
    monkeypatch.setattr("keras.models.load_model", lambda *arguments, **options: None)
    (tmp_path / "models").mkdir()
    for noise in ("0", "0.3"):
        for loss in ("ce", "drs"):
            (tmp_path / "models" / f"{dataset}_{loss}_noise{noise}.keras").touch()
    robustness.main(["--dataset", dataset, *arguments, "--out", str(tmp_path)])
    before, after = (rows(folder / f"robustness_{dataset}.md") for folder in (RESULTS, tmp_path))
    assert after == before
    assert len(before) > 5


def rows(path):
    """Return the rows of the table of a file."""
    return [line for line in path.read_text().splitlines() if line.startswith("|")]
