"""Callbacks that watch robustness while a model trains."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _arguments
from keras_drsl.attacks.classifier import class_ids
from keras_drsl.evaluation.evaluate import check_inputs, check_threat, evaluate_examples, in_batches, make_plan
from keras_drsl.evaluation.examples import read_examples
from keras_drsl.evaluation.head import find_logits, unchanged
from keras_drsl.evaluation.report import RobustnessReport
from keras_drsl.metrics import softmax_diversity
from keras_drsl.training import AdversarialTraining


class RobustnessMonitor(keras.callbacks.Callback):
    """Evaluates the robustness of a model after each epoch, for the logs and for other callbacks.

    Use it while training any classifier, by its own `fit` or by `AdversarialTraining`'s, on examples set aside for
    validation. Put it first among the callbacks: those after it find in the logs of every epoch

    - `val_robust_accuracy`: the share of the examples that withstand the suite, in [0, 1];
    - `val_softmax_diversity`: the mean over the examples, without an attack, of `keras_drsl.softmax_diversity`, unless
      a compiled metric of that name has written it already;
    - `val_robustness_warning`: 1.0 if a check of that evaluation warns or fails, 0.0 if none does. `report` says which.

    So `EarlyStopping(monitor="val_robust_accuracy", mode="max", restore_best_weights=True)` and
    `ModelCheckpoint(path, monitor="val_robust_accuracy", mode="max", save_best_only=True)` work as on any metric. Early
    stopping on it is worth a lot in adversarial training, which overfits. The quick suite is an upper bound: for a
    number to publish evaluate the finished model, on other examples, by the standard one.

    Args:
        x: inputs `(count, ...)` within the clip range; or a data set of batches `(inputs, labels)`, and `y` None.
        y: their labels, in any form `evaluate_robustness` takes.
        eps: the radius of the ball, > 0, in units of the input.
        suite: `"quick"`, `"cleverhans"` or `"standard"`, as in `evaluate_robustness`.
        max_samples: how many examples to evaluate, the first ones; None for all.
        every: of how many epochs one ends with an evaluation, >= 1, the first and the last included; the values are
            carried through the others, which the `patience` of other callbacks counts as well.
        prefix: what the names in the logs begin with.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        batch_size: how many examples are attacked together.
        seed: the seed of the attacks, >= 0, the same in each epoch.

    Attributes:
        report: the `RobustnessReport` of the last evaluation; None before the first, and where the model's outputs were
            not finite (a robust accuracy of 0).

    Raises:
        ValueError: for arguments out of their range or inputs outside the clip range; when training begins, for labels
            or a model that don't fit.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> model.compile("sgd", keras_drsl.DRSLoss())
    >>> x, y = np.random.rand(32, 8), np.arange(32) % 3
    >>> monitor = keras_drsl.RobustnessMonitor(x, y, eps=0.1)
    >>> history = model.fit(x, y, callbacks=[monitor], verbose=0)
    >>> sorted(history.history)
    ['loss', 'val_robust_accuracy', 'val_robustness_warning', 'val_softmax_diversity']
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        eps: float,
        suite: str = "quick",
        max_samples: int | None = 500,
        every: int = 1,
        prefix: str = "val_",
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        threat = check_threat(eps, norm, clip_min, clip_max)
        self.every = _arguments.check_integer("every", every, at_least=1)
        if not isinstance(prefix, str):
            raise ValueError(f"`prefix` must be a string. Received: prefix={prefix!r}")
        self.prefix = prefix
        self.report: RobustnessReport | None = None
        self._plan = make_plan(
            suite, None, threat, seed=seed, batch_size=batch_size, max_samples=max_samples, shard=None
        )
        self._examples = read_examples(x, y, max_samples=max_samples, shard=None)
        check_inputs(self._examples.x, threat)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the model's logits."""
        model = self.model.model if isinstance(self.model, AdversarialTraining) else self.model
        with unchanged(model):
            self._head = find_logits(model, self._examples.x[:32])
            classes = self._head.classifier.logits(self._examples.x[:1]).shape[1]
        self._labels = class_ids(self._examples.y, len(self._examples.x), classes)
        self._found: dict[str, float] | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add to the logs what the model is worth now, or was when it was last evaluated."""
        is_last = epoch + 1 == self.params.get("epochs")
        if self._found is None or epoch % self.every == 0 or is_last:
            with unchanged(self._head.model.logits_fn):
                self._found = self._evaluate()
        if logs is not None:
            for name, value in self._found.items():
                logs.setdefault(self.prefix + name, value)

    def _evaluate(self) -> dict[str, float]:
        logits = in_batches(self._head.classifier, self._examples.x, self._plan.settings["batch_size"])
        if not np.isfinite(logits).all():
            self.report = None
            return {"robust_accuracy": 0.0, "softmax_diversity": float("nan"), "robustness_warning": 1.0}
        self.report = evaluate_examples(self._head, None, self._examples, self._plan, state_path=None, verbose=0)
        diversity = softmax_diversity(self._labels, logits, from_logits=True)
        return {
            "robust_accuracy": self.report.robust_accuracy,
            "softmax_diversity": float(ops.mean(diversity)),
            "robustness_warning": float(any(check.status != "pass" for check in self.report.checks)),
        }
