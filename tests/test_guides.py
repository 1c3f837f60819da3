"""The code of each guide runs from top to bottom."""

import re
from pathlib import Path

import pytest

GUIDES = sorted((Path(__file__).parents[1] / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


CASES = [
    pytest.param(
        path, marks=pytest.mark.slow if path.stem in ("binary-and-multilabel", "language") else (), id=path.stem
    )
    for path in GUIDES
]


@pytest.mark.parametrize("path", CASES)
def test_the_code_of_a_guide_runs(path):
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    report = namespace["report"]
    assert 0 <= report.robust_accuracy <= report.clean_accuracy
    # The last report of each guide but this one is on the predictions of its model.
    assert report.clean_accuracy == 1 or path.stem == "language"
