"""The accuracy of a model on corrupted images: noise, blur, weather and compression."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_drsl import _files, _schema, _validation
from keras_drsl._data import class_ids, read_examples
from keras_drsl._intervals import wilson
from keras_drsl._progress import Progress
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.classifier import is_misclassified
from keras_drsl.models.fingerprint import fingerprint, package_versions, provenance
from keras_drsl.models.heads import View
from keras_drsl.models.logits import NUM_TRIED, LogitsModel, find_logits_of
from keras_drsl.models.state import check_model, preserve_state
from keras_drsl.plotting import begin_axes, finish_axes
from keras_drsl.threat import ThreatModel

BINS = 15  # of the expected calibration error
SEVERITIES = (1, 2, 3, 4, 5)

# An image has values in [0, 1], float32, shape (height, width, channels).
Corrupt = Callable[[Array, Any, np.random.Generator], Array]


class Corruption(NamedTuple):
    """Hold one of the common corruptions.

    Attributes:
        corrupt: Maps an image, a strength and a random generator to an image.
        strengths: The strength at each severity from 1 to 5.
        call: What computes it.
        needs_colour: Whether it has a meaning for three channels only.
        smallest: The smallest height and width that it has a meaning for.
    """

    corrupt: Corrupt
    strengths: tuple[Any, ...]
    call: str
    needs_colour: bool = False
    smallest: int = 8


def _gaussian_noise(image: Array, strength: float, random: np.random.Generator) -> Array:
    from skimage.util import random_noise

    return np.asarray(random_noise(image, "gaussian", rng=random, var=strength**2))


def _shot_noise(image: Array, photons: float, random: np.random.Generator) -> Array:
    return random.poisson(image * photons) / photons


def _impulse_noise(image: Array, share: float, random: np.random.Generator) -> Array:
    from skimage.util import random_noise

    return np.asarray(random_noise(image, "s&p", rng=random, amount=share))


def _each_channel(image: Array, function: Callable[[Array], Array]) -> Array:
    return np.stack([function(image[..., channel]) for channel in range(image.shape[-1])], axis=-1)


def _defocus_blur(image: Array, radius: float, random: np.random.Generator) -> Array:
    from scipy.ndimage import convolve, gaussian_filter

    reach = np.arange(-8, 9)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype("float64")
    kernel = gaussian_filter(disk, 0.5)
    return _each_channel(image, lambda plane: convolve(plane, kernel / kernel.sum(), mode="reflect"))


def _motion_blur(image: Array, length: int, random: np.random.Generator) -> Array:
    from scipy.ndimage import convolve
    from skimage.draw import line

    angle = math.radians(random.uniform(-45, 45))
    middle, reach = length, length / 2
    kernel = np.zeros((2 * length + 1, 2 * length + 1))
    ends = [round(middle + sign * reach * part) for sign in (-1, 1) for part in (math.sin(angle), math.cos(angle))]
    kernel[line(*ends)] = 1
    return _each_channel(image, lambda plane: convolve(plane, kernel / kernel.sum(), mode="reflect"))


def _zoom_blur(image: Array, largest: float, random: np.random.Generator) -> Array:
    from skimage.transform import SimilarityTransform, warp

    centre = np.array(image.shape[1::-1]) / 2 - 0.5
    zoomed = []
    for factor in np.arange(1.0, largest + 1e-9, 0.01):
        inverse = SimilarityTransform(scale=1 / factor, translation=centre * (1 - 1 / factor))
        zoomed.append(warp(image, inverse, order=1, mode="edge"))
    return np.asarray(np.mean(zoomed, axis=0))


def _albumentations(image: Array, name: str, options: dict[str, Any], random: np.random.Generator) -> Array:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
    import albumentations

    transform = getattr(albumentations, name)(p=1.0, **options)
    transform.set_random_seed(int(random.integers(2**31)))
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype("uint8")
    return np.asarray(transform(image=pixels)["image"], "float64").reshape(image.shape) / 255


def _glass_blur(image: Array, strength: tuple[float, int, int], random: np.random.Generator) -> Array:
    sigma, reach, iterations = strength
    options = {"sigma": sigma, "max_delta": reach, "iterations": iterations, "mode": "exact"}
    return _albumentations(image, "GlassBlur", options, random)


def _snow(image: Array, strength: float, random: np.random.Generator) -> Array:
    options = {"snow_point_range": (strength, strength), "brightness_coeff": 2.0, "method": "texture"}
    return _albumentations(image, "RandomSnow", options, random)


def _fog(image: Array, strength: float, random: np.random.Generator) -> Array:
    return _albumentations(image, "RandomFog", {"fog_coef_range": (0.5, 0.5), "alpha_coef": strength}, random)


def _brightness(image: Array, change: float, random: np.random.Generator) -> Array:
    from skimage.color import hsv2rgb, rgb2hsv

    if image.shape[-1] != 3:
        return image + change
    hsv = rgb2hsv(np.clip(image, 0, 1))
    hsv[..., 2] = np.clip(hsv[..., 2] + change, 0, 1)
    return np.asarray(hsv2rgb(hsv))


def _contrast(image: Array, factor: float, random: np.random.Generator) -> Array:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return np.asarray((image - mean) * factor + mean)


def _elastic_transform(image: Array, strength: tuple[float, float], random: np.random.Generator) -> Array:
    from scipy.ndimage import gaussian_filter, map_coordinates

    shift, smoothness = (part * image.shape[0] for part in strength)
    noise = [gaussian_filter(random.uniform(-1, 1, image.shape[:2]), smoothness, mode="reflect") for _ in range(2)]
    largest = max(float(np.abs(noise).max()), 1e-12)
    grid = np.indices(image.shape[:2]) + np.array(noise) / largest * shift
    return _each_channel(image, lambda plane: map_coordinates(plane, grid, order=1, mode="reflect"))


def _through_pillow(image: Array, change: Callable[[Any], Any]) -> Array:
    from PIL import Image

    pixels = np.rint(np.clip(image, 0, 1) * 255).astype("uint8")
    changed = change(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    return np.asarray(changed, "float64").reshape(image.shape) / 255


def _pixelate(image: Array, share: float, random: np.random.Generator) -> Array:
    from PIL import Image

    def change(picture: Any) -> Any:
        small = [max(1, int(length * share)) for length in picture.size]
        return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)

    return _through_pillow(image, change)


def _jpeg_compression(image: Array, quality: int, random: np.random.Generator) -> Array:
    from PIL import Image

    def change(picture: Any) -> Any:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _through_pillow(image, change)


# The strengths of noise, glass blur, zoom blur, brightness, contrast and compression are those that Hendrycks and
# Dietterich use for CIFAR-10. The others are ours, as the calls have other arguments.
CORRUPTIONS: dict[str, Corruption | None] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), "skimage.util.random_noise"),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50), "numpy.random.Generator.poisson"),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), "skimage.util.random_noise"),
    "defocus_blur": Corruption(_defocus_blur, (0.5, 1.0, 1.5, 2.0, 2.5), "scipy.ndimage.convolve"),
    "glass_blur": Corruption(
        _glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)), "albumentations.GlassBlur"
    ),
    "motion_blur": Corruption(_motion_blur, (2, 3, 4, 5, 6), "scipy.ndimage.convolve, skimage.draw.line"),
    "zoom_blur": Corruption(_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26), "skimage.transform.warp"),
    "snow": Corruption(_snow, (0.1, 0.2, 0.3, 0.4, 0.5), "albumentations.RandomSnow", needs_colour=True, smallest=32),
    "frost": None,  # it lays photographs of frost over the image
    "fog": Corruption(_fog, (0.05, 0.1, 0.15, 0.2, 0.3), "albumentations.RandomFog", needs_colour=True, smallest=32),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), "skimage.color.rgb2hsv"),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), "numpy"),
    "elastic_transform": Corruption(
        _elastic_transform, ((0.02, 0.15), (0.03, 0.12), (0.04, 0.1), (0.05, 0.08), (0.06, 0.06)),
        "scipy.ndimage.map_coordinates",
    ),
    "pixelate": Corruption(_pixelate, (0.9, 0.8, 0.7, 0.6, 0.4), "PIL.Image.Image.resize", smallest=20),
    "jpeg_compression": Corruption(_jpeg_compression, (80, 65, 58, 50, 40), "PIL.Image.Image.save"),
}  # fmt: skip


class CorruptionReport:
    """The result of `evaluate_corruptions`.

    Print it for a summary.

    Args:
        settings: All arguments.
        results: For each corruption, one dictionary per severity with `accuracy`, `calibration_error` and, with a
            baseline, `baseline_accuracy`.
        clean: The same for the images as they are.
        skipped: The corruptions that were left out, each with the reason.
        provenance: Model, data, versions and device.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        results: dict[str, list[dict[str, float]]],
        clean: dict[str, float],
        skipped: dict[str, str],
        provenance: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.results = results
        self.clean = clean
        self.skipped = skipped
        self.provenance = provenance

    def _mean(self, name: str) -> float:
        return float(np.mean([row[name] for rows in self.results.values() for row in rows]))

    @property
    def mean_error(self) -> float:
        """The mean error over all corruptions that ran and their severities, in [0, 1]."""
        return 1 - self._mean("accuracy")

    @property
    def mean_calibration_error(self) -> float:
        """The mean expected calibration error over the same, in [0, 1]."""
        return self._mean("calibration_error")

    @property
    def relative_error(self) -> float | None:
        """The mean corruption error relative to the baseline, as Hendrycks and Dietterich define it.

        For each corruption, the errors at all severities are added up and divided by the sum of those of the baseline.
        The result is the mean of these ratios over the corruptions: below 1 where the model is better. None without a
        baseline; infinite where the baseline makes no error.
        """
        if "baseline_accuracy" not in self.clean:
            return None
        ratios = []
        for rows in self.results.values():
            own, other = (sum(1 - row[name] for row in rows) for name in ("accuracy", "baseline_accuracy"))
            ratios.append(own / other if other else math.inf if own else 1.0)
        return float(np.mean(ratios))

    def __str__(self) -> str:
        severities = self.settings["severities"]
        lines = [
            f"{self.settings['examples']} images, accuracy in % by severity; clean {self.clean['accuracy']:.1%}",
            f"{'':20}" + "".join(f"{severity:>7}" for severity in severities),
        ]
        for name, rows in self.results.items():
            lines.append(f"{name:20}" + "".join(f"{100 * row['accuracy']:>7.1f}" for row in rows))
        lines.append(f"mean error {self.mean_error:.1%}, mean calibration error {self.mean_calibration_error:.1%}")
        if self.relative_error is not None:
            lines.append(f"error relative to the baseline {self.relative_error:.3f}")
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        relative = self.relative_error
        return {
            "settings": self.settings,
            "clean": self.clean,
            "mean_error": self.mean_error,
            "mean_calibration_error": self.mean_calibration_error,
            "relative_error": relative if relative is None or math.isfinite(relative) else None,
            "results": self.results,
            "skipped": self.skipped,
            "provenance": self.provenance,
        }

    to_json = _files.to_json

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "CorruptionReport":
        """Read a file that `to_json` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: If the file holds no such report, or contradicts itself.
        """
        return _files.parse(path, "CorruptionReport.to_json", lambda text: cls._from_content(json.loads(text)))

    @classmethod
    def _from_content(cls, content: Any) -> "CorruptionReport":
        rules = dict.fromkeys(("settings", "results", "clean", "skipped", "provenance"), _schema.DICT)
        rules["results"] = _schema.dict_of(_schema.list_of(_schema.DICT))
        _schema.check_fields("report", content, rules, may_hold_more=True)
        rows = [("clean", content["clean"])]
        rows += [(name, row) for name, found in content["results"].items() for row in found]
        if len(rows) == 1:
            raise ValueError("`results` must hold a corruption. Received: none")
        for name, row in rows:
            names = {"accuracy", "calibration_error", *(["baseline_accuracy"] if "baseline_accuracy" in row else [])}
            _schema.check_fields(name, row, dict.fromkeys(names, _schema.SHARE))
        if len({frozenset(row) for _, row in rows}) > 1:
            raise ValueError("`results` must hold a baseline for all corruptions or for none")
        report = cls(**{name: content[name] for name in rules})
        if not math.isclose(report.mean_error, content.get("mean_error", math.nan), abs_tol=1e-6):
            raise ValueError(
                f"`mean_error` must be that of `results`, {report.mean_error:.4g}. "
                f"Received: {content.get('mean_error')!r}"
            )
        return report

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None, overwrite: bool = True) -> Any:
        """Draw the mean accuracy over severities for each corruption, with that of the baseline.

        Args:
            path: The file of the figure, or None for no file. Its ending names the kind of figure, such as `.png`.
            ax: The Matplotlib axes to draw in; None for a figure of its own.
            overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

        Returns:
            The axes.

        Raises:
            ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
            OSError: If the file cannot be written, as on a full disk.
            ImportError: Without matplotlib.
        """
        path, axes = begin_axes(path, ax, overwrite=overwrite, height=1.5 + 0.25 * len(self.results))
        places = np.arange(len(self.results))
        series = {"accuracy": "model"} | (
            {"baseline_accuracy": "baseline"} if "baseline_accuracy" in self.clean else {}
        )
        height = 0.8 / len(series)
        for number, (key, label) in enumerate(series.items()):
            shares = [100 * np.mean([row[key] for row in rows]) for rows in self.results.values()]
            bounds = [wilson(share / 100 * self.settings["examples"], self.settings["examples"]) for share in shares]
            errors = np.abs(100 * np.array(bounds).T - shares)
            axes.barh(places + number * height, shares, height, xerr=errors, label=label)
        axes.set_yticks(places + height * (len(series) - 1) / 2, [name.replace("_", " ") for name in self.results])
        axes.invert_yaxis()
        axes.set(xlabel="accuracy, mean over severities (%)", xlim=(0, 101))
        return finish_axes(axes, path, is_own=ax is None, columns=2 if len(series) > 1 else 0)


def evaluate_corruptions(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    baseline: keras.Model | None = None,
    corruptions: Iterable[str] | None = None,
    severities: Iterable[int] = SEVERITIES,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    from_logits: bool | None = None,
    output: str | int | None = None,
    preprocessing: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    max_samples: int | None = None,
    seed: int = 0,
    verbose: int = 1,
) -> CorruptionReport:
    """Measure the accuracy and the calibration of a model of images under common corruptions.

    Use it beside attacks: a robust loss may help or hurt where nobody attacks, as with noise, blur, weather and
    compression. The fifteen corruptions are those of Hendrycks and Dietterich, as far as a library computes them; see
    `keras_drsl.evaluation.CORRUPTIONS` for the calls and their strengths. `frost`, which needs photographs, is always
    skipped, as are those without a meaning for the size or the number of channels of the images.

    Formula: the expected calibration error is the sum over 15 bins of confidence, of equal width, of the share of the
    images in the bin times the distance between their accuracy and their mean confidence.

    Note:

    - Each image is made from `seed` and its position in the data set, so all models and backends see the same ones.
    - Other libraries and strengths than those of CIFAR-10-C make them: compare with other figures of this function
      only.
    - Corrupted values are clipped to the valid range.

    Args:
        model: A classifier of images `(height, width)` or `(height, width, channels)`, with 1 or 3 channels.
        x_or_dataset: Images, shape `(count, ...)`; or a data set of batches `(images, labels)`.
        y: The labels of an array of images: class ids or one-hot.
        baseline: Another classifier of the same images, for `relative_error`; or None.
        corruptions: The names of some corruptions; None for all.
        severities: Some of 1 to 5.
        clip_min: The value of black, in the units of the images.
        clip_max: The value of white.
        from_logits: As in `evaluate_robustness`.
        output: As in `evaluate_robustness`.
        preprocessing: As in `evaluate_robustness`.
        batch_size: How many images are classified together.
        max_samples: As in `evaluate_robustness`.
        seed: The seed of all randomness, >= 0.
        verbose: 0 for no output, 1 to show progress on `sys.stderr`.

    Returns:
        A `CorruptionReport`.

    Raises:
        ValueError: If an argument is out of its range, inputs are no images or lie outside the valid range, labels do
            not match, or all corruptions are skipped.
        ImportError: If a library is missing: `pip install keras-drsl[corruptions]`.

    Example:

    >>> model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    >>> x, y = np.random.default_rng(0).random((6, 28, 28, 1)), np.arange(6) % 3
    >>> report = keras_drsl.evaluate_corruptions(model, x, y, corruptions=["contrast"], verbose=0)
    >>> list(report.results), len(report.results["contrast"])
    (['contrast'], 5)

    Reference: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations", arXiv:1903.12261.
    """
    check_model("model", model)
    if baseline is not None:
        check_model("baseline", baseline)
    names = _check_names(corruptions)
    clip_min = _validation.check_number("clip_min", clip_min, "a number", lambda value: True)
    clip_max = _validation.check_number("clip_max", clip_max, f"a number above {clip_min:g}", lambda v: v > clip_min)
    if not isinstance(severities, Iterable) or isinstance(severities, str):
        raise ValueError(f"`severities` must hold some of 1 to 5. Received: severities={severities!r}")
    chosen = sorted({_validation.check_choice("severities", severity, SEVERITIES) for severity in severities})
    if not chosen:
        raise ValueError("`severities` must hold at least one of 1 to 5. Received: none")
    batch_size = _validation.check_integer("batch_size", batch_size, at_least=1)
    seed = _validation.check_integer("seed", seed, at_least=0)
    max_samples = _validation.check_max_samples(max_samples)
    view = View(output, preprocessing).check()
    # The radius is not used.
    threat = ThreatModel.from_arguments(math.ulp(0.0), None, clip_min, clip_max)
    examples = read_examples(x_or_dataset, y, max_samples=max_samples)
    threat.validate("x_or_dataset", examples.whole[0])
    shape = examples.x.shape[1:]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ValueError(
            "`x_or_dataset` must hold images (height, width) or (height, width, channels) of 1 or 3 channels. "
            f"Received: shape {shape}"
        )
    planes = (examples.x.reshape(*examples.x.shape[:3], -1).astype("float64") - clip_min) / (clip_max - clip_min)
    skipped = {name: reason for name in names if (reason := _reason_to_skip(name, planes.shape[1:]))}
    names = [name for name in names if name not in skipped]
    if not names:
        raise ValueError(f"`corruptions` must leave one that has a meaning for these images. Received: {skipped}")
    models = {"": model} | ({} if baseline is None else {"baseline_": baseline})
    settings = {"severities": chosen, "clip_min": clip_min, "clip_max": clip_max, "seed": seed, "examples": len(planes)}
    settings |= {"max_samples": max_samples, "batch_size": batch_size, "from_logits": from_logits} | view.settings
    with (
        preserve_state(*models.values(), preprocessing, inputs=examples.x),
        Progress(enabled=bool(verbose)) as progress,
    ):
        found = {
            prefix: find_logits_of(some, examples.x[:NUM_TRIED], from_logits, view) for prefix, some in models.items()
        }
        classes, *others = (some.classifier.logits(examples.x[:1]).shape[-1] for some in found.values())
        if others not in ([], [classes]):
            raise ValueError(f"`baseline` must have the {classes} classes of `model`. Received: {others[0]}")
        labels = class_ids(examples.y, len(planes), classes)

        def measure(images: Array) -> dict[str, float]:
            row: dict[str, float] = {}
            for prefix, some in found.items():
                accuracy, error = _measure(some, images, labels, batch_size)
                row |= {f"{prefix}accuracy": accuracy} | ({} if prefix else {"calibration_error": error})
            return row

        clean = measure(examples.x)
        results: dict[str, list[dict[str, float]]] = {}
        for done, name in enumerate(names):
            results[name] = []
            for severity in chosen:
                progress.update(f"{name}, severity {severity}", done=done, total=len(names))
                values = np.stack(
                    [
                        corrupt(image, name, severity, [seed, int(i)])
                        for i, image in zip(examples.ids, planes, strict=True)
                    ]
                )
                images = (clip_min + (clip_max - clip_min) * values).reshape(examples.x.shape).astype("float32")
                results[name].append(measure(images))
    facts = provenance(model, examples.digest)
    facts["baseline"] = None if baseline is None else fingerprint(baseline)
    facts["versions"] |= package_versions("scikit-image", "scipy", "albumentations", "pillow")
    return CorruptionReport(settings, results, clean, skipped, facts)


def corrupt(image: Array, name: str, severity: int, seed: Any = 0) -> Array:
    """Return a corrupted image.

    Args:
        image: Values in [0, 1], shape `(height, width, channels)`.
        name: One of `CORRUPTIONS`, except for `"frost"`.
        severity: 1 to 5.
        seed: The seed of its randomness, as `numpy.random.default_rng` takes it.

    Returns:
        Values in [0, 1], of the same shape, float64.

    Raises:
        ValueError: If there is no such corruption or severity, or the image has other values or another shape.
        ImportError: If a library is missing: `pip install keras-drsl[corruptions]`.

    Example:

    >>> from keras_drsl.evaluation import corrupt
    >>> float(corrupt(np.full((8, 8, 1), 0.5), "brightness", 2).max())
    0.6
    """
    corruption = CORRUPTIONS[
        _validation.check_choice("name", name, [key for key, value in CORRUPTIONS.items() if value])
    ]
    _validation.check_choice("severity", severity, SEVERITIES)
    assert corruption is not None
    image = np.asarray(image, "float64")
    if image.ndim != 3 or image.size == 0 or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            "`image` must hold values in [0, 1], shape (height, width, channels). Received: "
            f"shape {image.shape}" + (f", values from {image.min():g} to {image.max():g}" if image.size else "")
        )
    # The same random numbers at each severity, so that a stronger corruption is not another one.
    random = np.random.default_rng(seed)
    try:
        values = corruption.corrupt(image, corruption.strengths[severity - 1], random)
    except ImportError as error:
        raise ImportError(f"The corruption {name!r} needs `pip install keras-drsl[corruptions]`: {error}") from error
    return np.clip(values, 0.0, 1.0)


def _check_names(corruptions: Iterable[str] | None) -> list[str]:
    if isinstance(corruptions, str):
        raise ValueError(f"`corruptions` must hold names of corruptions. Received: corruptions={corruptions!r}")
    names = list(CORRUPTIONS) if corruptions is None else list(dict.fromkeys(corruptions))
    return [_validation.check_choice("corruptions", name, list(CORRUPTIONS)) for name in names]


def _reason_to_skip(name: str, shape: tuple[int, ...]) -> str:
    """Return why a corruption has no meaning for images of a shape, or an empty text."""
    corruption = CORRUPTIONS[name]
    if corruption is None:
        return "no library has it: it needs photographs of frost"
    if corruption.needs_colour and shape[2] != 3:
        return "it has a meaning for images of three channels only"
    if min(shape[:2]) < corruption.smallest:
        return f"it has a meaning for images of {corruption.smallest} x {corruption.smallest} or more only"
    return ""


def _measure(model: LogitsModel, images: Array, labels: Array, batch_size: int) -> tuple[float, float]:
    """Return the accuracy and the expected calibration error."""
    logits = model.classifier.logits_in_batches(images, batch_size).astype("float64")
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = np.nan_to_num((p / p.sum(axis=1, keepdims=True)).max(axis=1))
    are_right = ~is_misclassified(logits, labels)
    return float(are_right.mean()), calibration_error(confidence, are_right)


def calibration_error(confidence: Array, are_right: Array) -> float:
    """Return the expected calibration error over 15 bins of equal width, in [0, 1].

    Args:
        confidence: The probability of each prediction, shape `(count,)`.
        are_right: Whether it is right, shape `(count,)`.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(
        sum(
            (bins == some).mean() * abs(are_right[bins == some].mean() - confidence[bins == some].mean())
            for some in np.unique(bins)
        )
    )
