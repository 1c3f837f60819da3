"""Attacks made on one model, tried on another."""

import copy
from collections.abc import Callable

import numpy as np

from keras_drsl.attacks.attack import Attack, Batch
from keras_drsl.attacks.classifier import Classifier, fingerprint


class Transfer(Attack):
    """The points another attack finds on a second model.

    Use it as a witness against gradient attacks: what breaks a model by way of another one, an attack on the model
    itself should have broken. The best second model is one of the same shape trained on the same data without any
    defence.

    Args:
        source: the second model, a `keras.Model` or function of logits, as `logits_fn` of an attack.
        attack: the attack on it. It does not stop where the second model is misled, and also moves what that model
            misclassifies without an attack.

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
        self._attack = copy.copy(attack)
        self._attack._persist = True

    @property
    def name(self) -> str:
        """What reports call the attack."""
        return f"transfer_{self._attack.name}"

    @property
    def settings(self) -> dict:
        """Every setting, by name, as JSON takes it."""
        inner = {"name": self._attack.name} | self._attack.settings
        return {"attack": inner, "source": fingerprint(self._source.logits_fn)}

    def runs(self, classes: int) -> int:
        """How many runs an example that withstands them all goes through."""
        return self._attack.runs(classes)

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        return self._attack._search(self._source, batch)
