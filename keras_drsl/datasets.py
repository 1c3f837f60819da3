"""The data sets that the command and the examples load by name."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_drsl import _escape, _validation
from keras_drsl._typing import Array

NAMES = ("digits", "mnist", "cifar10")


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Load images scaled to [0, 1] and class ids.

    Args:
        name: `"digits"` (scikit-learn's, no download, 360 images drawn for the test), `"mnist"` or `"cifar10"`.
        data_dir: The folder where tensorflow-datasets has MNIST and CIFAR-10; None to download them.

    Returns:
        `(x_train, y_train), (x_test, y_test)`, float32 `(count, height, width, channels)` and integers `(count,)`.

    Raises:
        ValueError: If the name is unknown, or the data set cannot be loaded.
        ImportError: Without the library that has the data set.

    Example:

    >>> (x_train, y_train), (x_test, y_test) = keras_drsl.datasets.load("digits")
    >>> x_test.shape
    (360, 8, 8, 1)
    """
    name = _validation.check_name("name", name, NAMES)
    package = "scikit-learn" if name == "digits" else "tensorflow-datasets importlib_resources"
    try:
        if name == "digits":
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split

            x, y = load_digits(return_X_y=True)
            x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
            x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
            return (x_train, y_train), (x_test, y_test)

        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"{name} needs `pip install {package}`") from error
    try:
        options: dict[str, Any] = {"batch_size": -1, "as_supervised": True, "download": data_dir is None}
        train, test = tfds.as_numpy(tfds.load(name, split=["train", "test"], data_dir=data_dir, **options))
    except Exception as error:
        raise ValueError(
            f"{name} could not be loaded: {type(error).__name__}: {error}\n"
            f"With a network, leave the data folder out to download it. Without one, prepare it elsewhere by "
            f"`python -c \"import tensorflow_datasets as tfds; tfds.load('{name}', data_dir='DIR')\"` and give that "
            "folder (--data-dir DIR). The digits need neither."
        ) from error
    (x_train, y_train), (x_test, y_test) = train, test
    return ((x_train / 255).astype("float32"), y_train), ((x_test / 255).astype("float32"), y_test)


def load_npz(path: str | os.PathLike[str]) -> tuple[Array, Array]:
    """Load the arrays `x` and `y`, or `x_test` and `y_test`, of a file. Pickled code in it is never executed.

    Args:
        path: The npz file.

    Returns:
        Inputs, numbers of shape `(count, ...)`, and labels, numbers of shape `(count,)` or `(count, ...)`.

    Raises:
        ValueError: If the file is damaged, holds no such arrays or both pairs, or if the arrays do not hold finite
            numbers or have different lengths.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            found = [names for names in (("x", "y"), ("x_test", "y_test")) if set(names) <= set(file.files)]
            if len(found) != 1:
                raise ValueError(f"it holds {_escape.for_terminal(', '.join(file.files)) or 'nothing'}")
            # NumPy does not read to the end of a member, where its checksum is compared.
            damaged = file.zip.testzip()
            if damaged is not None or len(set(file.files)) < len(file.files):
                raise ValueError("it is damaged, or holds a name twice")
            x, y = _numbers(found[0][0], file), _numbers(found[0][1], file)
        if len(x) != len(y) or not len(x):
            raise ValueError(f"it must hold one label for each input, and at least one. Received: {len(x)}, {len(y)}")
    except Exception as error:
        raise ValueError(
            f"`path` must be an npz file with arrays x and y, or x_test and y_test, without pickles. "
            f"Received: path={str(path)!r} ({_escape.error_line(error)})"
        ) from error
    return x, y


def _numbers(name: str, file: Any) -> Array:
    """Return an array of finite real numbers out of an npz file."""
    array = file[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim == 0:
        kind = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(f"{name} must hold numbers, one or more per example. Received: {kind}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must hold finite numbers. Received: NaN or infinite ones")
    return array
