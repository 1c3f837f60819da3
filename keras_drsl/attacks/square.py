"""Square: a random search that asks for logits only, never for a gradient."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _arguments
from keras_drsl.attacks.attack import Attack, Batch, search
from keras_drsl.attacks.classifier import Classifier
from keras_drsl.attacks.noise import keep_better, start_of

# After which share of the queries the size of the squares is halved.
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
DRAW_AT_ONCE = 100  # queries whose random numbers are drawn together


class Square(Attack):
    """A random search over squares of the image, each kept if the margin falls.

    Use it as the witness against gradient attacks: it sees no gradient, so nothing that only hides the gradient
    withstands it.

    Formula (L-inf): start from vertical stripes of +-eps; in each query, set a square at a random place to +-eps, one
    sign a channel. (L2): start from a tiling of smooth bumps of length eps; in each query, move what one window holds
    and what the ball has left to another, as a bump. A change stays if it raises the margin of the largest rival over
    the true class. The squares cover `p_init` of the image at first and less and less later.

    Inputs `(height, width, channels)` are taken as images, in the order of `keras.config.image_data_format()`,
    `(height, width)` as images of one channel, vectors as images of one column; of more axes the first ones are taken
    together.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        queries: how many points to try, >= 1.
        p_init: the share of the image that a square covers at first, in (0, 1].
        restarts: how many searches, >= 1.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of the search, >= 0.

    Raises:
        ValueError: for arguments out of their range.

    Example:

    >>> from keras_drsl.attacks import Square
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = Square(eps=0.1, queries=10)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
    search", arXiv:1912.00049.
    """

    def __init__(
        self,
        eps: float,
        *,
        queries: int = 5000,
        p_init: float = 0.8,
        restarts: int = 1,
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=seed)
        self.queries = _arguments.check_integer("queries", queries, at_least=1)
        self.p_init = _arguments.check_number("p_init", p_init, "a number in (0, 1]", lambda share: 0 < share <= 1)
        self.restarts = _arguments.check_integer("restarts", restarts, at_least=1)

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        shape = batch.x.shape[1:]
        height, width, channels = image_shape(shape)
        generators = batch.generators(self)
        if self.norm == "inf":
            stripes = [one.choice((-1.0, 1.0), (1, width, channels)) for one in generators]
            delta = np.broadcast_to(stripes, (len(stripes), height, width, channels))
        else:
            delta = np.array([tiling(height, width, channels, one) for one in generators])
        rows = start_of(batch) | {"delta": (self.eps * delta).astype("float32")}

        drawn = np.zeros((len(batch.x), DRAW_AT_ONCE, 5 + channels), "float32")

        def arguments(query: int, alive: np.ndarray) -> tuple:
            if query % DRAW_AT_ONCE == 0:
                for one in alive:
                    drawn[one] = generators[one].random(drawn.shape[1:], "float32")
            area = self.p_init / 2 ** sum(query > share * self.queries for share in HALVINGS)
            window = window_shape(area, height, width, at_least=1 if self.norm == "inf" else 3)
            # The first query looks at the start.
            numbers = {"height": window[0], "width": window[1], "moves": int(query > 0)}
            knobs: dict[str, Any] = {name: np.int32(value) for name, value in numbers.items()}
            if self.norm == 2:
                knobs |= bumps(*window, height * width)
            return self._ball(), knobs, drawn[alive, query % DRAW_AT_ONCE]

        step = square_step_inf if self.norm == "inf" else square_step_2
        return search(
            classifier.stepper(step, shape=shape),
            batch,
            rows,
            self.queries,
            arguments,
            look_every=25,
            persist=self._persist,
        )


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels that an input's axes are taken for."""
    if len(shape) < 3:
        height, width, channels = (*shape, 1, 1)[:3]
        return height, width, channels
    if keras.config.image_data_format() == "channels_first":
        shape = (*shape[:-3], *shape[-2:], shape[-3])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _to_images(x: Any, shape: tuple[int, ...]) -> Any:
    if len(shape) > 2 and keras.config.image_data_format() == "channels_first":
        x = ops.moveaxis(x, -3, -1)
    return ops.reshape(x, (-1, *image_shape(shape)))


def _from_images(x: Any, shape: tuple[int, ...]) -> Any:
    if len(shape) > 2 and keras.config.image_data_format() == "channels_first":
        x = ops.reshape(x, (-1, *shape[:-3], *shape[-2:], shape[-3]))
        return ops.moveaxis(x, -1, -3)
    return ops.reshape(x, (-1, *shape))


def window_shape(area: float, height: int, width: int, *, at_least: int) -> tuple[int, int]:
    """Height and width of a square that covers a share of the image, as far as the image has room for a square."""
    pixels = area * height * width
    side = round(pixels if min(height, width) == 1 else math.sqrt(pixels))
    if at_least > 1:
        side += side % 2 == 0
    side = max(side, at_least)
    return min(side, height), min(side, width)


def bump(height: int, width: int) -> np.ndarray:
    """A smooth bump beside its negative, of length 1."""

    def half(height: int, width: int) -> np.ndarray:
        rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
        reach = np.maximum(np.abs(rows)[:, None], np.abs(columns)[None])
        rings = np.arange(max(height // 2, width // 2) + 1)
        return ((reach[..., None] <= rings) / (rings + 1.0) ** 2).sum(-1)

    whole = np.zeros((height, width))
    if height > 1:
        whole[: height // 2] = half(height // 2, width)
    whole[height // 2 :] = -half(height - height // 2, width)
    return whole / np.sqrt((whole**2).sum())


def bumps(height: int, width: int, length: int) -> dict[str, np.ndarray]:
    """A bump and, where it fits, its transpose, each flat and filled up to a length."""
    upright = bump(height, width)
    tables = {"upright": upright, "lying": upright.T if height == width else upright}
    return {name: np.pad(table.ravel(), (0, length - table.size)).astype("float32") for name, table in tables.items()}


def tiling(height: int, width: int, channels: int, generator: np.random.Generator) -> np.ndarray:
    """Bumps of random signs, five of them along the image's shorter side, of length 1 together."""
    side = max((min(height, width) if width > 1 else height) // 5, 1)
    tile = bump(min(side, height), min(side, width))
    counts = -(-height // tile.shape[0]), -(-width // tile.shape[1])
    signs = generator.choice((-1.0, 1.0), (*counts, channels))
    tiles = np.kron(signs, tile[:, :, None])[:height, :width]
    return tiles / np.sqrt((tiles**2).sum())


def _window(knobs: dict, place: Any, image: tuple[int, int, int]) -> tuple[Any, Any]:
    """Where each pixel lies in a window at a random place: its row and column there, `(batch, height, width)`."""
    offsets = []
    for axis, name in enumerate(("height", "width")):
        room = ops.cast(image[axis] - knobs[name] + 1, "float32")
        start = ops.cast(ops.floor(place[:, axis] * room), "int32")
        offset = ops.arange(image[axis], dtype="int32")[None] - start[:, None]
        offsets.append(offset[:, :, None] if axis == 0 else offset[:, None, :])
    return offsets[0], offsets[1]


def _inside(knobs: dict, rows: Any, columns: Any) -> Any:
    """Which pixels the window holds, `(batch, height, width, 1)`."""
    vertical = ops.logical_and(rows >= 0, rows < knobs["height"])
    horizontal = ops.logical_and(columns >= 0, columns < knobs["width"])
    return ops.expand_dims(ops.logical_and(vertical, horizontal), -1)


def _accept(classifier: Classifier, rows: dict, ball: dict, delta: Any, shape: tuple[int, ...]) -> dict:
    """The rows with the change where it raises the margin."""
    x_adv = ops.clip(rows["x"] + _from_images(delta, shape), ball["clip_min"], ball["clip_max"])
    kept = keep_better(classifier, rows, x_adv)
    better = ops.logical_or(kept["margin"] > rows["margin"], kept["broken"])
    return kept | {"delta": ops.where(ops.reshape(better, (-1, 1, 1, 1)), delta, rows["delta"])}


def _signs(drawn: Any) -> Any:
    return ops.where(drawn[:, 5:] < 0.5, -1.0, 1.0)[:, None, None, :]


def square_step_inf(
    classifier: Classifier, rows: dict, ball: dict, knobs: dict, drawn: Any, *, shape: tuple[int, ...]
) -> dict:
    """One query: a square of the corners of the ball."""
    inside = _inside(knobs, *_window(knobs, drawn[:, :2], image_shape(shape)))
    changed = ops.logical_and(inside, knobs["moves"] > 0)
    delta = ops.where(changed, ball["eps"] * _signs(drawn), rows["delta"])
    return _accept(classifier, rows, ball, delta, shape)


def square_step_2(
    classifier: Classifier, rows: dict, ball: dict, knobs: dict, drawn: Any, *, shape: tuple[int, ...]
) -> dict:
    """One query: what two windows hold, and what the ball has left, becomes a bump in the first."""
    image = image_shape(shape)

    def length(values: Any, axes: tuple[int, ...]) -> Any:
        return ops.sqrt(ops.sum(ops.square(values), axis=axes, keepdims=True))

    # What the clip to the valid range takes away is there to be used.
    x_best = _to_images(rows["x"], shape)
    held = ops.clip(x_best + rows["delta"], ball["clip_min"], ball["clip_max"]) - x_best
    row, column = _window(knobs, drawn[:, :2], image)
    first, second = (
        _inside(knobs, row, column),
        _inside(knobs, *_window(knobs, drawn[:, 2:4], image)),
    )
    row = ops.clip(row, 0, knobs["height"] - 1)
    column = ops.clip(column, 0, knobs["width"] - 1)
    place = row * knobs["width"] + column
    shape_of_bump = ops.where(
        drawn[:, 4, None, None] < 0.5, ops.take(knobs["upright"], place), ops.take(knobs["lying"], place)
    )
    in_first = ops.where(first, held, 0.0)
    in_both = ops.where(ops.logical_or(first, second), held, 0.0)
    fresh = ops.expand_dims(shape_of_bump, -1) * _signs(drawn) + in_first / (length(in_first, (1, 2)) + 1e-12)
    fresh = ops.where(first, fresh, 0.0)
    left = ops.maximum(ops.square(ball["eps"]) - ops.square(length(held, (1, 2, 3))), 0.0) / image[2]
    budget = ops.sqrt(left + ops.square(length(in_both, (1, 2))))
    fresh = fresh / (length(fresh, (1, 2)) + 1e-12) * budget
    changed = ops.where(first, fresh, ops.where(second, 0.0, held))
    changed = ops.where(knobs["moves"] > 0, changed, rows["delta"])
    # The clip may shorten a change, never lengthen it: stretched to the ball before it.
    changed = changed / (length(changed, (1, 2, 3)) + 1e-12) * ball["eps"]
    return _accept(classifier, rows, ball, changed, shape)
