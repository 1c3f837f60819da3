import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keras_drsl
from tests.helpers import run_python

ROOT = Path(__file__).parents[1]


def test_importing_it_loads_itself_and_keras_only():
    # Keras itself imports matplotlib where it is installed.
    code = """
    import json, sys, keras
    before = set(sys.modules)
    import keras_drsl
    print(json.dumps(sorted(set(sys.modules) - before)))
    """
    loaded = {name.split(".")[0] for name in json.loads(run_python(code).stdout.splitlines()[-1])}
    assert loaded <= {"keras_drsl"} | set(sys.stdlib_module_names)


def test_public_names_are_documented():
    for name in keras_drsl.__all__:
        doc = getattr(keras_drsl, name).__doc__
        # These are made by functions only.
        made = name.endswith(("Comparison", "Distances", "Curve", "Report"))
        for section in ("Args:",) if made else ("Args:", "Raises:", "Example:"):
            assert section in doc, (name, section)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in ("keras_drsl", "keras_drsl_command.py", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        copy(ROOT / path, source / path)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (path,) = folder.glob("keras_drsl-*.whl")
    return path


def test_the_wheel_runs_from_outside_the_tree(wheel, tmp_path):
    assert keras_drsl.__version__ in wheel.name
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    assert (site / "keras_drsl" / "py.typed").exists()
    code = """
    import keras, keras_drsl, numpy as np
    import keras_drsl.attacks.cleverhans
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(optimizer="adam", loss=keras_drsl.DRSLoss(lam=0.3), metrics=[keras_drsl.SoftmaxDiversity()])
    history = model.fit(np.random.rand(32, 8), np.arange(32) % 3, verbose=0)
    report = keras_drsl.evaluate_robustness(model, np.random.rand(8, 8), np.arange(8) % 3, eps=0.1, suite="quick")
    report.to_html("report.html")  # by a template that lies in the package
    print(sorted(history.history), keras_drsl.__file__)
    """
    done = run_python(code, env={"PYTHONPATH": str(site)}, cwd=tmp_path)
    expected = f"['loss', 'softmax_diversity'] {site / 'keras_drsl' / '__init__.py'}"
    assert done.stdout.splitlines()[-1] == expected
    assert "8 test examples" in (tmp_path / "report.html").read_text(encoding="utf-8")


DATA = os.environ.get("TFDS_DATA_DIR", "")


@pytest.mark.skipif(not Path(DATA, "mnist").exists(), reason="needs MNIST under the folder that TFDS_DATA_DIR names")
def test_mnist_loads_through_tensorflow_datasets():
    (x_train, y_train), (x_test, y_test) = keras_drsl.datasets.load("mnist", DATA)
    assert x_train.shape == (60000, 28, 28, 1)
    assert x_test.shape == (10000, 28, 28, 1)
    assert (x_train.min(), x_train.max(), x_train.dtype) == (0, 1, "float32")
    assert len(y_train) == 60000
    # The published counts of the classes.
    counts = [0] * 10
    for label in y_test.tolist():
        counts[label] += 1
    assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
