"""Square: a random search that needs logits only, and no gradient."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _validation
from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.attacks.loop import run_steps
from keras_drsl.attacks.noise import gradient_free_rows, keep_better
from keras_drsl.models.classifier import Classifier
from keras_drsl.threat import Bounds, lengths, project, unscale

# The side of the squares shrinks after these shares of the queries: their area is halved.
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
DRAW_AT_ONCE = 100  # queries whose random numbers are drawn together


class Square(Attack):
    """Change one random square of the image at a time, and keep changes that raise the margin.

    Use it to detect gradient masking: a defense that only hides the gradient does not stop it.

    Formula (L-inf): the start is vertical stripes of +-eps. Each query sets a square at a random position to +-eps,
    with one sign per channel.

    Formula (L2, L1): the start is a tiling of smooth bumps of total length eps. Each query moves the perturbation of
    one window, and the part of the ball that is not used, to another window, as a bump.

    A change is kept if it raises the margin of the largest non-true logit over the true one. The squares cover a share
    `p_init` of the image at first, and less later.

    Note:

    - Inputs `(height, width, channels)` are images, in the order of `keras.config.image_data_format()`.
    - Inputs `(height, width)` are images of one channel, vectors are images of one column, and the first axes of
      inputs with more than three axes are joined.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        queries: How many points to try, >= 1.
        p_init: The share of the image that a square covers at first, in (0, 1].
        restarts: How many searches, >= 1.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 4, 4, 1), 0.5), np.arange(4)
    >>> keras_drsl.attacks.Square(eps=0.1, queries=10)(model, x, y).shape
    (4, 4, 4, 1)

    Reference: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
    search", arXiv:1912.00049; in L1: Croce and Hein, arXiv:2103.01208.
    """

    needs_gradient = False

    def __init__(
        self,
        eps: float | None = None,
        *,
        queries: int = 5000,
        p_init: float = 0.8,
        restarts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(eps, **options)
        self.queries = _validation.check_integer("queries", queries, at_least=1)
        self.p_init = _validation.check_number("p_init", p_init, "a number in (0, 1]", lambda share: 0 < share <= 1)
        self.restarts = _validation.check_integer("restarts", restarts, at_least=1)

    @property
    def num_evaluations(self) -> int:
        """How many times one search evaluates the model per example."""
        return self.queries

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by random squares; see the base class for arguments and result."""
        shape = batch.x.shape[1:]
        channels = image_shape(shape)[2]
        generators = batch.generators(self)
        rows = gradient_free_rows(batch) | {"delta": self._start(shape, generators)}
        drawn = np.zeros((len(batch.x), DRAW_AT_ONCE, 5 + channels), "float32")

        def arguments(query: int, left: Array) -> tuple[Any, ...]:
            if query % DRAW_AT_ONCE == 0:
                for row in left:
                    drawn[row] = generators[row].random(drawn.shape[1:], "float32")
            return self.threat.bounds, self._params(query, shape), drawn[left, query % DRAW_AT_ONCE]

        step, options = (_square_step_inf, {}) if self.norm == "inf" else (_bump_step, {"norm": self.norm})
        steps_fn = classifier.compile_steps(step, shape=shape, stop=batch.stop_when_broken, **options)
        return run_steps(steps_fn, batch, rows, self.queries, arguments, count=classifier.count_queries, check_every=25)

    def _start(self, shape: tuple[int, ...], generators: list[np.random.Generator]) -> Array:
        """Return the perturbation that each row starts with, as images."""
        height, width, channels = image_shape(shape)
        if self.norm == "inf":
            stripes = [generator.choice((-1.0, 1.0), (1, width, channels)) for generator in generators]
            delta = np.broadcast_to(stripes, (len(stripes), height, width, channels))
        else:
            delta = np.array([tiling(height, width, channels, generator, self.norm) for generator in generators])
        return (self.threat.radius * delta).astype("float32")

    def _params(self, query: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the size of the window of a query and, in L2 and L1, the bumps of that size."""
        height, width, _ = image_shape(shape)
        area = self.p_init / 2 ** sum(query > share * self.queries for share in HALVINGS)
        window = window_shape(area, height, width, at_least=3 if self.norm == 2 else 1, odd=self.norm != "inf")
        # The first query evaluates the start.
        numbers = {"height": window[0], "width": window[1], "moves": int(query > 0)}
        params: dict[str, Any] = {name: np.int32(value) for name, value in numbers.items()}
        return params if self.norm == "inf" else params | bumps(*window, height * width, self.norm)


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the height, width and channels of the image that an input is read as."""
    if len(shape) < 3:
        height, width, channels = (*shape, 1, 1)[:3]
        return height, width, channels
    if keras.config.image_data_format() == "channels_first":
        shape = (*shape[:-3], *shape[-2:], shape[-3])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _to_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) > 2 and keras.config.image_data_format() == "channels_first":
        x = ops.moveaxis(x, -3, -1)
    return ops.reshape(x, (-1, *image_shape(shape)))


def _from_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) > 2 and keras.config.image_data_format() == "channels_first":
        x = ops.reshape(x, (-1, *shape[:-3], *shape[-2:], shape[-3]))
        return ops.moveaxis(x, -1, -3)
    return ops.reshape(x, (-1, *shape))


def window_shape(area: float, height: int, width: int, *, at_least: int, odd: bool) -> tuple[int, int]:
    """Return the height and width of a square that covers a share of the image, cut to the image.

    Args:
        area: The share of the image, in (0, 1].
        height: The height of the image.
        width: The width of the image.
        at_least: The smallest side.
        odd: Whether the side is odd, where the image has room for it.
    """
    pixels = area * height * width
    side = round(pixels if min(height, width) == 1 else math.sqrt(pixels))
    side += odd and side % 2 == 0
    side = max(side, at_least)
    return min(side, height), min(side, width)


def bump(height: int, width: int, norm: Norm = 2) -> Array:
    """Return a smooth bump next to its negative, of length 1 in a norm."""

    def half(height: int, width: int) -> Array:
        rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
        distance = np.maximum(np.abs(rows)[:, None], np.abs(columns)[None])
        rings = np.arange(max(height // 2, width // 2) + 1)
        values: Array = ((distance[..., None] <= rings) / (rings + 1.0) ** 2).sum(-1)
        return values

    whole = np.zeros((height, width))
    if height > 1:
        whole[: height // 2] = half(height // 2, width)
    whole[height // 2 :] = -half(height - height // 2, width)
    return _scale_to_one(whole, norm)


def _scale_to_one(values: Array, norm: Norm) -> Array:
    scaled: Array = values / lengths(np.abs(values).reshape(1, -1), norm)
    return scaled


def bumps(height: int, width: int, length: int, norm: Norm = 2) -> dict[str, Array]:
    """Return a bump and its transpose, flattened and padded. A bump that is not square stands for its transpose."""
    upright = bump(height, width, norm)
    tables = {"upright": upright, "lying": upright.T if height == width else upright}
    return {name: np.pad(table.ravel(), (0, length - table.size)).astype("float32") for name, table in tables.items()}


def tiling(height: int, width: int, channels: int, generator: np.random.Generator, norm: Norm = 2) -> Array:
    """Return bumps of random signs, five along the shorter side of the image, of total length 1."""
    side = max((min(height, width) if width > 1 else height) // 5, 1)
    tile = bump(min(side, height), min(side, width))
    counts = -(-height // tile.shape[0]), -(-width // tile.shape[1])
    signs = generator.choice((-1.0, 1.0), (*counts, channels))
    tiles = np.kron(signs, tile[:, :, None])[:height, :width]
    return _scale_to_one(tiles, norm)


def _window(params: dict[str, Tensor], position: Tensor, image: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return the row and column of each pixel relative to a window, `(batch, height, 1)` and `(batch, 1, width)`.

    The position of the window is a pair of random numbers in [0, 1), shape `(batch, 2)`.
    """
    offsets = []
    for axis, name in enumerate(("height", "width")):
        room = ops.cast(image[axis] - params[name] + 1, "float32")
        start = ops.cast(ops.floor(position[:, axis] * room), "int32")
        offset = ops.arange(image[axis], dtype="int32")[None] - start[:, None]
        offsets.append(offset[:, :, None] if axis == 0 else offset[:, None, :])
    return offsets[0], offsets[1]


def _inside(params: dict[str, Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """Return which pixels lie in the window, `(batch, height, width, 1)`."""
    vertical = ops.logical_and(rows >= 0, rows < params["height"])
    horizontal = ops.logical_and(columns >= 0, columns < params["width"])
    return ops.expand_dims(ops.logical_and(vertical, horizontal), -1)


def _accept(
    classifier: Classifier, rows: dict[str, Tensor], bounds: Bounds, delta: Tensor, shape: tuple[int, ...], stop: bool
) -> dict[str, Tensor]:
    """Return the rows with the changed perturbation where it raises the margin."""
    x_adv = ops.clip(rows["x"] + bounds.scale * _from_images(delta, shape), bounds.clip_min, bounds.clip_max)
    kept = keep_better(classifier, rows, x_adv, stop=stop)
    better = kept["margin"] > rows["margin"]
    if stop:
        better = ops.logical_or(better, kept["wrong"] >= 1)
    return kept | {"delta": ops.where(ops.reshape(better, (-1, 1, 1, 1)), delta, rows["delta"])}


def _signs(drawn: Tensor) -> Tensor:
    # Of two Python numbers, `where` would make the default float type.
    return 1.0 - 2.0 * ops.cast(drawn[:, 5:] < 0.5, "float32")[:, None, None, :]


def _square_step_inf(
    classifier: Classifier,
    rows: dict[str, Tensor],
    bounds: Bounds,
    params: dict[str, Tensor],
    drawn: Tensor,
    *,
    shape: tuple[int, ...],
    stop: bool,
) -> dict[str, Tensor]:
    """Set one square to a corner of the ball."""
    inside = _inside(params, *_window(params, drawn[:, :2], image_shape(shape)))
    changed = ops.logical_and(inside, params["moves"] > 0)
    delta = ops.where(changed, bounds.eps * _signs(drawn), rows["delta"])
    return _accept(classifier, rows, bounds, delta, shape, stop)


def _bump_step(
    classifier: Classifier,
    rows: dict[str, Tensor],
    bounds: Bounds,
    params: dict[str, Tensor],
    drawn: Tensor,
    *,
    shape: tuple[int, ...],
    stop: bool,
    norm: Norm,
) -> dict[str, Tensor]:
    """Replace the perturbation of two windows, and the unused part of the ball, by a bump in the first window."""
    image = image_shape(shape)

    def power(values: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return the sum that the length is the square root of in L2, and that is the length in L1."""
        return ops.sum(ops.square(values) if norm == 2 else ops.abs(values), axis=axes, keepdims=True)

    def length(values: Tensor, axes: tuple[int, ...]) -> Tensor:
        return ops.sqrt(power(values, axes)) if norm == 2 else power(values, axes)

    # The length that clipping takes away can be used elsewhere.
    x = rows["x"]
    x_adv = ops.clip(x + bounds.scale * _from_images(rows["delta"], shape), bounds.clip_min, bounds.clip_max)
    held = _to_images(unscale(x_adv - x, bounds), shape)
    row, column = _window(params, drawn[:, :2], image)
    first, second = (
        _inside(params, row, column),
        _inside(params, *_window(params, drawn[:, 2:4], image)),
    )
    # Outside the first window the bump is not used, so any valid index does.
    row = ops.clip(row, 0, params["height"] - 1)
    column = ops.clip(column, 0, params["width"] - 1)
    index = row * params["width"] + column
    shape_of_bump = ops.where(
        drawn[:, 4, None, None] < 0.5, ops.take(params["upright"], index), ops.take(params["lying"], index)
    )
    in_first = ops.where(first, held, 0.0)
    in_both = ops.where(ops.logical_or(first, second), held, 0.0)
    # The new bump keeps the direction of the perturbation that it replaces.
    fresh = ops.expand_dims(shape_of_bump, -1) * _signs(drawn) + in_first / (length(in_first, (1, 2)) + 1e-12)
    fresh = ops.where(first, fresh, 0.0)
    if len(bounds.scale.shape):
        # What is spent on features that may not change is lost.
        fresh = fresh * _to_images(ops.broadcast_to(ops.cast(bounds.scale > 0, "float32"), ops.shape(x)), shape)
    whole = ops.square(bounds.eps) if norm == 2 else bounds.eps
    unused = ops.maximum(whole - power(held, (1, 2, 3)), 0.0) / image[2]
    budget = unused + power(in_both, (1, 2))
    budget = ops.sqrt(budget) if norm == 2 else budget
    fresh = fresh / (length(fresh, (1, 2)) + 1e-12) * budget
    changed = ops.where(first, fresh, ops.where(second, 0.0, held))
    changed = ops.where(params["moves"] > 0, changed, rows["delta"])
    if norm == 1:
        nearest = project(x + bounds.scale * _from_images(changed, shape), x, bounds, norm)
        return _accept(classifier, rows, bounds, _to_images(unscale(nearest - x, bounds), shape), shape, stop)
    # The perturbation is scaled to the surface of the ball; clipping can only shorten it.
    changed = changed / (length(changed, (1, 2, 3)) + 1e-12) * bounds.eps
    return _accept(classifier, rows, bounds, changed, shape, stop)
