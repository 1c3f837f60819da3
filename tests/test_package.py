import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras_drsl

ROOT = Path(__file__).parents[1]


def test_importing_it_loads_nothing_but_itself_and_keras():
    # Keras itself imports matplotlib where it is installed.
    code = """
import json, sys, keras
before = set(sys.modules)
import keras_drsl
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert loaded <= {"keras_drsl"} | set(sys.stdlib_module_names)


def test_public_names_are_documented():
    for name in keras_drsl.__all__:
        doc = getattr(keras_drsl, name).__doc__
        # What other functions return is made by them alone.
        made = name in ("RobustnessCurve", "RobustnessReport")
        for section in ("Args:",) if made else ("Args:", "Raises:", "Example:"):
            assert section in doc, (name, section)


def test_the_wheel_runs_the_readmes_five_lines_from_outside_the_tree(tmp_path):
    source = tmp_path / "source"
    for path in ("keras_drsl", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / path, source / path)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("keras_drsl-*.whl")
    assert keras_drsl.__version__ in wheel.name
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    assert (site / "keras_drsl" / "py.typed").exists()

    (five_lines,) = re.findall(r"## Five lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = f"{five_lines}\nimport keras_drsl.attacks.cleverhans; print(keras_drsl.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert "softmax_diversity" in done.stdout
    assert done.stdout.splitlines()[-1] == str(site / "keras_drsl" / "__init__.py")
