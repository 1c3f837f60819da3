"""Images of all classes that a search may start from."""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_drsl._data import class_ids, content_keys, digest, to_array
from keras_drsl._typing import Array, Tensor
from keras_drsl.models.classifier import Classifier
from keras_drsl.models.inputs import Layout

ROUNDING = 1e-10  # how much the fast distances are off, relative to the squares of the images


class Pool:
    """Hold images that a model classifies as their labels say, for searches that start at an image of the target class.

    Use it with targeted attacks on the margin: `attack(classifier, x, y, pool=pool)`. After its usual starts the attack
    then starts once more for each target, at the nearest image of that class, moved into the ball. A model can have a
    valley of low margin that no random start finds. `evaluate_robustness` makes a pool of its whole data set.

    Note:

    - The nearest image has the smallest L2 distance. Of several, the one with the smallest digest is taken. So the
      start depends neither on the order of the pool nor on the batch.
    - For a class without an image the search starts at a random point.

    Attributes:
        digest: The SHA-256 of all images and given labels, whatever their order.
        num_images: How many images are classified as their labels say.
        empty_classes: The classes without such an image; of a model of several labels, for any label.

    Args:
        logits_fn: A `keras.Model`, a function that maps inputs to logits, or a `keras_drsl.models.Classifier`.
        x: Images, float32, shape `(count, ...)`.
        y: Their labels: class ids `(count,)` or `(count, 1)`, or one-hot `(count, C)`. None to take the predictions of
            the model.
        batch_size: How many images are classified together.
        layout: Where inputs that are not attacked lie in `x`, a `keras_drsl.models.inputs.Layout`, or None. Only what
            is attacked is compared, and only images of the same label.

    Raises:
        ValueError: If labels do not match.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> x, y = np.random.default_rng(0).random((20, 8)), np.arange(20) % 3
    >>> pool = keras_drsl.attacks.Pool(model, x, y)
    >>> attack = keras_drsl.attacks.APGD(eps=0.1, loss="margin", targeted=True, steps=5)
    >>> attack(model, x, y, pool=pool).shape
    (20, 8)
    """

    def __init__(
        self,
        logits_fn: Callable[[Tensor], Tensor] | Classifier,
        x: Any,
        y: Any = None,
        *,
        batch_size: int = 256,
        layout: Layout | None = None,
    ) -> None:
        x = np.asarray(to_array(x), dtype="float32")
        logits = Classifier.of(logits_fn).logits_in_batches(x, batch_size)
        predictions = logits.argmax(axis=1)
        labels = predictions if y is None else class_ids(y, len(x), logits.shape[1])
        keys = content_keys(x)
        correct = np.flatnonzero(predictions == labels)
        self._layout = layout
        of_label = self._labels(x)
        groups = [(label, class_id) for label in np.unique(of_label) for class_id in range(logits.shape[1])]
        by_group = {group: correct[(of_label[correct] == group[0]) & (labels[correct] == group[1])] for group in groups}
        # Labels that the model gave say nothing about the images.
        given = np.zeros_like(labels) if y is None else labels
        self.digest = digest(*(values[np.lexsort((given, keys))] for values in (keys, given.astype("int64"))))
        self.num_images = len(correct)
        # Of a model of several labels: for any of them.
        self.empty_classes = sorted({class_id for (_, class_id), images in by_group.items() if len(images) == 0})
        self._x, self._keys, self._by_group = x, keys, by_group

    def _labels(self, x: Array) -> Array:
        return np.zeros(len(x), int) if self._layout is None else self._layout.labels(x)

    def _compared(self, x: Array) -> Array:
        part = x if self._layout is None else self._layout.attacked_part(x)
        return part.reshape(len(x), -1).astype("float64")

    def nearest(self, x: Array, target: Array) -> tuple[Array, Array]:
        """Return the nearest image of a class for each input, and whether the class has one.

        Args:
            x: Inputs, shape `(batch, ...)`.
            target: The class that the image must have, shape `(batch,)`.

        Returns:
            Images of the shape of `x`, and bool `(batch,)`. Where it is False, the image is the input.
        """
        images, found = np.array(x, dtype="float32"), np.zeros(len(x), bool)
        of_label = self._labels(images)
        for label, class_id in sorted(set(zip(of_label.tolist(), target.tolist(), strict=True))):
            candidates = self._by_group.get((label, class_id), [])
            if len(candidates) == 0:
                continue
            rows = np.flatnonzero((of_label == label) & (target == class_id))
            chosen = _nearest(self._compared(images[rows]), self._compared(self._x[candidates]), self._keys[candidates])
            images[rows] = self._x[candidates[chosen]]
            found[rows] = True
        return images, found


def _nearest(x: Array, candidates: Array, keys: Array) -> Array:
    """Return the index of the nearest candidate of each row of `x`; of equal ones, that of the smallest key."""
    sizes = (candidates**2).sum(axis=1)
    chosen = []
    for row, distances in zip(x, sizes - 2 * x @ candidates.T, strict=True):
        # These distances are fast but rounded. They only choose which candidates are compared by exact ones.
        slack = ROUNDING * ((row**2).sum() + sizes.max())
        near = np.flatnonzero(distances <= distances.min() + slack)
        exact = ((candidates[near] - row) ** 2).sum(axis=1)
        chosen.append(near[np.lexsort((keys[near], exact))[0]])
    return np.array(chosen, dtype=int)
