"""The threat model: an attacker may move an input within a ball and within the valid range.

`ThreatModel` holds its numbers, and is the one place that defines their units. Compiled programs take the numbers as
tensors (`ThreatModel.bounds`), so that one program serves every radius; the functions below work on these.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _validation
from keras_drsl._typing import Array, Norm, Numbers, Tensor

NORMS: tuple[Norm, ...] = ("inf", 2, 1)
NORM_NAMES: dict[str, Norm] = {"inf": "inf", "linf": "inf", "l∞": "inf", "2": 2, "l2": 2, "1": 1, "l1": 1}
DUAL: dict[Norm, Norm] = {"inf": 1, 2: 2, 1: "inf"}
SPARSITY = 20  # a step in L1 moves one in so many features
BISECTIONS = 25  # the rounding of float32


class Bounds(NamedTuple):
    """Hold the numbers of a threat model as compiled programs take them, float32.

    Attributes:
        eps: The largest radius, a scalar.
        scale: The radius of each feature over the largest one, 0 where a feature may not change; a scalar 1, or an
            array that fits the shape of an input.
        clip_min: The smallest valid input value, a scalar or such an array.
        clip_max: The largest valid input value, a scalar or such an array.
    """

    eps: Tensor
    scale: Tensor
    clip_min: Tensor
    clip_max: Tensor


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """Define which perturbed inputs an attack may return.

    Use it where several calls share one threat model: attacks, `evaluate_robustness`, `robustness_curve`,
    `RobustnessMonitor` and `AdversarialTraining` take it as `threat=`. They also take its numbers as arguments of their
    own.

    Formula: `||x_adv - x|| <= eps` in the norm, and `clip_min <= x_adv <= clip_max` for every value. With several
    values of `eps`: `||(x_adv - x) / eps|| <= 1`. Where `mask` is True, `x_adv = x`, which may lie outside the range.

    Note:

    - All numbers are in units of the input. Images in [0, 1] have `eps=8 / 255`; images in [0, 255] have `eps=8` and
      `clip_max=255`; images in [-1, 1] have `eps=16 / 255` and `clip_min=-1`.
    - Several numbers for `eps`, `clip_min`, `clip_max` or `mask` are an array or nested lists whose shape fits that of
      an input as in NumPy: `(channels,)` for one number per channel, in the layout `channels_last`. They are kept as
      nested tuples.
    - Threat models with equal numbers are equal and have equal hashes.

    Args:
        eps: The radius of the ball around each input, > 0, a number or a ratio as "8/255"; or one number >= 0 per
            channel or feature, of which 0 leaves the feature as it is. In L-inf no larger than `clip_max - clip_min`.
        norm: `"inf"`, 2 or 1. Other names of them, such as `"Linf"` and `"L2"`, are read as these.
        clip_min: The smallest valid input value; or one per channel or feature.
        clip_max: The largest valid input value, above `clip_min`; or one per channel or feature.
        mask: True for each channel or feature that may not change; None to let all change.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> threat = keras_drsl.ThreatModel(eps=8, clip_max=255)
    >>> threat
    ThreatModel(eps=8.0, norm='inf', clip_min=0.0, clip_max=255.0, mask=None)
    >>> x, y = np.full((2, 8), 100.0), np.array([0, 1])
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Rescaling(1 / 255), keras.layers.Dense(2)])
    >>> x_adv = keras_drsl.attacks.FGSM(threat=threat)(model, x, y)
    >>> threat.contains(x_adv, x).tolist()
    [True, True]
    """

    eps: Numbers
    norm: Norm = "inf"
    clip_min: Numbers = 0.0
    clip_max: Numbers = 1.0
    mask: Any = None

    def __post_init__(self) -> None:
        checked = {
            "eps": _check_eps(_read_ratio(self.eps)),
            "norm": _check_norm(self.norm),
            "clip_min": _check_numbers("clip_min", self.clip_min, "a finite number", lambda value: True),
            "clip_max": _check_numbers("clip_max", self.clip_max, "a finite number", lambda value: True),
            "mask": _check_mask(self.mask),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        numbers = [np.asarray(getattr(self, name)) for name in ("eps", "clip_min", "clip_max")]
        try:
            np.broadcast_shapes(*(values.shape for values in numbers), np.shape(self.mask or 0))
        except ValueError:
            raise ValueError(
                "`eps`, `clip_min`, `clip_max` and `mask` must have shapes that fit each other. Received: shapes "
                f"{', '.join(str(values.shape) for values in numbers)} and {np.shape(self.mask or 0)}"
            ) from None
        eps, low, high = numbers
        if not (low < high).all():
            raise ValueError(
                f"`clip_min` must be below `clip_max`. Received: clip_min={self.clip_min}, clip_max={self.clip_max}"
            )
        if self.norm == "inf" and (eps > high - low).any():
            hint = _hint(eps) if (low == 0).all() and (high == 1).all() else ""
            raise ValueError(
                f"`eps` must be no larger than the range, clip_max - clip_min = {_format(self.span)}. "
                f"Received: eps={_format(self.eps)}{hint and '.' + hint}"
            )
        if self.radius == 0:
            raise ValueError("`mask` must leave at least one feature that may change. Received: True for all")

    @classmethod
    def from_arguments(
        cls,
        eps: Numbers | None = None,
        norm: Norm | None = None,
        clip_min: Numbers | None = None,
        clip_max: Numbers | None = None,
        threat: "ThreatModel | None" = None,
        mask: Any = None,
    ) -> "ThreatModel":
        """Return the threat model that a function's arguments describe.

        Args:
            eps: As in the class, or None.
            norm: As in the class, or None for the default.
            clip_min: As in the class, or None for the default.
            clip_max: As in the class, or None for the default.
            threat: A threat model in place of the others, or None.
            mask: As in the class.

        Raises:
            ValueError: If an argument is out of its range, if `threat` is given together with one of the others, or if
                both `threat` and `eps` are None.
        """
        arguments = {"eps": eps, "norm": norm, "clip_min": clip_min, "clip_max": clip_max, "mask": mask}
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
                f"`threat` must be given without `eps`, `norm`, `clip_min`, `clip_max` and `mask`, which it holds. "
                f"Received: threat={threat!r} and {received}"
            )
        return threat

    @cached_property
    def _eps_of_features(self) -> Array:
        """The radius of each feature, 0 where a feature may not change."""
        eps = np.asarray(self.eps, dtype="float64")
        return eps if self.mask is None else np.where(np.asarray(self.mask), 0.0, eps)

    @cached_property
    def radius(self) -> float:
        """The largest radius of a feature: `eps` itself where it is one number."""
        return float(self._eps_of_features.max())

    @cached_property
    def scale(self) -> Array:
        """The radius of each feature over the largest one, a scalar 1 where `eps` is one number without a mask."""
        return self._eps_of_features / self.radius

    @cached_property
    def span(self) -> Numbers:
        """The length of the valid range, one number or one per feature."""
        span: Numbers = _as_tuples(np.asarray(self.clip_max) - np.asarray(self.clip_min))
        return span

    @cached_property
    def bounds(self) -> Bounds:
        """The numbers as compiled programs take them."""
        low, high = (np.asarray(values, dtype="float32") for values in (self.clip_min, self.clip_max))
        if self.mask is not None:
            # A feature that may not change keeps a value outside the range.
            masked, largest = np.asarray(self.mask), np.finfo("float32").max
            low, high = np.where(masked, -largest, low), np.where(masked, largest, high)
        return Bounds(*(np.asarray(values, dtype="float32") for values in (self.radius, self.scale, low, high)))

    @property
    def tensors(self) -> Bounds:
        """The numbers as tensors, for a program that keeps them."""
        return Bounds(*map(ops.convert_to_tensor, self.bounds))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers by name, as JSON takes them; the mask only where there is one."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {
            name: np.asarray(value).tolist() if isinstance(value, tuple) else value for name, value in values.items()
        }
        return {name: value for name, value in lists.items() if name != "mask" or value is not None}

    def replace(self, **changes: Any) -> "ThreatModel":
        """Return a threat model with some numbers changed."""
        return dataclasses.replace(self, **changes)

    def with_radius(self, radius: float) -> "ThreatModel":
        """Return the threat model with all of `eps` scaled so that the largest radius is another one."""
        is_one = not isinstance(self.eps, tuple)
        return self.replace(eps=radius if is_one else np.asarray(self.eps) * (radius / self.radius))

    def append_fixed(self, features: int, count: int) -> "ThreatModel":
        """Return the threat model of inputs with more features along the last axis, which may not change.

        Args:
            features: The length of the last axis of an input.
            count: How many features are appended to it.
        """

        def append(values: Any, fixed: Any) -> Any:
            array = np.asarray(values)
            whole = np.broadcast_to(array, (*array.shape[:-1], features))
            return np.concatenate([whole, np.full((*whole.shape[:-1], count), fixed)], axis=-1)

        # One number stays one: the mask alone says which features may not change.
        several = {name: getattr(self, name) for name in ("eps", "clip_min", "clip_max")}
        changes = {name: append(value, np.max(value)) for name, value in several.items() if isinstance(value, tuple)}
        if "clip_min" in changes:
            changes["clip_min"] = append(self.clip_min, np.min(self.clip_min))
        return self.replace(**changes, mask=append(self.mask or False, True)) if count else self

    def largest_eps(self, shape: tuple[int, ...]) -> float:
        """Return the radius of a ball that holds every valid input of a shape `(...)`."""
        scale, span = (np.broadcast_to(values, shape) for values in (self.scale, self.span))
        free = scale > 0
        needed = span[free] / scale[free]
        # Of shares of the largest one, which lets no square overflow.
        return float(needed.max() * lengths((needed / needed.max())[None], self.norm)[0])

    def validate(self, name: str, x: Array) -> None:
        """Check that inputs fit the threat model.

        Args:
            name: The name of the argument that holds the inputs, for the error.
            x: Inputs, shape `(count, ...)`.

        Raises:
            ValueError: If a value lies outside the valid range or is NaN, if `eps`, a limit or the mask has no shape
                that fits the inputs, or if `eps` exceeds the largest distance between valid inputs of this shape.
        """
        shape = x.shape[1:]
        for field in ("eps", "clip_min", "clip_max", "mask"):
            of_field = np.shape(getattr(self, field)) if isinstance(getattr(self, field), tuple) else ()
            if not _fits(of_field, shape):
                raise ValueError(
                    f"`{field}` must be one number or fit inputs of shape {shape}, as ({shape[-1]},) does. "
                    f"Received: shape {of_field}"
                )
        masked = np.asarray(self.mask or False)
        if not (
            ((x >= np.asarray(self.clip_min)) & (x <= np.asarray(self.clip_max))) | (masked & np.isfinite(x))
        ).all():
            free = x[:, np.broadcast_to(~masked, shape)]
            raise ValueError(
                f"`{name}` must lie in [clip_min, clip_max] = [{_format(self.clip_min)}, {_format(self.clip_max)}]. "
                f"Received: values from {free.min():g} to {free.max():g}."
                f"{_hint(free) or ' Give clip_min and clip_max that hold all valid values.'}"
            )
        largest = self.largest_eps(shape)
        if self.radius > largest:
            raise ValueError(
                f"`eps` must be no larger than the distance of two valid inputs, {largest:g} in L{self.norm}. "
                f"Received: eps={_format(self.eps)}"
            )

    def size(self, delta: Array) -> Array:
        """Return the norm of each perturbation, float64, shape `(count,)`.

        It is measured in units of the largest radius: with one number for `eps`, in those of the input. It is infinite
        where a feature has changed that may not.

        Args:
            delta: Perturbations of shape `(count, ...)`.
        """
        delta = np.abs(delta.astype("float64"))
        if self.scale.ndim:
            with np.errstate(divide="ignore", invalid="ignore"):
                delta = np.where(delta > 0, delta / self.scale, 0.0)
        return lengths(delta.reshape(len(delta), -1), self.norm)

    def contains(self, x_adv: Array, x: Array) -> Array:
        """Return which perturbed inputs are finite and allowed, up to float32 rounding, shape `(count,)`.

        Args:
            x_adv: Perturbed inputs, shape `(count, ...)`.
            x: The inputs themselves, of the same shape.
        """
        slack = 1e-6 * np.asarray(self.span)
        masked = np.asarray(self.mask or False)
        # In units of the largest radius, rounding is larger for features of a smaller one.
        scale = self.scale
        rounding = (slack / np.where(scale > 0, scale, np.inf)).max()
        axes = tuple(range(1, x.ndim))
        if self.norm == 1:
            # Here the rounding of each feature that has changed adds up.
            changed = np.where(x_adv != x, np.abs(x_adv), 0) / np.where(scale > 0, scale, np.inf)
            rounding = rounding + 2.0**-24 * np.asarray(changed.sum(axis=axes, dtype="float64"))
        with np.errstate(invalid="ignore"):
            allowed: Array = (
                np.isfinite(x_adv).all(axis=axes)
                & (self.size(x_adv.astype("float64") - x) <= self.radius * (1 + 1e-5) + rounding)
                & ((x_adv >= np.asarray(self.clip_min) - slack) | masked).all(axis=axes)
                & ((x_adv <= np.asarray(self.clip_max) + slack) | masked).all(axis=axes)
            )
        return allowed

    def project(self, x_adv: Tensor, x: Tensor, radius: Array | None = None) -> Tensor:
        """Return the nearest point of the ball around `x`, clipped to the valid range.

        Args:
            x_adv: Tensors or arrays of shape `(batch, ...)`.
            x: The centres of the balls, of the same shape, within the range.
            radius: The radius of each ball in units of the largest one, shape `(batch,)`; None for that of the threat
                model.
        """
        bounds = self.tensors
        if radius is not None:
            bounds = bounds._replace(eps=ops.convert_to_tensor(as_column(radius, x).astype("float32")))
        return project(ops.convert_to_tensor(x_adv), ops.convert_to_tensor(x), bounds, self.norm)

    def round_to_integers(self, x_adv: Array, x: Array) -> Array:
        """Return perturbed inputs with integer values that lie within the threat model, float32.

        Args:
            x_adv: Inputs within the threat model, shape `(batch, ...)`.
            x: The clean inputs, of integer values.
        """
        delta = x_adv.astype("float64") - x
        nearest, shorter = np.rint(delta), np.trunc(delta)
        scale = np.broadcast_to(np.where(np.asarray(self.scale) > 0, self.scale, 1.0), x.shape)
        radius = self.radius * (1 + 1e-6)
        if self.norm == "inf":
            nearest = np.where(np.abs(nearest) <= radius * scale, nearest, shorter)
        else:
            # Features that were rounded away from the clean input go back, those with the smallest fraction first,
            # until the input lies in the ball.
            powers = [(np.abs(values / scale) ** self.norm).reshape(len(x), -1) for values in (nearest, shorter)]
            added = powers[0] - powers[1]
            excess = powers[0].sum(axis=1) - radius**self.norm
            order = np.argsort(np.abs(shorter - delta).reshape(len(x), -1), axis=1)
            before = np.cumsum(np.take_along_axis(added, order, axis=1), axis=1)
            before -= np.take_along_axis(added, order, axis=1)
            back = np.zeros(added.shape, bool)
            np.put_along_axis(back, order, before < excess[:, None], axis=1)
            nearest = np.where(back.reshape(x.shape), shorter, nearest)
        rounded: Array = (x + nearest).astype("float32")
        return rounded

    def sample(self, generators: list[np.random.Generator], shape: tuple[int, ...]) -> Array:
        """Draw one point of the ball around 0 per generator, uniformly, float32, shape `(batch, *shape)`."""
        if self.norm == "inf":
            points = [generator.uniform(-self.radius, self.radius, shape) for generator in generators]
        elif self.norm == 1:
            points, free = [], np.broadcast_to(self.scale > 0, shape)
            for generator in generators:
                point = generator.standard_exponential(shape) * free
                total = point.sum() + generator.standard_exponential()
                points.append(self.radius * point * generator.choice((-1.0, 1.0), shape) / total)
        else:
            points, free = [], np.broadcast_to(self.scale > 0, shape)
            for generator in generators:
                point = generator.standard_normal(shape) * free
                radius = self.radius * generator.uniform() ** (1 / free.sum())
                points.append(point * radius / np.sqrt((point**2).sum()))
        return np.asarray(np.asarray(points) * self.scale, dtype="float32").reshape(-1, *shape)


def _hint(x: Array) -> str:
    """Return, as a sentence, which arguments images of a usual range need; empty for another range."""
    low, high = x.min(), x.max()
    if -1 <= low < 0 and high <= 1:
        return " Images in [-1, 1] need clip_min=-1; the usual 8/255 of [0, 1] is eps=16/255 there."
    if low >= 0 and 1 < high <= 255:
        return " Images in [0, 255] need clip_max=255; the usual 8/255 of [0, 1] is eps=8 there."
    return ""


def _check_eps(eps: Any) -> Numbers:
    """Return one radius, or several as nested tuples."""
    if not _is_several(eps):
        return _validation.check_positive("eps", eps)
    several = _check_numbers("eps", eps, "a number >= 0", lambda value: value >= 0)
    if not np.any(several):
        raise ValueError("`eps` must hold a positive number. Received: 0 for all features")
    return several


def _check_numbers(name: str, values: Any, rule: str, obeys: Callable[[float], bool]) -> Numbers:
    """Return one number, or several as nested tuples."""
    if not _is_several(values):
        return _validation.check_number(name, values, rule, obeys)
    array = _to_array(name, values)
    for value in array.ravel().tolist():
        _validation.check_number(name, value, rule, obeys)
    numbers: Numbers = _as_tuples(array.astype("float64"))
    return numbers


def _check_mask(mask: Any) -> Any:
    """Return a mask as nested tuples of bool, or None."""
    if mask is None:
        return None
    array = _to_array("mask", mask)
    if array.ndim == 0 or not np.isin(array, (False, True)).all():
        raise ValueError(f"`mask` must hold True or False for each channel or feature. Received: {mask!r:.60}")
    return _as_tuples(array.astype(bool)) if array.any() else None


def _to_array(name: str, values: Any) -> Array:
    """Return nested lists, an array or a tensor as an array of numbers."""
    try:
        array = np.asarray(ops.convert_to_numpy(values) if ops.is_tensor(values) else values)
    except ValueError as error:
        raise ValueError(f"`{name}` must hold rows of equal length. Received: {error}") from error
    if array.size == 0 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"`{name}` must hold numbers. Received: shape {array.shape}, dtype {array.dtype}")
    return array


def _is_several(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        or getattr(values, "ndim", 0) > 0
        or (ops.is_tensor(values) and len(values.shape) > 0)
    )


def _as_tuples(values: Any) -> Any:
    """Return an array as nested tuples, which are equal and hashable by value; a single value as a number."""
    if isinstance(values, np.ndarray | np.generic):
        values = values.item() if values.size == 1 else values.tolist()
    return tuple(map(_as_tuples, values)) if isinstance(values, list) else values


def _fits(shape: tuple[int, ...], of_input: tuple[int, ...]) -> bool:
    """Return whether an array broadcasts to the shape of an input."""
    try:
        return np.broadcast_shapes(shape, of_input) == tuple(of_input)
    except ValueError:
        return False


def describe_radius(settings: Mapping[str, Any], *, limits: bool = True) -> str:
    """Return, for a reader, the radius of a threat model and the range of the inputs: "eps 8 of 0..255".

    Args:
        settings: The numbers as `ThreatModel.to_dict` returns them.
        limits: Whether to name the range.
    """
    text = f"eps {_format(settings['eps'], '.4g')}"
    if limits and "clip_min" in settings:
        low, high = np.min(settings["clip_min"]), np.max(settings["clip_max"])
        text += f" of {low:g}..{high:g}"
    if settings.get("mask") is not None:
        text += ", masked"
    return text


def _format(numbers: Any, form: str = "g") -> str:
    """Return one number as text, or the range of several."""
    low, high = np.min(numbers), np.max(numbers)
    return f"{high:{form}}" if low == high else f"{low:{form}} to {high:{form}}, by feature"


def _check_norm(norm: Any) -> Any:
    """Return a norm in the form of `NORMS`, also from the names that people write: `"Linf"`, `"L2"`, `numpy.inf`."""
    known = NORM_NAMES.get(norm.lower().replace("-", "").replace("_", "")) if isinstance(norm, str) else norm
    known = "inf" if isinstance(norm, float) and norm == math.inf else known
    _validation.check_choice("norm", known if known in NORMS else norm, NORMS)
    return NORMS[NORMS.index(known)]


def _read_ratio(eps: Any) -> Any:
    """Return the number that a ratio such as "8/255" means; anything else unchanged, also other texts."""
    try:
        return float(Fraction(eps)) if isinstance(eps, str) and "/" in eps else eps
    except (ValueError, ZeroDivisionError, OverflowError):
        return eps


def as_column(values: Any, x: Tensor) -> Any:
    """Return an array or a tensor of one value per row in a shape that fits rows of the shape of `x`."""
    reshape = np.reshape if isinstance(values, np.ndarray) else ops.reshape
    return reshape(values, (-1,) + (1,) * (len(x.shape) - 1))


def lengths(delta: Array, norm: Norm) -> Array:
    """Return the norm of each row, shape `(count,)`.

    Args:
        delta: Values >= 0, shape `(count, features)`.
        norm: `"inf"`, 2 or 1.
    """
    if norm == "inf":
        return np.asarray(delta.max(axis=1, initial=0))
    return np.asarray(delta.sum(axis=1) if norm == 1 else np.sqrt((delta**2).sum(axis=1)))


def project(x_adv: Tensor, x: Tensor, bounds: Bounds, norm: Norm) -> Tensor:
    """Return the nearest point of the ball around `x`, clipped to the valid range.

    In L1 it is the nearest point that lies in both. There, the nearest point of the ball would leave the range with
    most of its few features, and lose them (Croce and Hein, "Mind the box", arXiv:2103.01208).

    Args:
        x_adv: Shape `(batch, ...)`.
        x: The centre of the ball, of the same shape, within the range.
        bounds: See `ThreatModel.bounds`. A radius may also be one per row, shape `(batch, 1, ...)`.
        norm: `"inf"`, 2 or 1.
    """
    if norm == "inf":
        eps = bounds.eps * bounds.scale
        x_adv = ops.clip(x_adv, x - eps, x + eps)
    elif norm == 1:
        delta = unscale(x_adv - x, bounds)
        sizes = _shrink(ops.abs(delta), room_along(delta, x, bounds), bounds.eps)
        x_adv = x + bounds.scale * ops.sign(delta) * sizes
    else:
        delta = unscale(x_adv - x, bounds)
        x_adv = x + bounds.scale * delta * ops.minimum(1.0, bounds.eps / ops.maximum(measure(delta, 2), 1e-30))
    return ops.clip(x_adv, bounds.clip_min, bounds.clip_max)


def _shrink(sizes: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """Return the nearest values in `[0, room]` whose sum over each row is at most `eps`.

    They are `clip(sizes - level, 0, room)`, with the smallest level >= 0 that makes the sum small enough.

    Args:
        sizes: Values >= 0, shape `(batch, ...)`.
        room: The largest value of each, >= 0.
        eps: The largest sum, a scalar or one per row, shape `(batch, 1, ...)`.
    """
    axes = tuple(range(1, len(sizes.shape)))

    def total(values: Tensor) -> Tensor:
        return ops.sum(values, axis=axes, keepdims=True)

    def halve(_: Tensor, limits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = limits
        level = (low + high) / 2
        is_large = total(ops.clip(sizes - level, 0.0, room)) > eps
        return ops.where(is_large, level, low), ops.where(is_large, high, level)

    highest = ops.max(sizes, axis=axes, keepdims=True, initial=0.0)  # also of no rows
    low, high = ops.fori_loop(0, BISECTIONS, halve, (ops.zeros_like(highest), highest))
    # Between two neighbouring levels, the same features change by more than 0 and less than their room.
    left = sizes - (low + high) / 2
    is_full, is_part = left >= room, ops.logical_and(left > 0, left < room)
    number = total(ops.cast(is_part, "float32"))
    exact = (total(ops.where(is_full, room, ops.where(is_part, sizes, 0.0))) - eps) / ops.maximum(number, 1.0)
    level = ops.where(number > 0, ops.clip(exact, low, high), high)
    is_inside = total(ops.minimum(sizes, room)) <= eps
    values = ops.where(is_inside, ops.minimum(sizes, room), ops.clip(sizes - level, 0.0, room))
    # Differences of nearly equal sizes and level are rounded, and of many features the errors add up.
    return values * ops.minimum(1.0, eps / ops.maximum(total(values), 1e-30))


def room_along(direction: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """Return how far each feature can go along a direction within the valid range, in units of its radius."""
    return unscale(ops.where(direction > 0, bounds.clip_max - x, x - bounds.clip_min), bounds)


def farthest(gradient: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """Return the point of the L1 ball around `x` and of the valid range that is the farthest along a gradient.

    The features of the largest gradients go to the end of the range, as long as the radius lasts.

    Args:
        gradient: Shape `(batch, ...)`.
        x: The centre of the ball, of the same shape, within the range.
        bounds: See `ThreatModel.bounds`.
    """
    gain, room = _flat(ops.abs(bounds.scale * gradient)), _flat(room_along(gradient, x, bounds))
    order = ops.argsort(-gain, axis=1)
    # A fixed feature has no limits: 0 of infinity.
    room = ops.minimum(ops.take_along_axis(room, order, axis=1), ops.reshape(bounds.eps, (-1, 1)))
    before = ops.cumsum(room, axis=1) - room
    sizes = ops.clip(ops.reshape(bounds.eps, (-1, 1)) - before, 0.0, room)
    sizes = ops.take_along_axis(sizes, ops.argsort(order, axis=1), axis=1)
    point = x + bounds.scale * ops.sign(gradient) * ops.reshape(sizes, ops.shape(gradient))
    return ops.clip(point, bounds.clip_min, bounds.clip_max)


def unscale(delta: Tensor, bounds: Bounds) -> Tensor:
    """Return a perturbation in units in which each feature has the largest radius, 0 where it may not change."""
    free = ops.cast(bounds.scale > 0, "float32")
    return free * delta / ops.where(bounds.scale > 0, bounds.scale, 1.0)


def steepest_ascent(gradient: Tensor, norm: Norm, scale: Tensor = 1.0) -> Tensor:
    """Return the step of size 1 that gains the most: the sign of the gradient, or the gradient at length 1.

    In L1, where that would be one feature, it is the sign for the twentieth of features with the largest gradients.

    Args:
        gradient: Shape `(batch, ...)`. Where it is 0, so is the step.
        norm: `"inf"`, 2 or 1.
        scale: See `Bounds`.
    """
    if norm == "inf":
        return scale * ops.sign(gradient)
    gradient = scale * gradient
    if norm == 1:
        sizes = _flat(ops.abs(gradient))
        count = -(-ops.shape(sizes)[1] // SPARSITY)
        return scale * sparse_sign(gradient, ops.top_k(sizes, count)[0][:, -1])
    # The square of a small gradient would underflow.
    largest = ops.max(ops.abs(gradient), axis=tuple(range(1, len(gradient.shape))), keepdims=True)
    gradient = gradient / ops.maximum(largest, 1e-30)
    return scale * gradient / ops.maximum(measure(gradient, 2), 1e-30)


def random_delta(shape: tuple[Any, ...], bounds: Bounds, norm: Norm, seed: keras.random.SeedGenerator) -> Tensor:
    """Draw points of the ball around 0, uniformly, in a program that trains.

    Args:
        shape: `(batch, ...)`.
        bounds: See `ThreatModel.bounds`.
        norm: `"inf"`, 2 or 1.
        seed: Where the random numbers come from.
    """
    if norm == "inf":
        return bounds.eps * bounds.scale * keras.random.uniform(shape, -1.0, 1.0, "float32", seed)
    free = ops.cast(ops.broadcast_to(bounds.scale > 0, shape[1:]), "float32")
    if norm == 1:
        # Of exponential numbers, one more than features, each over the sum of all.
        signed = free * keras.random.uniform(shape, -1.0, 1.0, "float32", seed)
        sizes = -ops.log(ops.maximum(1.0 - ops.abs(signed), 1e-30))
        one = keras.random.uniform((shape[0],) + (1,) * (len(shape) - 1), dtype="float32", seed=seed)
        total = ops.sum(sizes, axis=tuple(range(1, len(shape))), keepdims=True) - ops.log(ops.maximum(one, 1e-30))
        return bounds.eps * bounds.scale * ops.sign(signed) * sizes / total
    radius = keras.random.uniform((shape[0],) + (1,) * (len(shape) - 1), dtype="float32", seed=seed)
    direction = steepest_ascent(free * keras.random.normal(shape, dtype="float32", seed=seed), norm)
    return bounds.eps * bounds.scale * radius ** (1 / ops.sum(free)) * direction


def measure(delta: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each row of a tensor, shape `(batch, 1, ...)`."""
    over = {"axis": tuple(range(1, len(delta.shape))), "keepdims": True}
    if norm == "inf":
        return ops.max(ops.abs(delta), **over)
    return ops.sum(ops.abs(delta), **over) if norm == 1 else ops.sqrt(ops.sum(ops.square(delta), **over))


def _flat(x: Tensor) -> Tensor:
    return ops.reshape(x, (ops.shape(x)[0], -1))


def sparse_sign(gradient: Tensor, least: Tensor) -> Tensor:
    """Return the sign of a gradient where it is large, over the number of such features; 0 elsewhere.

    Args:
        gradient: Shape `(batch, ...)`.
        least: The smallest size of a large element of each row, shape `(batch,)`.
    """
    signs = ops.where(ops.abs(gradient) >= as_column(least, gradient), ops.sign(gradient), 0.0)
    return signs / ops.maximum(measure(signs, 1), 1.0)
