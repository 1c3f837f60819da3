"""The extensions in CONTRIBUTING.md run as a third-party package that uses public names only."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Write the files of CONTRIBUTING.md to a folder outside the checkout."""
    folder = tmp_path_factory.mktemp("third_party")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(code)
    return folder


def test_extensions_import_public_names_only(package):
    files = sorted(package.glob("*.py"))
    assert {"brier.py", "sign_search.py", "class_balance.py", "logit_pairing.py", "csv_report.py"} <= {
        path.name for path in files
    }
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None) or ""]
            parts = [part for name in names if isinstance(name, str) for part in name.split(".")]
            assert not any(part.startswith("_") for part in parts), (path.name, parts)
            assert not (isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr != "__init__")


def test_extensions_work_from_outside_the_checkout(package):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
    command = [sys.executable, "use_them.py"]
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-3:] == [
        "brier 2.0",
        "['class_balance'] ['pgd_margin', 'signsearch']",
        "index,label,broken_by",
    ]
