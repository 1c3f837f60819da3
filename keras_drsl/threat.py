"""The threat model: an attacker may move an input within a ball and within the valid range.

`ThreatModel` holds its four numbers, and is the one place that defines their units. Compiled programs take the numbers
as tensors (`ThreatModel.bounds`), so that one program serves every radius; the functions below work on these.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _validation
from keras_drsl._typing import Array, Norm, Tensor

NORMS: tuple[Norm, ...] = ("inf", 2)
NORM_NAMES: dict[str, Norm] = {"inf": "inf", "linf": "inf", "l∞": "inf", "2": 2, "l2": 2}


class Bounds(NamedTuple):
    """Hold the numbers of a threat model as compiled programs take them, float32 scalars.

    Attributes:
        eps: The radius of the ball.
        clip_min: The smallest valid input value.
        clip_max: The largest valid input value.
    """

    eps: Tensor
    clip_min: Tensor
    clip_max: Tensor


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """Define which perturbed inputs an attack may return.

    Use it where several calls share one threat model: attacks, `evaluate_robustness`, `robustness_curve`,
    `RobustnessMonitor` and `AdversarialTraining` take it as `threat=`. They also take its four numbers as arguments
    of their own.

    Formula: `||x_adv - x|| <= eps` in the norm, and `clip_min <= x_adv <= clip_max` for every value.

    Note:

    - All numbers are in units of the input. Images in [0, 1] have `eps=8 / 255`; images in [0, 255] have `eps=8` and
      `clip_max=255`; images in [-1, 1] have `eps=16 / 255` and `clip_min=-1`.
    - Threat models with equal numbers are equal and have equal hashes.

    Args:
        eps: The radius of the ball around each input, > 0, a number or a ratio as "8/255". In L-inf no larger than
            `clip_max - clip_min`.
        norm: `"inf"` or 2. Other names of them, such as `"Linf"` and `"L2"`, are read as these.
        clip_min: The smallest valid input value.
        clip_max: The largest valid input value, above `clip_min`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> threat = keras_drsl.ThreatModel(eps=8, clip_max=255)
    >>> threat
    ThreatModel(eps=8.0, norm='inf', clip_min=0.0, clip_max=255.0)
    >>> x, y = np.full((2, 8), 100.0), np.array([0, 1])
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Rescaling(1 / 255), keras.layers.Dense(2)])
    >>> x_adv = keras_drsl.attacks.FGSM(threat=threat)(model, x, y)
    >>> threat.contains(x_adv, x).tolist()
    [True, True]
    """

    eps: float
    norm: Norm = "inf"
    clip_min: float = 0.0
    clip_max: float = 1.0

    def __post_init__(self) -> None:
        checked = {
            "eps": _validation.check_positive("eps", _read_ratio(self.eps)),
            "norm": _check_norm(self.norm),
            "clip_min": _validation.check_number("clip_min", self.clip_min, "a finite number", lambda value: True),
            "clip_max": _validation.check_number("clip_max", self.clip_max, "a finite number", lambda value: True),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.clip_min < self.clip_max:
            raise ValueError(
                f"`clip_min` must be below `clip_max`. Received: clip_min={self.clip_min}, clip_max={self.clip_max}"
            )
        if self.norm == "inf" and self.eps > self.span:
            raise ValueError(
                f"`eps` must be no larger than the range, clip_max - clip_min = {self.span:g}. "
                f"Received: eps={self.eps:g}"
            )

    @classmethod
    def from_arguments(
        cls,
        eps: float | None = None,
        norm: Norm | None = None,
        clip_min: float | None = None,
        clip_max: float | None = None,
        threat: "ThreatModel | None" = None,
    ) -> "ThreatModel":
        """Return the threat model that a function's arguments describe.

        Args:
            eps: As in the class, or None.
            norm: As in the class, or None for the default.
            clip_min: As in the class, or None for the default.
            clip_max: As in the class, or None for the default.
            threat: A threat model in place of the four, or None.

        Raises:
            ValueError: If an argument is out of its range, if `threat` is given together with one of the four, or if
                both `threat` and `eps` are None.
        """
        arguments = {"eps": eps, "norm": norm, "clip_min": clip_min, "clip_max": clip_max}
        given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
        if threat is None:
            if eps is None:
                raise ValueError("`eps` or `threat` must be given. Received: neither")
            return cls(**given)
        if not isinstance(threat, cls):
            raise ValueError(f"`threat` must be a keras_drsl.ThreatModel. Received: threat={threat!r}")
        if given:
            received = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(
                f"`threat` must be given without `eps`, `norm`, `clip_min` and `clip_max`, which it holds. "
                f"Received: threat={threat!r} and {received}"
            )
        return threat

    @property
    def span(self) -> float:
        """The length of the valid range."""
        return self.clip_max - self.clip_min

    @property
    def bounds(self) -> Bounds:
        """The numbers as compiled programs take them."""
        return Bounds(np.float32(self.eps), np.float32(self.clip_min), np.float32(self.clip_max))

    def to_dict(self) -> dict[str, Any]:
        """Return the four numbers by name, as JSON takes them."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> "ThreatModel":
        """Return a threat model with some numbers changed."""
        return dataclasses.replace(self, **changes)

    def largest_eps(self, shape: tuple[int, ...]) -> float:
        """Return the radius of a ball that holds every valid input of a shape `(...)`."""
        return self.span if self.norm == "inf" else self.span * math.sqrt(math.prod(shape))

    def validate(self, name: str, x: Array) -> None:
        """Check that inputs fit the threat model.

        Args:
            name: The name of the argument that holds the inputs, for the error.
            x: Inputs, shape `(count, ...)`.

        Raises:
            ValueError: If a value lies outside the valid range or is NaN, or if `eps` exceeds the largest distance
                between valid inputs of this shape.
        """
        if not (x.min() >= self.clip_min and x.max() <= self.clip_max):
            raise ValueError(
                f"`{name}` must lie in [clip_min, clip_max] = [{self.clip_min:g}, {self.clip_max:g}]. "
                f"Received: values from {x.min():g} to {x.max():g}.{_hint(x)}"
            )
        largest = self.largest_eps(x.shape[1:])
        if self.eps > largest:
            raise ValueError(
                f"`eps` must be no larger than the range * sqrt(features) = {largest:g} in L2. "
                f"Received: eps={self.eps:g}"
            )

    def size(self, delta: Array) -> Array:
        """Return the norm of each perturbation of shape `(count, ...)`, float64, shape `(count,)`."""
        delta = np.abs(delta.reshape(len(delta), -1).astype("float64"))
        size: Array = delta.max(axis=1, initial=0) if self.norm == "inf" else np.sqrt((delta**2).sum(axis=1))
        return size

    def contains(self, x_adv: Array, x: Array) -> Array:
        """Return which perturbed inputs are finite and allowed, up to float32 rounding, shape `(count,)`.

        Args:
            x_adv: Perturbed inputs, shape `(count, ...)`.
            x: The inputs themselves, of the same shape.
        """
        slack = 1e-6 * self.span
        axes = tuple(range(1, x.ndim))
        with np.errstate(invalid="ignore"):
            allowed: Array = (
                np.isfinite(x_adv).all(axis=axes)
                & (self.size(x_adv.astype("float64") - x) <= self.eps * (1 + 1e-5) + slack)
                & (x_adv.min(axis=axes) >= self.clip_min - slack)
                & (x_adv.max(axis=axes) <= self.clip_max + slack)
            )
        return allowed

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the nearest point of the ball around `x`, clipped to the valid range.

        Args:
            x_adv: Tensors or arrays of shape `(batch, ...)`.
            x: The centres of the balls, of the same shape, within the range.
        """
        return project(ops.convert_to_tensor(x_adv), ops.convert_to_tensor(x), self.bounds, self.norm)

    def sample(self, generators: list[np.random.Generator], shape: tuple[int, ...]) -> Array:
        """Draw one point of the ball around 0 per generator, uniformly, float32, shape `(batch, *shape)`."""
        if self.norm == "inf":
            points = [generator.uniform(-self.eps, self.eps, shape) for generator in generators]
        else:
            points = []
            for generator in generators:
                point = generator.standard_normal(shape)
                radius = self.eps * generator.uniform() ** (1 / point.size)
                points.append(point * radius / np.sqrt((point**2).sum()))
        return np.asarray(points, dtype="float32").reshape(-1, *shape)


def _hint(x: Array) -> str:
    """Return, as a sentence, which arguments images of a usual range need; empty for another range."""
    low, high = x.min(), x.max()
    if -1 <= low < 0 and high <= 1:
        return " Images in [-1, 1] need clip_min=-1; the usual 8/255 of [0, 1] is eps=16/255 there."
    if low >= 0 and 1 < high <= 255:
        return " Images in [0, 255] need clip_max=255; the usual 8/255 of [0, 1] is eps=8 there."
    return ""


def _check_norm(norm: Any) -> Any:
    """Return a norm in the form of `NORMS`, also from the names that people write: `"Linf"`, `"L2"`, `numpy.inf`."""
    known = NORM_NAMES.get(norm.lower().replace("-", "").replace("_", "")) if isinstance(norm, str) else norm
    known = "inf" if isinstance(norm, float) and norm == math.inf else known
    if known not in NORMS:
        _validation.check_choice("norm", norm, NORMS)
    return NORMS[NORMS.index(known)]


def _read_ratio(eps: Any) -> Any:
    """Return the number that a ratio such as "8/255" means; anything else unchanged, also other texts."""
    try:
        return float(Fraction(eps)) if isinstance(eps, str) and "/" in eps else eps
    except (ValueError, ZeroDivisionError, OverflowError):
        return eps


def project(x_adv: Tensor, x: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """Return the nearest point of the ball around `x`, clipped to the valid range.

    Args:
        x_adv: Shape `(batch, ...)`.
        x: The centre of the ball, of the same shape, within the range.
        bounds: See `ThreatModel.bounds`.
        norm: `"inf"` or 2.
    """
    if norm == "inf":
        x_adv = ops.clip(x_adv, x - bounds.eps, x + bounds.eps)
    else:
        delta = x_adv - x
        x_adv = x + delta * ops.minimum(1.0, bounds.eps / ops.maximum(_length(delta), 1e-30))
    return ops.clip(x_adv, bounds.clip_min, bounds.clip_max)


def steepest_ascent(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the step of size 1 that gains the most: the sign of the gradient, or the gradient at length 1.

    Args:
        gradient: Shape `(batch, ...)`. Where it is 0, so is the step.
        norm: `"inf"` or 2.
    """
    if norm == "inf":
        return ops.sign(gradient)
    # The square of a small gradient would underflow.
    largest = ops.max(ops.abs(gradient), axis=tuple(range(1, len(gradient.shape))), keepdims=True)
    gradient = gradient / ops.maximum(largest, 1e-30)
    return gradient / ops.maximum(_length(gradient), 1e-30)


def random_delta(shape: tuple[Any, ...], eps: Tensor, norm: Norm, seed: keras.random.SeedGenerator) -> Tensor:
    """Draw points of the ball around 0, uniformly, in a program that trains.

    Args:
        shape: `(batch, ...)`.
        eps: The radius, a scalar.
        norm: `"inf"` or 2.
        seed: Where the random numbers come from.
    """
    if norm == "inf":
        return eps * keras.random.uniform(shape, -1.0, 1.0, "float32", seed)
    features = ops.cast(math.prod(shape[1:]), "float32")
    radius = keras.random.uniform((shape[0],) + (1,) * (len(shape) - 1), dtype="float32", seed=seed) ** (1 / features)
    return eps * radius * steepest_ascent(keras.random.normal(shape, dtype="float32", seed=seed), norm)


def _length(x: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(x), axis=tuple(range(1, len(x.shape))), keepdims=True))
