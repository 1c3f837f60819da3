"""Callbacks that measure robustness while a model trains."""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend, _validation
from keras_drsl._typing import Norm, Numbers, Tensor
from keras_drsl.evaluation import gallery
from keras_drsl.evaluation.evaluator import Evaluator
from keras_drsl.evaluation.report import RobustnessReport
from keras_drsl.metrics import softmax_diversity
from keras_drsl.models.heads import View
from keras_drsl.models.state import preserve_state
from keras_drsl.threat import ThreatModel
from keras_drsl.training import AdversarialTraining

NUM_IMAGES = 9  # that TensorBoard gets in each epoch


class RobustnessMonitor(keras.callbacks.Callback):
    """Evaluate the robustness of a model after each epoch, for the logs and for other callbacks.

    Use it while training any classifier, by its own `fit` or by that of `AdversarialTraining`, on examples set aside
    for validation. Put it first among the callbacks: the others then find these values in the logs of every epoch:

    - `val_robust_accuracy`: the share of the examples that withstand the suite, in [0, 1];
    - `val_softmax_diversity`: the mean over the clean examples of `keras_drsl.softmax_diversity`, unless a compiled
      metric of that name has written it already;
    - `val_robustness_warning`: 1.0 if a check of the evaluation warns or fails, 0.0 if none does. `report` has the
      checks;
    - `val_robustness_seconds`: how long the evaluation of this epoch took, 0.0 in epochs without one.

    So `EarlyStopping(monitor="val_robust_accuracy", mode="max", restore_best_weights=True)` and
    `ModelCheckpoint(path, monitor="val_robust_accuracy", mode="max", save_best_only=True)` work as on any metric.

    Note:

    - Adversarial training overfits, so early stopping on this value matters there.
    - The quick suite gives an upper bound. For a number to publish, evaluate the finished model on other examples by
      the standard suite.

    Args:
        x: Inputs `(count, ...)` within the valid range; or a data set of batches `(inputs, labels)`, and `y` None.
        y: Their labels, in any form that `evaluate_robustness` takes.
        eps: The radius of the ball, > 0, in units of the input.
        suite: `"quick"`, `"cleverhans"` or `"standard"`, as in `evaluate_robustness`.
        max_samples: How many examples to evaluate, as in `evaluate_robustness`; None for all.
        every: Evaluate after every so many epochs, >= 1, and after the first and the last. Epochs in
            between repeat the last values. Callbacks with `patience` count these epochs too.
        prefix: The beginning of the names in the logs.
        norm: `"inf"` (the default), 2 or 1.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        threat: A `keras_drsl.ThreatModel` in place of `eps`, `norm`, `clip_min`, `clip_max` and `mask`.
        output: As in `evaluate_robustness`.
        preprocessing: As in `evaluate_robustness`.
        expectation_draws: As in `evaluate_robustness`.
        attack_input: As in `evaluate_robustness`.
        task: As in `evaluate_robustness`.
        which: As in `evaluate_robustness`.
        ignore_class: As in `evaluate_robustness`.
        batch_size: How many examples are attacked together.
        seed: The seed of the attacks, >= 0, the same in each epoch.
        log_images: Whether to write misleading images and the robust accuracy of each class for TensorBoard, which
            needs TensorFlow with any backend.
        log_dir: The folder that they are written to, in a sub-folder `robustness`: that of
            `keras.callbacks.TensorBoard`, whose default is the same.

    Attributes:
        report: The `RobustnessReport` of the last evaluation; None before the first one, and where the outputs of the
            model were not finite or embeddings left the valid range (a robust accuracy of 0).

    Raises:
        ValueError: If an argument is out of its range, or inputs lie outside the valid range; when training begins, if
            labels or the model do not fit.
        ImportError: With `log_images`, without TensorFlow.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> model.compile("sgd", keras_drsl.DRSLoss())
    >>> x, y = np.random.rand(32, 8), np.arange(32) % 3
    >>> monitor = keras_drsl.RobustnessMonitor(x, y, eps=0.1)
    >>> history = model.fit(x, y, callbacks=[monitor], verbose=0)
    >>> sorted(history.history)
    ['loss', 'val_robust_accuracy', 'val_robustness_seconds', 'val_robustness_warning', 'val_softmax_diversity']
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        eps: Numbers | None = None,
        suite: str = "quick",
        max_samples: int | None = 500,
        every: int = 1,
        prefix: str = "val_",
        norm: Norm | None = None,
        clip_min: Numbers | None = None,
        clip_max: Numbers | None = None,
        mask: Any = None,
        threat: ThreatModel | None = None,
        output: str | int | None = None,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        expectation_draws: int = 1,
        attack_input: str | int | None = None,
        task: str = "multiclass",
        which: int | None = None,
        ignore_class: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
        log_images: bool = False,
        log_dir: str | os.PathLike[str] = "logs",
    ) -> None:
        super().__init__()
        if log_images and task != "multiclass":
            raise ValueError(f'`log_images` needs task="multiclass". Received: task={task!r}')
        self._summaries = _Summaries(log_dir) if log_images else None
        threat = ThreatModel.from_arguments(eps, norm, clip_min, clip_max, threat, mask)
        self.every = _validation.check_integer("every", every, at_least=1)
        if not isinstance(prefix, str):
            raise ValueError(f"`prefix` must be a string. Received: prefix={prefix!r}")
        self.prefix = prefix
        self.report: RobustnessReport | None = None
        self._evaluator = Evaluator(
            threat,
            suite=suite,
            seed=seed,
            batch_size=batch_size,
            max_samples=max_samples,
            view=View(output, preprocessing, expectation_draws, attack_input, task, which, ignore_class),
        )
        self._given = (x, y) if self._evaluator.reader.needs_model(x) else None
        if self._given is None:
            self._examples = self._evaluator.read_examples(None, x, y)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the logits of the model."""
        model = self.model.model if isinstance(self.model, AdversarialTraining) else self.model
        if self._given is not None:
            self._examples = self._evaluator.read_examples(model, *self._given)
        with preserve_state(model, self._evaluator.view.preprocessing):
            self._logits_model = self._evaluator.find_logits(model, self._examples)
            logits = self._logits_model.classifier.logits(self._examples.x[:1])
        shape = (len(self._examples.x), *logits.shape[1:])
        self._labels = self._evaluator.read_labels(self._examples, np.broadcast_to(logits, shape))
        self._values: dict[str, float] | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the values of the last evaluation to the logs."""
        is_last = epoch + 1 == self.params.get("epochs")
        seconds = 0.0
        if self._values is None or epoch % self.every == 0 or is_last:
            began = time.perf_counter()
            with preserve_state(self._logits_model.model, self._evaluator.view.preprocessing):
                self._values = self._evaluate()
            if self._summaries is not None and self.report is not None:
                self._summaries.write(self.report, epoch)
            seconds = time.perf_counter() - began
        if logs is not None:
            for name, value in (self._values | {"robustness_seconds": seconds}).items():
                logs.setdefault(self.prefix + name, value)

    def _evaluate(self) -> dict[str, float]:
        batch_size = self._evaluator.settings["batch_size"]
        failed = {"robust_accuracy": 0.0, "softmax_diversity": float("nan"), "robustness_warning": 1.0}
        examples = self._evaluator.reader.refresh(self._examples)
        if examples is not self._examples:
            self._examples = examples
            try:
                self._evaluator.check_examples(examples)
            except ValueError as error:  # embeddings that training has moved out of the range
                warnings.warn(f"The robust accuracy of this epoch counts as 0: {error}", RuntimeWarning, stacklevel=2)
                self.report = None
                return failed
        self._logits_model.seed(self._evaluator.settings["seed"], "clean")
        logits = self._logits_model.classifier.logits_in_batches(self._examples.x, batch_size)
        if not np.isfinite(logits).all():
            self.report = None
            return failed
        pool = self._evaluator.make_pool(self._logits_model, self._examples)
        keep = self._summaries is not None
        self.report = self._evaluator.evaluate(self._logits_model, self._examples, pool=pool, keep_examples=keep)
        counts = self._labels >= 0  # positions
        diversity = softmax_diversity(self._labels[counts], logits[counts], from_logits=True)
        return {
            "robust_accuracy": self.report.robust_accuracy,
            "softmax_diversity": float(ops.mean(diversity)),
            "robustness_warning": float(any(check.status in ("warn", "fail") for check in self.report.checks)),
        }


class _Summaries:
    """Write misleading images and the accuracy of each class for TensorBoard.

    Args:
        log_dir: The folder; the files are in its sub-folder `robustness`.

    Raises:
        ImportError: Without TensorFlow.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            import tensorflow as tf
        except ImportError as error:
            raise ImportError("`log_images` needs `pip install tensorflow`, with any backend.") from error
        _backend.leave_gpus_alone(tf)
        self._tf = tf
        self._folder = os.path.join(os.fspath(log_dir), "robustness")
        self._writer: Any = None

    def write(self, report: RobustnessReport, epoch: int) -> None:
        """Write what a report of an epoch says."""
        summary = self._tf.summary
        if self._writer is None:
            self._writer = summary.create_file_writer(self._folder)
        names = report.provenance.get("classes") or []
        with self._writer.as_default(step=epoch):
            for class_id, found in report.by_class.items():
                name = names[class_id] if class_id < len(names) else class_id
                summary.scalar(f"robust accuracy by class/{name}", found.robust_accuracy)
            items = gallery.choose(report, NUM_IMAGES)
            if items:
                rows = np.stack([np.concatenate(item.images, axis=1) for item in items])
                read = ", ".join(f"{item.label} as {item.prediction}" for item in items)
                described = f"image, change x 10, changed image; true classes and what the model reads: {read}"
                summary.image("misleading images", rows, max_outputs=NUM_IMAGES, description=described)
        self._writer.flush()
