"""The data sets that the command and the examples load by name."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_drsl import _escape
from keras_drsl._typing import Array

__all__ = ["Folder", "load", "load_folder", "load_npz", "load_test"]

NAMES = ("digits", "mnist", "cifar10")
NAME = r"[a-z][a-z0-9_]*(/[\w.+-]+)?(:[\w.*]+)?"  # of a data set, its configuration and version
TEST_SPLITS = ("test", "validation")
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # the folders of many data sets
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")  # the endings that Keras reads


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Load images scaled to [0, 1] and class ids, for training and for tests.

    Args:
        name: `"digits"` (scikit-learn's, no download, 360 images drawn for the test), or the name of a data set of
            images of one size and with one class each in tensorflow-datasets, such as `"mnist"` or `"cifar10"`.
        data_dir: The folder where tensorflow-datasets has the data set; None to download it.

    Returns:
        `(x_train, y_train), (x_test, y_test)`, float32 `(count, height, width, channels)` and integers `(count,)`. A
        data set without test images is tested on its validation images.

    Raises:
        ValueError: If the name is unknown, or the data set cannot be loaded or is of another kind.
        ImportError: Without the library that has the data set.

    Example:

    >>> (x_train, y_train), (x_test, y_test) = keras_drsl.datasets.load("digits")
    >>> x_test.shape
    (360, 8, 8, 1)
    """
    with _needed_by(name):
        name = _check_name(name)
        if name == "digits":
            return _load_digits()
        builder = _builder(name, data_dir)
        return _read(builder, _split(builder, "train")), _read(builder, _split(builder, *TEST_SPLITS))


def load_test(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    shape: Sequence[int | None] = (None, None, None),
) -> tuple[Array, Array]:
    """Load the test images of a data set, scaled to [0, 1], and their class ids.

    Args:
        name: The data set, as in `load`.
        data_dir: The folder where tensorflow-datasets has the data set; None to download it.
        shape: Height, width and channels of the images. Where a height and width are given, images of another size are
            resized, bilinearly. Without them, all images must have one size.

    Returns:
        `(x_test, y_test)`, as from `load`.

    Raises:
        ValueError: As from `load`, or if the images have other channels.
        ImportError: Without the library that has the data set.

    Example:

    >>> x, y = keras_drsl.datasets.load_test("digits")
    >>> x.shape, y.shape
    ((360, 8, 8, 1), (360,))
    """
    with _needed_by(name):
        name = _check_name(name)
        if name == "digits":
            if any(wanted not in (None, own) for wanted, own in zip(shape, (8, 8, 1), strict=True)):
                raise ValueError(f"`shape` must be (8, 8, 1) for the digits. Received: shape={tuple(shape)}")
            return _load_digits()[1]
        builder = _builder(name, data_dir)
        return _read(builder, _split(builder, *TEST_SPLITS), shape)


@contextlib.contextmanager
def _needed_by(name: str) -> Iterator[None]:
    """Say which packages a data set needs where one is missing."""
    try:
        yield
    except ImportError as error:
        package = "scikit-learn" if name == "digits" else "tensorflow tensorflow-datasets importlib_resources"
        raise ImportError(f"{name} needs `pip install {package}`") from error


def _check_name(name: Any) -> str:
    """Return a name that may be that of a data set; one of `NAMES` is taken in any case of letters."""
    if isinstance(name, str) and name.lower() in NAMES:
        return name.lower()
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(
            f"`name` must be one of {', '.join(NAMES)}, or another name of tensorflow-datasets. Received: name={name!r}"
        )
    return name


def _load_digits() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    return (x_train, y_train), (x_test, y_test)


def _builder(name: str, data_dir: Any) -> Any:
    """Return the builder of a data set of tensorflow-datasets, its files ready to read, or raise `ValueError`."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if data_dir is None:
            builder.download_and_prepare()
        elif not builder.is_prepared():
            raise ValueError(f"{str(data_dir)!r} does not hold it")
    except ImportError:
        raise
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name, tfds.list_builders(), n=3)
        hint = f". Names like it: {', '.join(near)}" if near else ""
        raise ValueError(
            "`name` must be a data set of tensorflow-datasets, or for the command a folder or npz file that exists. "
            f"Received: name={name!r}{hint}"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{name} could not be loaded: {_escape.error_line(error)}\n"
            f"With a network, leave the data folder out to download it. Without one, prepare it elsewhere by "
            f"`python -c \"import tensorflow_datasets as tfds; tfds.load('{name}', data_dir='DIR')\"` and give that "
            "folder (--data-dir DIR). The digits need neither."
        ) from error
    features, keys = builder.info.features, builder.info.supervised_keys or ()
    kinds = [features[key] for key in keys if isinstance(key, str)]
    if not (len(kinds) == 2 and isinstance(kinds[0], tfds.features.Image) and kinds[1].shape == ()):
        raise ValueError(
            f"`name` must be a data set of images with one class each. Received: name={name!r}: {features}"
        )
    return builder


def _split(builder: Any, *names: str) -> str:
    """Return the first of some splits that a data set has, or raise `ValueError`."""
    splits = [name for name in names if name in builder.info.splits]
    if not splits:
        raise ValueError(
            f"`name` must be a data set with {' or '.join(names)} images. Received: name={builder.name!r} with "
            f"{', '.join(builder.info.splits)}"
        )
    return splits[0]


def _read(builder: Any, split: str, shape: Sequence[int | None] = (None, None, None)) -> tuple[Array, Array]:
    """Return the images of a split, in [0, 1] and of one size, and their class ids."""
    import tensorflow as tf

    own = builder.info.features[builder.info.supervised_keys[0]].shape
    height, width = (None, None) if None in shape[:2] else shape[:2]
    if shape[2] not in (None, own[2]):
        raise ValueError(f"`shape` must have the {own[2]} channels of {builder.name}. Received: shape={tuple(shape)}")
    if height is None and None in own:
        raise ValueError(
            f"`shape` must give height and width, as the images of {builder.name} have several sizes. "
            f"Received: shape={tuple(shape)}"
        )
    data = builder.as_dataset(split, as_supervised=True)
    if height is not None and own[:2] != (height, width):
        data = data.map(lambda image, label: (tf.image.resize(image, (height, width)), label))
    batches = [(np.asarray(x), np.asarray(y)) for x, y in data.batch(1024)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return (x / 255).astype("float32"), y


def load_npz(path: str | os.PathLike[str]) -> tuple[Any, Array]:
    """Load the arrays `x` and `y`, or `x_test` and `y_test`, of a file. Pickled code in it is never executed.

    Args:
        path: The npz file. For a model with several inputs it holds one array for each by name, in place of `x`.

    Returns:
        Inputs, numbers of shape `(count, ...)`, or a dictionary of several inputs; and labels, numbers of shape
        `(count,)` or `(count, ...)`.

    Raises:
        ValueError: If the file is damaged, holds no such arrays or both pairs, or if the arrays do not hold finite
            numbers or have different lengths.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            found = [names for names in (("x", "y"), ("x_test", "y_test")) if set(names) <= set(file.files)]
            several = [name for name in file.files if name != "y"] if not found and "y" in file.files else []
            if len(found) != 1 and not several:
                raise ValueError(f"it holds {_escape.for_terminal(', '.join(file.files)) or 'nothing'}")
            # NumPy does not read to the end of a member, where its checksum is compared.
            damaged = file.zip.testzip()
            if damaged is not None or len(set(file.files)) < len(file.files):
                raise ValueError("it is damaged, or holds a name twice")
            y = _numbers("y" if several else found[0][1], file)
            arrays = {name: _numbers(name, file) for name in several or [found[0][0]]}
        for array in arrays.values():
            if len(array) != len(y) or not len(y):
                received = f"{len(array)}, {len(y)}"
                raise ValueError(f"it must hold one label for each input, and at least one. Received: {received}")
    except Exception as error:
        raise ValueError(
            "`path` must be an npz file with arrays x and y, or x_test and y_test, or y and one for each of several "
            "inputs, without pickles. "
            f"Received: path={str(path)!r} ({_escape.error_line(error)})"
        ) from error
    return arrays if several else arrays[found[0][0]], y


class Folder(NamedTuple):
    """Hold the images of a folder.

    Attributes:
        x: Images, float32 in [0, 255], shape `(count, height, width, channels)`.
        y: Class ids, shape `(count,)`.
        files: The paths of the images within the folder.
        class_names: The names of the sub-folders, by class id.
    """

    x: Array
    y: Array
    files: list[str]
    class_names: list[str]


def load_folder(path: str | os.PathLike[str], shape: Sequence[int | None] = (None, None, None)) -> Folder:
    """Load a folder of images with one sub-folder per class, by `keras.utils.image_dataset_from_directory`.

    Note:

    - Classes have the ids of the sorted names of the sub-folders.
    - Images are resized to the shape, bilinearly. Without one, all images must have one size.

    Args:
        path: The folder. JPEG, PNG, BMP and GIF images are read.
        shape: Height, width and channels of the images; None for the height and width of the files, and for three
            channels.

    Returns:
        A `Folder`.

    Raises:
        ValueError: If the folder holds no such sub-folders or images, a file is no image, or sizes differ.
        ImportError: Without TensorFlow, which reads the images.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     keras.utils.save_img(folder / name / "0.png", np.zeros((4, 4, 3)), scale=False)
    >>> keras_drsl.datasets.load_folder(folder).class_names
    ['cat', 'dog']
    """
    folder = Path(path)
    received = f"Received: path={str(path)!r}"
    if not folder.is_dir():
        raise ValueError(f"`path` must be a folder that exists. {received}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [file for name in classes for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGES]
    rule = f"`path` must hold one sub-folder of images ({', '.join(IMAGES)}) per class, and two classes or more."
    if classes and {name.lower() for name in classes} <= SPLITS:
        raise ValueError(
            f"{rule} {received}, with {', '.join(classes)}: give one of them, as {str(folder / classes[0])!r}"
        )
    if len(classes) < 2 or not files:
        beside = sum(file.suffix.lower() in IMAGES for file in folder.iterdir())
        raise ValueError(
            f"{rule} {received}, with {len(classes)} sub-folders, {len(files)} images in them and {beside} beside them"
        )
    height, width, channels = *shape[:2], shape[2] or 3
    modes = {1: "grayscale", 3: "rgb", 4: "rgba"}
    if channels not in modes:
        raise ValueError(f"`shape` must have 1, 3 or 4 channels. Received: shape={tuple(shape)}")
    if height is None or width is None:
        height, width = _common_size(files)
    try:
        dataset = keras.utils.image_dataset_from_directory(
            folder,
            color_mode=modes[channels],
            image_size=(height, width),
            shuffle=False,
            verbose=False,
        )
        batches = [(np.asarray(x), np.asarray(y)) for x, y in dataset]
    except ImportError as error:
        raise ImportError("A folder of images needs `pip install tensorflow`, with any backend.") from error
    except Exception as error:
        damaged = next((file for file in files if not _can_be_read(file)), None)
        received = received if damaged is None else f"Received: {str(damaged)!r}"
        raise ValueError(
            f"`path` must hold images that can be read. {received} ({_escape.error_line(error)})"
        ) from error
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    names = [Path(file).relative_to(folder).as_posix() for file in dataset.file_paths]
    return Folder(x.astype("float32"), y.astype("int32"), names, list(dataset.class_names))


def _can_be_read(file: Path) -> bool:
    try:
        keras.utils.load_img(file).load()
    except ImportError:  # without Pillow nobody knows
        return True
    except Exception:
        return False
    return True


def _common_size(files: list[Path]) -> tuple[int, int]:
    """Return the height and width of images, or raise `ValueError` if they differ."""
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            width, height = keras.utils.load_img(file).size
        except ImportError:  # without Pillow
            raise
        except Exception as error:
            raise ValueError(f"`path` must hold images that can be read. Received: {str(file)!r}") from error
        sizes.setdefault((height, width), file)
    if len(sizes) > 1:
        shown = ", ".join(f"{str(file)!r} of {size[0]} x {size[1]}" for size, file in list(sizes.items())[:2])
        raise ValueError(f"`path` must hold images of one size where the model takes any size. Received: {shown}")
    return next(iter(sizes))


def _numbers(name: str, file: Any) -> Array:
    """Return an array of finite real numbers out of an npz file."""
    array = file[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim == 0:
        kind = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(f"{name} must hold numbers, one or more per example. Received: {kind}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must hold finite numbers. Received: NaN or infinite ones")
    return array
