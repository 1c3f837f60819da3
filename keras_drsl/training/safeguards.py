"""Checks before a training, the warm-up of `eps`, and the stop at a loss that is not finite."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_drsl import _backend
from keras_drsl._typing import Array, Tensor
from keras_drsl._validation import check_number
from keras_drsl.models.classifier import looks_like_probabilities
from keras_drsl.models.inputs import check_only_input


class Warmup(keras.callbacks.Callback):
    """Increase the radius of the attack evenly over the first epochs.

    Args:
        eps_scale: A scalar variable, the factor of `eps` in the current epoch.
        epochs: The number of epochs with a factor below 1, >= 0.
    """

    def __init__(self, eps_scale: keras.Variable, epochs: int) -> None:
        super().__init__()
        self._eps_scale = eps_scale
        self._epochs = epochs

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Assign the factor of the epoch.

        Args:
            epoch: The epoch, counted from 0.
            logs: Not used.
        """
        self._eps_scale.assign(min(1.0, (epoch + 1) / (self._epochs + 1)))


class RestoresEpoch(keras.callbacks.Callback):
    """Restore the wrapped model and the optimizer to the start of an epoch."""

    _epoch = 0
    _saved: tuple[tuple[keras.Variable, Array], ...] = ()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Copy the variables of model and optimizer.

        Args:
            epoch: The epoch, counted from 0.
            logs: Not used.
        """
        self._epoch = epoch
        variables = [*self.model.model.variables, *self.model.optimizer.variables]
        self._saved = tuple((variable, ops.convert_to_numpy(variable)) for variable in variables)

    def restore(self) -> None:
        """Restore the variables to the start of the epoch."""
        # On JAX, Keras would otherwise overwrite the restored values with the state of this epoch.
        _backend.sync_state(self.model)
        for variable, value in self._saved:
            variable.assign(value)


class StopAtNaN(RestoresEpoch):
    """Stop at a loss that is not finite, and restore model and optimizer to the start of the epoch."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Check the loss.

        Args:
            batch: The step within the epoch, counted from 0.
            logs: The loss and the metrics so far.

        Raises:
            ValueError: If the loss is not finite.
        """
        loss = (logs or {}).get("loss", 0.0)
        if np.isfinite(loss):
            return
        self.restore()
        raise ValueError(
            f"The loss must be finite. Received: loss={loss} in epoch {self._epoch + 1}, step {batch + 1}. "
            "Model and optimizer were restored to the start of that epoch."
        )


class StopAtCollapse(RestoresEpoch):
    """Stop a training that collapses, and restore model and optimizer to the start of that epoch.

    Use it in `fit` of `keras_drsl.AdversarialTraining` with `method="fgsm"`, `"nfgsm"` or `"flat"`. There are two kinds
    of collapse, both of which happen within an epoch:

    - All predictions become alike, as with a large `eps` that does not warm up: `clean_accuracy` falls below the share
      `accuracy` of the best one so far.
    - Catastrophic overfitting: the attack of the training no longer finds anything, but a stronger one does.
      `attack_strength` falls below the share `strength` of the largest one so far.

    Note:

    - Epochs of the warm-up are not compared, as their attacks are weaker.
    - A warning says what happened. `fit` returns as usual, and `History` ends with the epoch of the collapse.

    Args:
        accuracy: A number in [0, 1).
        strength: A number in [0, 1). Of `"flat"`, whose attack is tiny, use 0.

    Raises:
        ValueError: If an argument is out of its range, or in `fit` of another model.

    Example:

    >>> from keras_drsl.training import StopAtCollapse
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> robust = keras_drsl.AdversarialTraining(model, eps=0.1, method="nfgsm")
    >>> robust.compile(optimizer="sgd", loss=keras_drsl.DRSLoss(lam=0.03))
    >>> x, y = np.random.rand(32, 8), np.arange(32) % 3
    >>> history = robust.fit(x, y, verbose=0, callbacks=[StopAtCollapse()])

    Reference: Wong, Rice and Kolter, "Fast is better than free: Revisiting adversarial training", arXiv:2001.03994.
    """

    def __init__(self, *, accuracy: float = 0.7, strength: float = 0.2) -> None:
        super().__init__()
        rule = "a number in [0, 1)"
        self.accuracy = check_number("accuracy", accuracy, rule, lambda value: 0 <= value < 1)
        self.strength = check_number("strength", strength, rule, lambda value: 0 <= value < 1)
        self._best = {"clean_accuracy": 0.0, "attack_strength": 0.0}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Forget an earlier training.

        Args:
            logs: Not used.

        Raises:
            ValueError: If the model is no `AdversarialTraining`.
        """
        if not hasattr(self.model, "warmup_epochs"):
            raise ValueError(
                "`callbacks` may hold a StopAtCollapse in `fit` of an AdversarialTraining only. "
                f"Received: the fit of a {type(self.model).__name__}"
            )
        self._best = dict.fromkeys(self._best, 0.0)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Compare the epoch with those before.

        Args:
            epoch: The epoch, counted from 0.
            logs: The metrics of the epoch.
        """
        if epoch < self.model.warmup_epochs or logs is None:
            return
        shares = {"clean_accuracy": self.accuracy, "attack_strength": self.strength}
        now = {name: float(logs[name]) for name in shares}
        fallen = [name for name, share in shares.items() if share > 0 and now[name] < share * self._best[name]]
        if not fallen:
            self._best = {name: max(now[name], best) for name, best in self._best.items()}
            return
        self.restore()
        self.model.stop_training = True
        name = fallen[0]
        warnings.warn(
            f"The training collapsed in epoch {epoch + 1}: `{name}` fell from {self._best[name]:.3g} to "
            f"{now[name]:.3g}. Model and optimizer were restored to the start of that epoch.",
            RuntimeWarning,
            stacklevel=2,
        )


def check_inputs(model: keras.Model) -> None:
    """Raise `ValueError` for a model with several inputs, or with inputs of integers.

    Args:
        model: A Keras model. A subclassed model passes if it does not know its inputs.
    """
    check_only_input(model)
    for tensor in getattr(model, "inputs", None) or []:
        if "float" not in tensor.dtype:
            raise ValueError(
                "`model` must have an input of float values, or `attack_input` name an embedding layer. "
                f"Received: {tensor.name} of dtype {tensor.dtype}"
            )


def check_loss(loss: Any) -> None:
    """Raise `ValueError` unless `compile` was given exactly one loss.

    Args:
        loss: The `loss` given to `compile`.
    """
    if not (isinstance(loss, str) or callable(loss)):
        raise ValueError(f"`loss` must be one loss, for one output. Received: loss={loss!r}")


def check_outputs(loss: Callable[..., Tensor], outputs: Array) -> None:
    """Raise `ValueError` for outputs that do not match the `from_logits` of the loss.

    Args:
        loss: A Keras loss or a loss function.
        outputs: Some outputs of the model, shape `(batch, C)`.
    """
    from_logits, received = _from_logits(loss), f"Received: values from {outputs.min():g} to {outputs.max():g}"
    if from_logits is False and not looks_like_probabilities(outputs):
        raise ValueError(
            "`loss` has `from_logits=False`, but the outputs of `model` are no probabilities: give the loss "
            f"`from_logits=True`, or the model a softmax. {received}"
        )
    if from_logits and looks_like_probabilities(outputs):
        raise ValueError(
            "`loss` has `from_logits=True`, but the outputs of `model` look like probabilities: leave out "
            f"`from_logits`. {received}"
        )


def check_value_per_sample(loss: Callable[..., Tensor], labels: Array, outputs: Tensor) -> None:
    """Raise `ValueError` for a loss that returns a scalar: sample weights and replicas need one value per sample.

    Args:
        loss: A Keras loss or a loss function.
        labels: Some labels as `fit` receives them.
        outputs: The outputs of the model for the inputs of these labels, shape `(batch, C)`.
    """
    try:
        values = loss_function(loss)(ops.convert_to_tensor(labels), outputs)
    except NotImplementedError:
        return
    if len(values.shape) == 0:
        raise ValueError("`loss` must return one value per sample, shape (batch,). Received: one that returns a scalar")


def loss_function(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss as a function of labels and outputs that returns one value per sample.

    Args:
        loss: A Keras loss or a loss function.
    """
    function: Callable[[Tensor, Tensor], Tensor] = loss.call if isinstance(loss, keras.losses.Loss) else loss
    return function


def _from_logits(loss: Callable[..., Tensor]) -> bool | None:
    """Return the `from_logits` of a loss, or None if it has none."""
    if isinstance(loss, keras.losses.Loss):
        declared: bool | None = getattr(loss, "from_logits", None)
        return declared
    try:
        default: bool | None = inspect.signature(loss).parameters["from_logits"].default
    except (TypeError, ValueError, KeyError):
        return None
    return default
