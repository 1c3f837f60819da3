"""A folder of images with one sub-folder per class."""

import json
import shutil

import keras
import numpy as np
import pytest
from keras import layers

import keras_drsl
from keras_drsl import cli, datasets, evaluate_robustness, robustness_curve
from keras_drsl._intervals import wilson

pytest.importorskip("tensorflow")
pytest.importorskip("PIL")

CLASSES = ("apple", "bird", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 20 images per class; the channel of the class is the brightest."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for class_id, name in enumerate(CLASSES):
        (root / name).mkdir()
        for number in range(20):
            image = rng.integers(90, 110, (6, 5, 3))
            image[..., class_id] += 4 + number
            keras.utils.save_img(root / name / f"{number:02}.png", image, scale=False)
    return root


@pytest.fixture(scope="module")
def model():
    """Return a model that compares the means of the channels: an image falls at half the lead of its channel."""
    mean = layers.GlobalAveragePooling2D()
    dense = layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((6, 5, 3)), layers.Rescaling(1 / 255), mean, dense])
    dense.set_weights([100 * np.eye(3)])
    return model


def test_images_labels_and_names_are_those_of_the_files(folder):
    found = datasets.load_folder(folder)
    assert found.x.shape == (60, 6, 5, 3)
    assert found.x.dtype == "float32"
    assert found.class_names == list(CLASSES)
    assert len(set(found.files)) == 60
    for x, y, file in zip(found.x, found.y, found.files, strict=True):
        assert file.startswith(f"{CLASSES[y]}/")
        np.testing.assert_array_equal(x, keras.utils.img_to_array(keras.utils.load_img(folder / file)))
    assert datasets.load_folder(folder, (3, 3, 1)).x.shape == (60, 3, 3, 1)


def test_the_verdict_is_exact_and_has_names(folder, model):
    report = evaluate_robustness(model, folder, eps=6, clip_max=255, suite="quick", verbose=0)
    images = datasets.load_folder(folder)
    means = images.x.astype("float64").mean((1, 2))
    lead = np.sort(means)[:, ::-1]
    # L-inf moves each mean by eps: the lead of the largest one over the next shrinks by twice that.
    robust = lead[:, 0] - lead[:, 1] > 12
    assert 10 < robust.sum() < 50
    assert [name is None for name in report.per_example["broken_by"]] == robust.tolist()
    assert report.per_example["file"] == images.files
    assert report.per_example["prediction"] == means.argmax(1).tolist()
    assert report.provenance["classes"] == list(CLASSES)
    for class_id, found in report.by_class.items():
        of_class = robust[images.y == class_id]
        assert found == (20, 1.0, of_class.mean(), wilson(of_class.sum(), 20))
    shares = ", ".join(f"{name} {robust[images.y == k].mean():.1%}" for k, name in enumerate(CLASSES))
    assert f"robust by class {shares}" in " ".join(str(report).split())


def test_shards_states_and_files_keep_the_names(folder, model, tmp_path):
    options = {"eps": 6, "clip_max": 255, "suite": "quick", "verbose": 0}
    whole = evaluate_robustness(model, str(folder), **options, max_samples=30, state_path=tmp_path / "state")
    parts = [evaluate_robustness(model, folder, **options, max_samples=30, shard=(i, 2)) for i in range(2)]
    merged = keras_drsl.RobustnessReport.merge(parts)
    assert merged.per_example == whole.per_example
    assert merged.provenance["classes"] == list(CLASSES)
    whole.to_json(tmp_path / "report.json")
    assert str(keras_drsl.RobustnessReport.from_json(tmp_path / "report.json")) == str(whole)
    content = json.loads((tmp_path / "report.json").read_text())
    content["provenance"]["classes"] = ["apple"]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`provenance.classes` must name the class of each label"):
        keras_drsl.RobustnessReport.from_json(tmp_path / "wrong.json")


def test_classes_in_another_order_are_named(folder, model):
    def clean_accuracy(images):
        report = evaluate_robustness(model, images, eps=1, clip_max=255, suite="quick", checks="quick", verbose=0)
        return next(check for check in report.checks if check.name == "clean_accuracy")

    images = datasets.load_folder(folder)
    found = clean_accuracy(images._replace(y=np.array([0, 2, 1])[images.y]))
    assert (found.status, found.value) == ("warn", pytest.approx(1 / 3))
    assert found.message.endswith("seem to be in another order: bird as cat, cat as bird")
    found = clean_accuracy(images._replace(y=np.array([1, 2, 0])[images.y]))
    assert found.message.endswith("another order: apple as cat, bird as apple, cat as bird")
    assert clean_accuracy(images).status == "pass"
    # A model may have more classes than the folder names.
    dense = layers.Dense(5, use_bias=False)
    larger = keras.Sequential(
        [keras.Input((6, 5, 3)), layers.Rescaling(1 / 255), layers.GlobalAveragePooling2D(), dense]
    )
    dense.set_weights([100 * np.eye(5)[[3, 4, 0]]])
    report = evaluate_robustness(
        larger, images, eps=1, clip_max=255, suite="quick", checks=["clean_accuracy"], verbose=0
    )
    assert "another order: apple as 3, bird as 4, cat as apple; 3 sub-folders for 5" in report.checks[0].message
    # Two examples of a class say nothing.
    few = np.flatnonzero((images.y == 0) | (np.arange(60) % 20 < 2))
    some = images._replace(x=images.x[few], y=np.array([0, 2, 1])[images.y[few]], files=[images.files[i] for i in few])
    assert "another order" not in clean_accuracy(some).message
    # Without an order: two classes are predicted as the same one, or only some of their images are.
    rng = np.random.default_rng(0)
    for y in (np.array([0, 0, 1])[images.y], rng.integers(0, 3, 60)):
        assert "another order" not in clean_accuracy(images._replace(y=y)).message


def test_a_curve_takes_a_folder(folder, model):
    curve = robustness_curve(model, folder, eps=[0, 6], clip_max=255, suite="quick", verbose=0)
    assert 0.2 < curve.accuracy[1] < curve.accuracy[0] == 1


def test_the_command_takes_a_folder_and_a_file(folder, model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model.save(tmp_path / "model.keras")
    command = ["evaluate", str(tmp_path / "model.keras"), "--dataset", str(folder), "--quiet", "--clip-max", "255"]
    files = ["--out", str(tmp_path / "report.json"), "--plot", str(tmp_path / "curve.png")]
    assert cli.main([*command, "--eps", "6", "--suite", "quick", *files]) == 0
    printed = capsys.readouterr().out
    assert "robust by class  apple" in printed
    assert "eps 6 of 0..255" in printed
    assert (tmp_path / "curve.png").exists()
    # The eps of [0, 1] in the wrong units.
    assert cli.main([*command, "--eps", "8/255", "--suite", "quick"]) == 0
    assert "WARN: units" in capsys.readouterr().out


def test_folders_that_cannot_be_read_are_named(folder, model, tmp_path):
    options = {"eps": 6, "clip_max": 255, "suite": "quick", "verbose": 0}
    with pytest.raises(ValueError, match="`path` must be a folder that exists. Received: path='.*nowhere'"):
        evaluate_robustness(model, tmp_path / "nowhere", **options)
    with pytest.raises(ValueError, match=r"one sub-folder of images .* with 0 sub-folders, 0 images in them"):
        evaluate_robustness(model, tmp_path, **options)
    with pytest.raises(ValueError, match="with 0 sub-folders, 0 images in them and 20 beside them"):
        evaluate_robustness(model, folder / "cat", **options)
    with pytest.raises(ValueError, match="`y` must be None for a folder of images"):
        evaluate_robustness(model, folder, np.zeros(60), **options)
    with pytest.raises(
        ValueError, match=r"Images in \[0, 255\] need clip_max=255; the usual 8/255 of \[0, 1\] is eps=8"
    ):
        evaluate_robustness(model, folder, eps=0.1, suite="quick", verbose=0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no image")
    for shape in [(None, None, None), (4, 4, 3)]:
        keras.utils.save_img(tmp_path / "a" / "0.png", np.zeros((4, 4, 3)), scale=False)
        with pytest.raises(ValueError, match="`path` must hold images that can be read. Received: '.*b.0.png'"):
            datasets.load_folder(tmp_path, shape)
    for name, size in (("a", 4), ("b", 5)):
        keras.utils.save_img(tmp_path / name / "0.png", np.zeros((size, 4, 3)), scale=False)
    with pytest.raises(ValueError, match="`path` must hold images of one size where the model takes any size"):
        datasets.load_folder(tmp_path)


def test_the_folder_of_all_splits_is_refused(tmp_path, folder):
    for name in ("train", "Test"):
        shutil.copytree(folder, tmp_path / name)
    with pytest.raises(ValueError, match="with Test, train: give one of them, as '.*Test'"):
        datasets.load_folder(tmp_path)
    assert len(datasets.load_folder(tmp_path / "Test").x) == 60


def test_other_numbers_of_classes_are_named(folder, model, tmp_path):
    options = {"eps": 6, "clip_max": 255, "suite": "quick"}
    two = keras.Sequential([keras.Input((6, 5, 3)), layers.GlobalAveragePooling2D(), layers.Dense(2)])
    expected = (
        "`model` must have an output for each of the 3 sub-folders: apple, bird, cat. Received: a model of 2 classes"
    )
    for measure in (evaluate_robustness, robustness_curve):
        with pytest.raises(ValueError, match=expected):
            measure(two, folder, **options | {"eps": [3, 6] if measure is robustness_curve else 6}, verbose=0)
    monitor = keras_drsl.RobustnessMonitor(str(folder), **options)
    two.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=expected):
        two.fit(np.zeros((4, 6, 5, 3)), np.zeros(4), callbacks=[monitor], verbose=0)
    # The class without images is the first one, so that both others have another id.
    for name in ("bird", "cat"):
        shutil.copytree(folder / name, tmp_path / name)
    options |= {"checks": ["clean_accuracy"], "verbose": 0}
    (found,) = evaluate_robustness(model, tmp_path, **options).checks
    assert found.status == "warn"
    assert "2 sub-folders for 3 classes: add an empty one for each class without images" in found.message
    (tmp_path / "apple").mkdir()
    report = evaluate_robustness(model, tmp_path, **options)
    assert (report.clean_accuracy, report.checks[0].status) == (1, "pass")
    assert report.provenance["classes"] == list(CLASSES)
