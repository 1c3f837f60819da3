import json

import keras
import numpy as np
import pytest

from studies import shift
from tests.backends import BACKEND, on_tensorflow


@pytest.mark.slow
@on_tensorflow
def test_models_are_measured_and_tabled(tmp_path):
    for library in ("sklearn", "scipy", "skimage", "albumentations"):
        pytest.importorskip(library)
    arguments = ["--quick", "--backend", BACKEND, "--out", str(tmp_path)]
    shift.main(arguments)
    path = tmp_path / "shift_digits_quick.jsonl"
    for record in map(json.loads, path.read_text().splitlines()):
        assert record["control"]["verdicts_that_differ"] == 0
    shift.main(arguments, run=lambda *arguments: pytest.fail("A run was repeated."))
    assert path.with_suffix(".md").read_text().count("| Density-Softmax |") == 2


def test_shifts_do_what_their_names_say():
    pytest.importorskip("scipy")
    image = np.zeros((1, 9, 9, 1), "float32")
    image[0, 4, 6] = 1.0
    turned = shift.shifted(image, "rotation", 90, 0)[0, ..., 0]
    assert turned.argmax() in (2 * 9 + 4, 6 * 9 + 4)
    assert turned.max() == pytest.approx(1, abs=1e-5)
    blurred = shift.shifted(image, "blur", 0.1, 0)
    assert blurred.sum() == pytest.approx(1, abs=1e-3)
    assert 0 < blurred.max() < 0.5
    flat = shift.shifted(image, "contrast", 0.5, 0)
    assert flat.std() == pytest.approx(image.std() / 2, rel=1e-5)
    assert flat.mean() == pytest.approx(image.mean(), rel=1e-5)
    grey = np.full((4, 64, 64, 1), 0.5, "float32")
    assert shift.shifted(grey, "noise", 0.1, 0).std() == pytest.approx(0.1, rel=0.02)


def test_quality_is_that_of_the_softmax():
    pytest.importorskip("scipy")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Identity()])
    found = shift.quality(model, np.log([[0.75, 0.25], [0.75, 0.25]]).astype("float32"), np.array([0, 1]))
    assert found["accuracy"] == 0.5
    assert found["calibration_error"] == pytest.approx(0.25, abs=1e-6)
    assert found["nll"] == pytest.approx(-np.log([0.75, 0.25]).mean(), abs=1e-6)
