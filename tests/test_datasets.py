"""Data sets that are loaded by name."""

import keras
import numpy as np
import pytest

from keras_drsl import cli, datasets
from keras_drsl.evaluation.reading import image_shape

tfds = pytest.importorskip("tensorflow_datasets")


def prepare(folder, dataset, shape, sizes, splits=("train", "test"), label=None):
    """Write a data set of images as tensorflow-datasets keeps it, and return the images and labels of each split."""
    rng = np.random.default_rng(0)
    kept = {
        split: [(rng.integers(0, 256, (*size, 3), "uint8"), number % 2) for number, size in enumerate(sizes)]
        for split in splits
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = dataset

        def _info(self):
            kind = label or tfds.features.ClassLabel(num_classes=2)
            features = {"image": tfds.features.Image(shape=shape, encoding_format="png"), "label": kind}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number, (image, class_id) in enumerate(kept[split]):
                yield number, {"image": image, "label": class_id if label is None else [class_id]}

    Builder(data_dir=folder).download_and_prepare()
    return kept


def as_rows(examples):
    """Return examples in an order of their own, as tensorflow-datasets shuffles what it writes."""
    return sorted((image.tolist(), int(class_id)) for image, class_id in examples)


def test_any_data_set_of_images_is_loaded_by_name(tmp_path):
    kept = prepare(tmp_path, "tiny_images", (4, 3, 3), [(4, 3)] * 6)
    loaded = dict(zip(("train", "test"), datasets.load("tiny_images", tmp_path), strict=True))
    loaded["test alone"] = datasets.load_test("tiny_images", tmp_path)
    kept["test alone"] = kept["test"]
    for split, (x, y) in loaded.items():
        assert (x.shape, x.dtype) == ((6, 4, 3, 3), "float32")
        grey_levels = np.rint(x * 255).astype(int)
        np.testing.assert_allclose(grey_levels / 255, x, atol=1e-6)
        assert as_rows(zip(grey_levels, y, strict=True)) == as_rows(kept[split])


def test_images_are_resized_to_the_model(tmp_path, capsys):
    # Even sizes: half of them is the mean of each square of four pixels.
    kept = prepare(tmp_path, "several_sizes", (None, None, 3), [(8, 8), (8, 8), (4, 4)], ("train", "validation"))
    x, y = datasets.load_test("several_sizes", tmp_path, (4, 4, 3))
    halves = [
        (image.astype(float) if len(image) == 4 else image.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3)), class_id)
        for image, class_id in kept["validation"]
    ]
    expected = as_rows((np.round(image / 255, 5), class_id) for image, class_id in halves)
    assert as_rows(zip(np.round(x.astype(float), 5), y, strict=True)) == expected

    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    command = ["evaluate", tmp_path / "model.keras", "--dataset", "several_sizes", "--data-dir", tmp_path, "--quiet"]
    assert cli.main([*map(str, command), "--eps", "0.1", "--suite", "quick"]) == 0
    assert "3 examples" in capsys.readouterr().out


def test_a_model_of_vectors_or_matrices_takes_images_as_they_are(tmp_path):
    prepare(tmp_path, "tiny_images", (4, 3, 3), [(4, 3)] * 3)
    for shape in ((None, None, None), image_shape(keras.Sequential([keras.Input((4, 9))]))):
        assert datasets.load_test("tiny_images", tmp_path, shape)[0].shape == (3, 4, 3, 3)
    with pytest.raises(ValueError, match=r"`shape` must be \(8, 8, 1\) for the digits. Received: shape=\(4, 4, 3\)"):
        datasets.load_test("digits", shape=(4, 4, 3))


def test_data_sets_of_another_kind_are_refused(tmp_path):
    prepare(tmp_path, "several_sizes", (None, None, 3), [(8, 8), (4, 4)])
    with pytest.raises(ValueError, match="`shape` must give height and width, as .* several_sizes have several sizes"):
        datasets.load_test("several_sizes", tmp_path)
    with pytest.raises(ValueError, match=r"`shape` must have the 3 channels of several_sizes. Received: .*\(4, 4, 1\)"):
        datasets.load_test("several_sizes", tmp_path, (4, 4, 1))
    prepare(tmp_path, "only_training", (4, 4, 3), [(4, 4)], ("train",))
    with pytest.raises(ValueError, match="with test or validation images. Received: name='only_training' with train"):
        datasets.load_test("only_training", tmp_path)
    prepare(tmp_path, "only_tests", (4, 4, 3), [(4, 4)], ("test",))
    with pytest.raises(ValueError, match="with train images. Received: name='only_tests' with test"):
        datasets.load("only_tests", tmp_path)
    several = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=2))
    prepare(tmp_path, "several_labels", (4, 4, 3), [(4, 4)], label=several)
    with pytest.raises(ValueError, match="images with one class each. Received: name='several_labels'"):
        datasets.load_test("several_labels", tmp_path)
    with pytest.raises(ValueError, match="mnist could not be loaded"):
        datasets.load("mnist", tmp_path)
    for name in ("my images", "", 3, "../folder"):
        with pytest.raises(ValueError, match="`name` must be one of digits, mnist, cifar10, or another name of"):
            datasets.load(name)
