"""Attacks made on one model, tried on another."""

from collections.abc import Callable

import numpy as np

from keras_drsl.attacks.attack import Attack, Batch
from keras_drsl.attacks.classifier import Classifier


class Transfer(Attack):
    """The points another attack finds on a second model.

    Use it as a witness against gradient attacks: what breaks a model by way of another one, an attack on the model
    itself should have broken. The best second model is one of the same shape trained on the same data without any
    defence.

    Args:
        source: the second model, a `keras.Model` or function of logits, as `logits_fn` of an attack.
        attack: the attack on it. What it misclassifies without one is moved as well only if the attack does so.

    Raises:
        ValueError: if `attack` is not an attack of this package.

    Example:

    >>> from keras_drsl.attacks import PGD, Transfer
    >>> one, other = (keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)]) for _ in range(2))
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = Transfer(other, PGD(eps=0.1))(one, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True
    """

    def __init__(self, source: Callable, attack: Attack) -> None:
        if not isinstance(attack, Attack):
            raise ValueError(f"`attack` must be an attack of keras_drsl.attacks. Received: attack={attack!r}")
        super().__init__(
            attack.eps, norm=attack.norm, clip_min=attack.clip_min, clip_max=attack.clip_max, seed=attack.seed
        )
        self._source = Classifier.of(source)
        self._attack = attack

    @property
    def name(self) -> str:
        """What reports call the attack."""
        return f"transfer_{self._attack.name}"

    @property
    def settings(self) -> dict:
        """Every setting, by name, as JSON takes it."""
        return {"attack": self._attack.settings}

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        return self._attack(self._source, batch.x, batch.y, ids=batch.ids)
