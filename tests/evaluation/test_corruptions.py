"""Common corruptions: what each does to an image, and what is measured on them."""

import itertools
import json
import math

import keras
import numpy as np
import pytest
from keras import layers

from keras_drsl import CorruptionReport, evaluate_corruptions
from keras_drsl.evaluation import CORRUPTIONS, corrupt
from keras_drsl.evaluation.corruptions import calibration_error

pytest.importorskip("skimage")
pytest.importorskip("albumentations")
RUN = [name for name, corruption in CORRUPTIONS.items() if corruption is not None]
GREY = np.full((32, 32, 1), 0.5)
RANDOM = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "fog", "elastic_transform"),
)
QUIET = {"verbose": 0, "max_samples": 8}


def photograph(channels=3, size=32, seed=0):
    """Return a smooth image with edges."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    planes = [0.5 + 0.3 * np.sin(7 * x + 3 * channel + seed) * np.cos(5 * y) for channel in range(channels)]
    image = np.stack(planes, axis=-1)
    image[size // 4 : size // 2, size // 4 : size // 2] = 0.9
    return image


def brightness_model(shape=(28, 28, 1)):
    """Return a model of two classes that says whether the mean of an image is above 1/2."""
    model = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(2)])
    size = math.prod(shape)
    model.layers[-1].set_weights([np.tile([-10 / size, 10 / size], (size, 1)), np.array([5.0, -5.0])])
    return model


def bright_and_dark(count=8, shape=(28, 28, 1)):
    levels = np.where(np.arange(count) % 2, 0.62, 0.38)
    return np.broadcast_to(levels[:, None, None, None], (count, *shape)).astype("float32"), np.arange(count) % 2


@pytest.mark.parametrize("name", RUN)
def test_images_depend_on_the_seed_only(name):
    image = photograph()
    first, again = (corrupt(image, name, 3, [7, 1]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == image.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert not np.array_equal(first, image)
    is_random = not np.array_equal(first, corrupt(image, name, 3, [7, 2]))
    assert is_random == (name in RANDOM)


@pytest.mark.parametrize("name", RUN)
def test_a_higher_severity_changes_an_image_more(name):
    distances = [
        np.mean([np.abs(corrupt(photograph(seed=i), name, severity, i) - photograph(seed=i)).mean() for i in range(8)])
        for severity in (1, 2, 3, 4, 5)
    ]
    assert distances[4] > distances[0]
    # Those of glass blur alternate between shorter and repeated shifts; pixels may fall on edges of the image.
    if name not in ("glass_blur", "pixelate"):
        assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(distances))


def test_noises_have_their_variance():
    image = np.full((128, 128, 1), 0.5)
    assert corrupt(image, "gaussian_noise", 5).std() == pytest.approx(0.1, rel=0.03)
    # A Poisson variable of mean m has the variance m.
    assert corrupt(image, "shot_noise", 5).std() == pytest.approx(math.sqrt(0.5 / 50), rel=0.03)
    impulses = corrupt(image, "impulse_noise", 5)
    assert np.isin(impulses, [0, 1]).mean() == pytest.approx(0.07, rel=0.15)


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"]
)
def test_an_even_image_stays_as_it_is(name):
    np.testing.assert_allclose(corrupt(GREY, name, 5), GREY, atol=0.003)


def test_contrast_and_brightness_are_their_formulas():
    image = photograph(channels=1)
    mean = image.mean()
    np.testing.assert_allclose(corrupt(image, "contrast", 3), (image - mean) * 0.4 + mean, atol=1e-12)
    np.testing.assert_allclose(corrupt(image, "brightness", 2), np.clip(image + 0.1, 0, 1), atol=1e-12)
    colours = photograph()
    brighter = corrupt(colours, "brightness", 2)
    np.testing.assert_allclose(brighter.max(axis=-1), np.clip(colours.max(axis=-1) + 0.1, 0, 1), atol=1e-6)


def test_a_defocus_blur_is_the_mean_over_a_disk():
    point = np.zeros((31, 31, 1))
    point[15, 15] = 1.0
    blurred = corrupt(point, "defocus_blur", 4)[..., 0]
    assert blurred.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(blurred, blurred.T)
    np.testing.assert_allclose(blurred, blurred[::-1])
    assert (blurred > 1e-3).sum() < 60


def test_how_many_run_for_the_usual_shapes():
    for shape, at_least in (((32, 32, 3), 12), ((28, 28, 1), 8)):
        x = np.stack([photograph(shape[2], shape[0], seed) for seed in range(2)]).astype("float32")
        report = evaluate_corruptions(brightness_model(shape), x, [0, 1], severities=[1], **QUIET)
        assert len(report.results) >= at_least
        assert set(report.results) | set(report.skipped) == set(CORRUPTIONS)
        assert "photographs" in report.skipped["frost"]


def test_accuracies_are_those_of_the_images():
    x, y = bright_and_dark()
    report = evaluate_corruptions(brightness_model(), x, y, corruptions=["brightness", "contrast"], **QUIET)
    assert report.clean["accuracy"] == 1
    # Dark images of 0.38 become bright above a change of 0.12.
    assert [row["accuracy"] for row in report.results["brightness"]] == [1, 1, 0.5, 0.5, 0.5]
    assert [row["accuracy"] for row in report.results["contrast"]] == [1] * 5
    assert report.mean_error == pytest.approx(1.5 / 10)
    assert "brightness" in str(report)


def test_images_in_bytes_are_those_in_shares():
    x, y = bright_and_dark()
    shares = evaluate_corruptions(brightness_model(), x, y, corruptions=["gaussian_noise", "brightness"], **QUIET)
    rescaled = keras.Sequential([keras.Input((28, 28, 1)), layers.Rescaling(1 / 255), brightness_model()])
    in_bytes = evaluate_corruptions(
        rescaled, 255 * x, y, clip_max=255, corruptions=["gaussian_noise", "brightness"], **QUIET
    )
    for name, rows in shares.results.items():
        assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in in_bytes.results[name]]


def test_errors_relative_to_a_baseline():
    results = {
        "a": [{"accuracy": 0.8, "baseline_accuracy": 0.6}, {"accuracy": 0.6, "baseline_accuracy": 0.4}],
        "b": [{"accuracy": 0.5, "baseline_accuracy": 0.75}, {"accuracy": 0.5, "baseline_accuracy": 0.75}],
    }
    for rows in results.values():
        for row in rows:
            row["calibration_error"] = 0.1
    clean = {"accuracy": 1.0, "baseline_accuracy": 1.0, "calibration_error": 0.0}
    report = CorruptionReport({"severities": [1, 2], "examples": 20}, results, clean, {}, {})
    assert report.relative_error == pytest.approx((0.6 / 1.0 + 1.0 / 0.5) / 2)
    assert report.mean_error == pytest.approx(0.4)


def test_a_model_is_its_own_baseline(tmp_path):
    pytest.importorskip("matplotlib")
    x, y = bright_and_dark()
    model = brightness_model()
    report = evaluate_corruptions(model, x, y, baseline=model, corruptions=["brightness"], **QUIET)
    assert report.relative_error == 1
    report.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["relative_error"] == 1
    assert CorruptionReport.from_json(tmp_path / "report.json").to_dict() == report.to_dict()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("clean"), "clean"),
        (lambda content: content["results"].clear(), "a corruption"),
        (lambda content: content["results"]["brightness"][0].update(accuracy=1.5), "brightness.accuracy"),
        (lambda content: content["results"]["brightness"][0].pop("baseline_accuracy"), "a baseline"),
        (lambda content: content.update(mean_error=0.9), "mean_error"),
        (lambda content: content["results"].update(brightness=3), "results"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change, reason, tmp_path):
    model, path = brightness_model(), tmp_path / "report.json"
    evaluate_corruptions(model, *bright_and_dark(), baseline=model, corruptions=["brightness"], **QUIET).to_json(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"CorruptionReport.to_json.*{reason}"):
        CorruptionReport.from_json(path)


def test_the_calibration_error_is_that_by_hand():
    # Two bins: (0.5 sure, 1 of 2 right), (0.95 sure, 1 of 2 right).
    confidence, are_right = np.array([0.5, 0.5, 0.95, 0.95]), np.array([True, False, True, False])
    assert calibration_error(confidence, are_right) == pytest.approx(0.5 * 0.0 + 0.5 * 0.45)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"corruptions": ["rain"]}, "`corruptions` must be one of"),
        ({"corruptions": "fog"}, "`corruptions` must hold names"),
        ({"corruptions": ["frost"]}, "`corruptions` must leave one"),
        ({"corruptions": ["fog"]}, "`corruptions` must leave one"),
        ({"severities": [6]}, "`severities` must be one of"),
        ({"severities": []}, "`severities` must hold"),
        ({"severities": 3}, "`severities` must hold some"),
        ({"clip_max": 0.1}, "`x_or_dataset`"),
        ({"clip_max": None}, "`clip_max` must be a number above 0"),
        ({"clip_max": 0.0}, "`clip_max` must be a number above 0"),
        ({"baseline": lambda x: x}, "`baseline` must be a keras.Model"),
    ],
)
def test_bad_arguments_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        evaluate_corruptions(brightness_model(), *bright_and_dark(), **QUIET | options)


def test_inputs_that_are_no_images_are_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="must hold images"):
        evaluate_corruptions(model, np.ones((4, 8)), [0, 1, 0, 1], verbose=0)


def test_a_baseline_of_other_classes_is_refused():
    other = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(5)])
    with pytest.raises(ValueError, match="`baseline` must have the 2 classes"):
        evaluate_corruptions(brightness_model(), *bright_and_dark(), baseline=other, corruptions=["contrast"], **QUIET)


@pytest.mark.parametrize("image", [255 * GREY, GREY[..., 0], GREY[:0]])
def test_arrays_that_are_no_image_are_refused(image):
    with pytest.raises(ValueError, match="`image` must hold values in"):
        corrupt(image, "contrast", 1)
