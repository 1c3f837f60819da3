"""Attacks made on one model and tried on another."""

from collections.abc import Callable
from typing import Any

from keras_drsl._typing import Array, Tensor
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.models.classifier import Classifier
from keras_drsl.models.fingerprint import fingerprint


class Transfer(Attack):
    """Try the points that another attack finds on a second model.

    Use it to detect gradient masking. An attack on the model itself should break every image that falls to the second
    model's attack. The best second model has the same architecture and was trained on the same data without a defense.

    Note:

    - The search does not stop when the second model misclassifies a point. Inputs that the second model misclassifies
      without an attack are attacked too.

    Args:
        source: The second model, a `keras.Model` or a function of logits.
        attack: The attack on it.

    Raises:
        ValueError: If `attack` is no `keras_drsl.attacks.Attack`.

    Example:

    >>> model, second = (keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)]) for _ in range(2))
    >>> transfer = keras_drsl.attacks.Transfer(second, keras_drsl.attacks.PGD(eps=0.1))
    >>> transfer.name
    'transfer_pgd_ce'
    >>> transfer(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)
    """

    needs_gradient = False
    _takes_fixed = False  # the second model knows nothing of the others

    def __init__(self, source: Callable[[Tensor], Tensor] | Classifier, attack: Attack) -> None:
        if not isinstance(attack, Attack):
            raise ValueError(f"`attack` must be an attack of keras_drsl.attacks. Received: attack={attack!r}")
        super().__init__(threat=attack.threat, seed=attack.seed)
        self.source = Classifier.of(source)
        self.attack = attack

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return f"transfer_{self.attack.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """The other attack with its settings, and the fingerprint of the second model."""
        inner = {"name": self.attack.name} | self.attack.settings
        return {"attack": inner, "source": fingerprint(self.source.logits_fn)}

    def __repr__(self) -> str:
        return f"Transfer(source={self.source.logits_fn!r}, attack={self.attack!r})"

    def num_runs(self, num_classes: int) -> int:
        """Return the number of searches per example. An example leaves after the first search that breaks it."""
        return self.attack.num_runs(num_classes)

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the second model per example."""
        return self.attack.num_evaluations

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search on the second model; see the base class for arguments and result."""
        return self.attack.run(self.source, batch._replace(stop_when_broken=False))
