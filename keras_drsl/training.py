"""Adversarial training of any Keras classifier."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_drsl import _arguments, _backend
from keras_drsl._inputs import logits_behind
from keras_drsl.attacks import balls
from keras_drsl.attacks.attack import misclassified
from keras_drsl.attacks.classifier import Classifier, as_array, class_ids, looks_like_probabilities
from keras_drsl.attacks.gradient import finite, slope
from keras_drsl.attacks.objectives import objective
from keras_drsl.evaluation.evaluate import check_model, check_threat
from keras_drsl.evaluation.head import counters_of, find_logits, log_of, unchanged

# The names under which a batch that was attacked reaches `call`, and its outputs leave it.
CLEAN, ADVERSARIAL, RIGHT, RISE = "clean", "adversarial", "right", "rise"
ROWS = 32  # of the first ones, to try model and loss on


def cross_entropy(logits: Any, rows: dict) -> Any:
    """The cross-entropy of the true class, shape `(batch,)`."""
    return objective("ce", logits, rows["y"], None, targeted=False)


def margin(logits: Any, rows: dict) -> Any:
    """The largest rival's logit minus the true one's, shape `(batch,)`."""
    return objective("margin", logits, rows["y"], None, targeted=False)


def divergence(logits: Any, rows: dict) -> Any:
    """The Kullback-Leibler divergence from the clean prediction, shape `(batch,)`."""
    return _divergence(ops.log_softmax(rows["logits"]), ops.log_softmax(logits))


def trades_penalty(log_p: Any, log_q: Any, y: Any, beta: float) -> Any:
    """`beta * KL(p || q)`, shape `(batch,)`."""
    return beta * _divergence(log_p, log_q)


def mart_penalty(log_p: Any, log_q: Any, y: Any, beta: float) -> Any:
    """`beta * KL(p || q) * (1 - p_y) - log(1 - max_{k != y} q_k)`, shape `(batch,)`."""
    is_true = ops.one_hot(y, log_p.shape[-1], dtype="bool")
    sure = ops.sum(ops.where(is_true, ops.exp(log_p), 0.0), axis=-1)
    rival = ops.max(ops.where(is_true, 0.0, ops.exp(log_q)), axis=-1)
    # The small constant is that of the authors' code: a rival of 1 must not cost infinitely much.
    return beta * _divergence(log_p, log_q) * (1 - sure) - ops.log(1.0001 - rival)


def lead_penalty(log_p: Any, log_q: Any, y: Any, beta: float) -> Any:
    """`beta * (d - d')^2`, d the true class's lead over the mean of its rivals, `log p_y - mean_{k != y} log p_k`."""
    is_true = ops.one_hot(y, log_p.shape[-1], dtype=log_p.dtype)
    # What the difference leaves is the same for logits and log-probabilities.
    weights = is_true - (1 - is_true) / (log_p.shape[-1] - 1)
    return beta * ops.square(ops.sum(weights * (log_p - log_q), axis=-1))


def _divergence(log_p: Any, log_q: Any) -> Any:
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


class Method(NamedTuple):
    """What tells one way of training from another.

    Attributes:
        learns_from: the inputs, `CLEAN` or `ADVERSARIAL`, whose outputs the compiled loss is given, averaged over them.
        drive: maps logits and what is known of the rows, their class ids `"y"` and their clean `"logits"` among it, to
            what the inner steps drive up, one value a row; None for no attack, where the attacked inputs are the clean
            ones.
        near: whether the inner steps start beside the input, at a distance that does not depend on `eps`, rather than
            anywhere in the ball.
        one_step: whether they are a single one, larger than `eps`.
        penalty: maps log-probabilities of the clean and of the attacked inputs, class ids and `beta` to what is added
            to the loss, one value a row; None for nothing.
        drawn: whether clean and attacked inputs are both replaced by points drawn anywhere in the ball, not clipped.
        beta: what `beta` is by default.
    """

    learns_from: tuple[str, ...] = (ADVERSARIAL,)
    drive: Callable | None = cross_entropy
    near: bool = False
    one_step: bool = False
    penalty: Callable | None = None
    drawn: bool = False
    beta: float = 6.0


# What the inner steps can drive up; "loss" is the one given to `compile`.
ATTACK_LOSSES = {"cross_entropy": cross_entropy, "margin": margin, "loss": None}
METHODS = {
    "clean": Method(drive=None),
    "fgsm": Method(one_step=True),
    "pgd": Method(),
    "trades": Method(learns_from=(CLEAN,), drive=divergence, near=True, penalty=trades_penalty),
    "mart": Method(penalty=mart_penalty),
    "noise": Method(learns_from=(CLEAN, ADVERSARIAL), drive=None, penalty=lead_penalty, drawn=True, beta=0.3),
}


class AdversarialTraining(keras.Model):
    """Trains a classifier on the worst inputs near those it is given.

    Use it where robustness must last: no loss alone withstands attacks of the size the field reports. It wraps a
    model and shares its weights: `compile` and `fit` the wrapper as any Keras model, then use and save the model.
    `evaluate` and `predict` look at inputs as they are; how robust the model is, `evaluate_robustness` says
    afterwards and `RobustnessMonitor` in each epoch.

    Methods, with x the input, x' the attacked one, z and z' the logits of the two, p and p' their softmax, L the loss
    given to `compile`; each is averaged over the batch:

    - `"pgd"`: `L(y, z')`, x' by `steps` steps up the `attack_loss` from a random point of the ball (Madry et al.).
    - `"fgsm"`: the same by one step (Wong et al.). Cheap, and apt to fail all at once ("catastrophic overfitting"):
      `attack_strength` then falls to nothing or below while `accuracy` soars.
    - `"trades"`: `L(y, z) + beta * KL(p || p')`, x' by `steps` steps up that divergence from beside x (Zhang et al.).
    - `"mart"`: `L(y, z') - log(1 - max_{k != y} p'_k) + beta * KL(p || p') * (1 - p_y)`, x' as for `"pgd"` (Wang et
      al.).
    - `"noise"`: `(L(y, z') + L(y, z'')) / 2 + beta * (d' - d'')^2`, without any attack: x' and x'' are drawn anywhere
      in the ball, and not clipped (in L-inf that is uniform noise of standard deviation `eps / sqrt(3)`); d is the lead
      of the true logit over the mean of the others. A step costs two usual ones, and a look at the clean batch. Meant
      for `keras_drsl.DRSLoss(lam=1.0)` and an `eps` about two and a half times that of the attacks to come: four times
      was much worse in the study that README quotes.
    - `"clean"`: `L(y, z)`: the control.

    The inner steps see the model as at inference: no dropout, and BatchNormalization with its moving statistics, which
    they don't change. `History` holds `loss`, `accuracy` and all other compiled metrics on the attacked batch;
    `clean_accuracy`, before the attack; and `attack_strength`, by how much the attack raised the cross-entropy, the
    model as at inference. Sample weights don't count in these last two. Where nothing is attacked, `attack_strength` is
    0; the other metrics are on one of the copies for `"noise"`. With `validation_data`, `val_loss`, `val_accuracy` and
    so on are without attack.

    What layers add to the loss by themselves is added once; if it depends on their inputs, as an activity regularizer
    does, once for each of x and x' that the method looks at, on JAX for the last of them.

    Layers that draw random numbers, noise or crops, draw the same for x and x' (on torch, those that were given a
    seed). `fit` checks arrays whole, and of other data the first batch, which is drawn once more beforehand: a data set
    that shuffles itself then goes on to its next order.

    Under `tf.distribute` make it in the strategy's scope, the model too. `save` and `export` take the plain model, not
    compiled. `save_weights` and `load_weights` are those of the training, random numbers included, for another
    `AdversarialTraining`: with `keras.callbacks.BackupAndRestore` a training that was killed goes on as if it had not
    been, but for the order in which Keras shuffles arrays. The weights of the plain model alone are saved by its own
    `save_weights`.

    Args:
        model: the classifier: one input of float values, outputs `(batch, C)`, logits or a softmax.
        eps: the radius of the ball around each input, in units of the input, > 0 and no larger than their range.
        method: one of the above, or a `keras_drsl.training.Method` of your own.
        steps: how many inner steps, >= 1. `"fgsm"` takes one, `"noise"` and `"clean"` none, whatever it says.
        step_size: the size of one, > 0; by default `2.5 * eps / steps`, at most `eps`, and `1.25 * eps` for `"fgsm"`.
            Like `steps`, without effect where there is no attack.
        attack_loss: what the inner steps of `"pgd"`, `"fgsm"` and `"mart"` drive up: `"cross_entropy"` (by default),
            `"margin"` (the largest rival's logit less the true one's) or `"loss"`, the loss given to `compile`. With
            `DRSLoss` `"loss"` did best for `"pgd"` and `"margin"` for `"fgsm"` in the study that README quotes.
        norm: `"inf"` or 2.
        beta: the weight of the divergence in `"trades"` and `"mart"`, by default 6, or of the leads' difference in
            `"noise"`, by default 0.3; >= 0. Without effect elsewhere.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        warmup_epochs: how many epochs train with less than `eps`, evenly rising, >= 0. Each `fit` begins anew, unless
            it is given an `initial_epoch`.
        seed: the seed of the random starts, >= 0.

    Raises:
        ValueError: for arguments out of their range. In `fit` and the first `train_on_batch`: for inputs outside the
            clip range, labels that are no classes, outputs that don't match the loss's `from_logits`, a loss that
            returns a scalar. In `fit`: at a loss that is not finite, with model and optimizer put back to where the
            epoch began.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> robust = keras_drsl.AdversarialTraining(model, eps=0.1, steps=3)
    >>> robust.compile(optimizer="sgd", loss=keras_drsl.DRSLoss(lam=0.03), metrics=["accuracy"])
    >>> history = robust.fit(np.random.rand(32, 8), np.arange(32) % 3, verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'attack_strength', 'clean_accuracy', 'loss']

    Reference: Madry et al., arXiv:1706.06083; Wong et al., arXiv:2001.03994; Zhang et al., arXiv:1901.08573; Wang et
    al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.
    """

    def __init__(
        self,
        model: keras.Model,
        eps: float = 8 / 255,
        *,
        method: str | Method = "pgd",
        steps: int = 10,
        step_size: float | None = None,
        attack_loss: str | None = None,
        norm: str | int = "inf",
        beta: float | None = None,
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        warmup_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        check_model("model", model)
        if isinstance(model, AdversarialTraining):
            raise ValueError("`model` must be a plain model. Received: an AdversarialTraining")
        for one in getattr(model, "inputs", None) or []:
            if "float" not in one.dtype or len(model.inputs) > 1:
                received = ", ".join(f"{one.name} of dtype {one.dtype}" for one in model.inputs)
                raise ValueError(f"`model` must have one input, of float values. Received: {received}")
        # Its inputs must keep their precision until the attack is done; the model casts them itself.
        super().__init__(dtype=model.dtype_policy, autocast=False)
        self.threat = check_threat(eps, norm, clip_min, clip_max)
        if isinstance(method, Method):
            kind = method
        else:
            kind = METHODS[_arguments.check_choice("method", method, tuple(METHODS))]
        if attack_loss is not None:
            _arguments.check_choice("attack_loss", attack_loss, tuple(ATTACK_LOSSES))
            if kind.drive is not cross_entropy:
                raise ValueError(
                    "`attack_loss` must be left out unless the method climbs the cross-entropy by default, as 'pgd', "
                    f"'fgsm' and 'mart' do. Received: attack_loss={attack_loss!r}, method={method!r}"
                )
            kind = kind._replace(drive=ATTACK_LOSSES[attack_loss] or self._compiled_loss)
        self.method = kind
        steps = _arguments.check_integer("steps", steps, at_least=1)
        self.steps = 1 if self.method.one_step else steps
        if step_size is None:
            step_size = 1.25 * eps if self.method.one_step else min(2.5 * eps / steps, eps)
        self.step_size = _arguments.check_positive("step_size", step_size)
        self.beta = _arguments.check_non_negative("beta", kind.beta if beta is None else beta)
        self.warmup_epochs = _arguments.check_integer("warmup_epochs", warmup_epochs, at_least=0)
        self.model = model
        self._starts = _Starts(_arguments.check_integer("seed", seed, at_least=0))
        self._share_of_eps = self.add_weight(
            name="share_of_eps", shape=(), initializer="ones", dtype="float32", trainable=False
        )
        self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")
        self._attack_strength = keras.metrics.Mean(name="attack_strength")
        self._head: Any = None
        self._attacks = False
        self.built = model.built

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The model's outputs; for a batch that was attacked, those the method needs, by name."""
        if not _was_attacked(inputs):
            return self.model(inputs, training=training)
        needed = {*self.method.learns_from, ADVERSARIAL, *([CLEAN] if self.method.penalty else [])}
        # What the layers draw, noise or crops, must be the same for both, or it would tell them apart.
        counters = counters_of(self.model)
        before = [ops.copy(counter) for counter in counters]
        outputs = {}
        for name in sorted(needed):
            for counter, value in zip(counters, before, strict=True):
                counter.assign(value)
            outputs[name] = self.model(inputs[name], training=training)
        return outputs

    def train_step(self, *arguments: Any) -> Any:
        """One step on an attacked batch; arguments and results are those of the backend's own `train_step`."""
        *state, data = arguments
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x = _only(x)
        if not state:
            return super().train_step((self._attacked(x, y), y, sample_weight))
        # On JAX the values of variables come and go with the state.
        trainable, non_trainable, *others = state[0]
        values = [*zip(self.trainable_variables, trainable, strict=True)]
        values += zip(self.non_trainable_variables, non_trainable, strict=True)
        with keras.StatelessScope(state_mapping=values) as scope:
            x = self._attacked(x, y)
        non_trainable = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
        return super().train_step((trainable, non_trainable, *others), (x, y, sample_weight))

    def _attacked(self, x: Any, y: Any) -> dict[str, Any]:
        """A batch with its attacked inputs, and what the attack did to each row."""
        if self._head is None:
            raise ValueError("Train by `fit` or `train_on_batch`: they find the model's logits in the first batch.")
        x = ops.cast(x, "float32")
        classifier = self._head.classifier
        logits = ops.stop_gradient(classifier(x))
        rows = {"x": x, "y": _class_ids(y, logits), "labels": y, "logits": logits}
        x_adv, rise = x, ops.zeros_like(logits[:, 0])
        if self.method.drawn:
            ball = ops.convert_to_tensor(self._share_of_eps) * self.threat["eps"], self.threat["norm"]
            x, x_adv = (x + balls.draw(ops.shape(x), *ball, self._starts) for _ in range(2))
        if self.method.drive is not None:
            x_adv = ops.stop_gradient(self._search(classifier, rows, self.method.drive))
            rise = cross_entropy(classifier(x_adv), rows) - cross_entropy(logits, rows)
        right = ops.logical_not(misclassified(logits, rows["y"]))
        return {CLEAN: x, ADVERSARIAL: x_adv, RIGHT: ops.cast(right, "float32"), RISE: ops.stop_gradient(rise)}

    def _search(self, classifier: Classifier, rows: dict[str, Any], drive: Callable) -> Any:
        """The last of the inner steps' points."""
        x, norm = rows["x"], self.threat["norm"]
        share = ops.convert_to_tensor(self._share_of_eps)
        ball = self.threat | {"eps": share * self.threat["eps"]}
        shape = ops.shape(x)
        if self.method.near:
            start = 0.001 * keras.random.normal(shape, seed=self._starts)
        else:
            start = balls.draw(shape, ball["eps"], norm, self._starts)

        def step(x_adv: Any) -> Any:
            _, _, gradient = slope(classifier, lambda logits: drive(logits, rows), x_adv)
            ahead = x_adv + share * self.step_size * balls.direction(finite(gradient), norm)
            return balls.project(ahead, x, ball, norm)

        start = balls.project(x + start, x, ball, norm)
        return _backend.repeat(step, self.steps, start, self.model.variables)

    def _compiled_loss(self, logits: Any, rows: dict) -> Any:
        """The loss given to `compile`, shape `(batch,)`."""
        outputs = logits if self._head.kind == "logits" else keras.activations.softmax(logits)
        return _values_of(keras.losses.get(self.loss))(rows["labels"], outputs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The method's loss for a batch that was attacked, the compiled one for any other."""
        compiled = super().compute_loss
        if not _was_attacked(y_pred):
            return compiled(x, y, y_pred, sample_weight, training)
        names = self.method.learns_from
        loss = sum(compiled(x, y, y_pred[name], sample_weight, training) for name in names) / len(names)
        if self.method.penalty is None:
            return loss
        log_p, log_q = (self._log_probabilities(y_pred[name]) for name in (CLEAN, ADVERSARIAL))
        penalty = self.method.penalty(log_p, log_q, _class_ids(y, log_p), self.beta)
        average = _Average(name="penalty", reduction=getattr(self.loss, "reduction", "sum_over_batch_size"))
        return loss + average(penalty, penalty, sample_weight=sample_weight)

    def _log_probabilities(self, outputs: Any) -> Any:
        outputs, are_logits = logits_behind(outputs, self._head.kind == "logits", -1)
        outputs = ops.cast(outputs, "float32")
        return ops.log_softmax(outputs) if are_logits else log_of(outputs)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The compiled metrics, and those of the training for a batch that was attacked."""
        if _was_attacked(y_pred):
            self._clean_accuracy.update_state(x[RIGHT])
            self._attack_strength.update_state(x[RISE])
            y_pred = y_pred[ADVERSARIAL]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    @property
    def metrics(self) -> list:
        """Those compiled and, while it trains, those of the attack."""
        own = (self._clean_accuracy, self._attack_strength)
        return [metric for metric in super().metrics if self._attacks or metric not in own]

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """`keras.Model.fit`, after a look at the data."""
        x = self._prepare(x, y)
        if epochs <= self.warmup_epochs:
            warnings.warn(
                f"`epochs={epochs}` ends before `warmup_epochs={self.warmup_epochs}` do: the model never meets an "
                "attack of the full `eps`.",
                stacklevel=2,
            )
        own: list[Any] = [_Warmup(self), _StopAtNaN(self)]
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList([*own, *callbacks.callbacks], model=self, **callbacks.params)
        else:
            callbacks = [*own, *keras.tree.flatten(callbacks or [])]
        try:
            with self._attacking(True):
                return super().fit(x, y, batch_size, epochs, verbose, callbacks, *arguments, **options)
        finally:
            # A callback may have put weights of an early epoch back.
            self._share_of_eps.assign(1.0)

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """`keras.Model.evaluate`, on the inputs as they are."""
        with self._attacking(False):
            return super().evaluate(*arguments, **options)

    def train_on_batch(self, x: Any, y: Any = None, *arguments: Any, **options: Any) -> Any:
        """`keras.Model.train_on_batch`, on the attacked batch."""
        if self._head is None:
            self._prepare(x, y)
        with self._attacking(True):
            return super().train_on_batch(x, y, *arguments, **options)

    @contextmanager
    def _attacking(self, attacks: bool) -> Iterator[None]:
        before, self._attacks = self._attacks, attacks
        try:
            yield
        finally:
            self._attacks = before

    def save(self, *arguments: Any, **options: Any) -> None:
        """Save the plain model."""
        self.model.save(*arguments, **options)

    def export(self, *arguments: Any, **options: Any) -> None:
        """Export the plain model."""
        self.model.export(*arguments, **options)

    def get_config(self) -> dict[str, Any]:
        """Not there: the training of a model is not part of it."""
        raise NotImplementedError(
            "Save the plain model: `save` does, and so does `keras.saving.save_model` on `model`."
        )

    def save_own_variables(self, store: Any) -> None:
        """Keras does not save the state of random numbers by itself."""
        super().save_own_variables(store)
        for place, counter in enumerate(counters_of(self)):
            store[f"random_{place}"] = ops.convert_to_numpy(counter)

    def load_own_variables(self, store: Any) -> None:
        """What `save_own_variables` saved."""
        names = [name for name in store.keys() if not name.startswith("random_")]  # noqa: SIM118, no dictionary
        super().load_own_variables({name: store[name] for name in names})
        for place, counter in enumerate(counters_of(self)):
            counter.assign(store[f"random_{place}"])

    def _prepare(self, x: Any, y: Any) -> Any:
        """Look at the data and find the model's logits; returns the data, nothing of it lost."""
        if not self.compiled:
            raise ValueError(
                "Call `compile` of the AdversarialTraining first: what `model` was compiled with is not used."
            )
        x, (inputs, labels) = _peek(x, y)
        balls.check_range("x", inputs, self.threat["clip_min"], self.threat["clip_max"])
        if not (isinstance(self.loss, str) or callable(self.loss)):
            raise ValueError(f"`loss` must be one loss, for one output. Received: loss={self.loss!r}")
        loss = keras.losses.get(self.loss)
        few = inputs[:ROWS].astype("float32")
        with unchanged(self.model):
            outputs = self.model(ops.convert_to_tensor(few), training=False)
            if not ops.is_tensor(outputs):
                raise ValueError(f"`model` must have one output. Received: outputs of type {type(outputs).__name__}")
            _check_outputs(loss, ops.convert_to_numpy(ops.cast(outputs, "float32")))
            self._head = find_logits(self.model, few)
            class_ids(labels, len(inputs), outputs.shape[-1])
            _check_per_sample(loss, labels[:ROWS], outputs)
        if not self.optimizer.built and getattr(self, "_distribute_strategy", None) is None:
            # On TensorFlow Keras would do it within the first epoch, and that could not be undone at a NaN.
            self.optimizer.build(self.trainable_variables)
        return x


class _Average(keras.losses.Loss):
    """Averages values that are known already, over weights and replicas as any loss is."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


class _Starts(keras.random.SeedGenerator):
    """Random numbers that differ from replica to replica."""

    def next(self, ordered: bool = True) -> Any:
        seed = super().next(ordered)
        return seed + ops.cast(ops.stack([65536 * _backend.replica(), 0]), seed.dtype)


class _Warmup(keras.callbacks.Callback):
    """Raises the share of `eps` in the first epochs."""

    def __init__(self, trainer: AdversarialTraining) -> None:
        super().__init__()
        self._trainer = trainer

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._trainer._share_of_eps.assign(min(1.0, (epoch + 1) / (self._trainer.warmup_epochs + 1)))


class _StopAtNaN(keras.callbacks.Callback):
    """Ends training at a loss that is not finite, with model and optimizer as the epoch found them."""

    def __init__(self, trainer: AdversarialTraining) -> None:
        super().__init__()
        self._trainer = trainer

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        kept = [*self._trainer.model.variables, *self._trainer.optimizer.variables]
        self._kept = [(variable, ops.convert_to_numpy(variable)) for variable in kept]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if np.isfinite(loss):
            return
        if hasattr(self._trainer, "jax_state_sync"):
            self._trainer.jax_state_sync()
        for variable, value in self._kept:
            variable.assign(value)
        raise ValueError(
            f"The loss must be finite. Received: loss={loss} in epoch {self._epoch + 1}, step {batch + 1}. "
            "Model and optimizer are as that epoch found them."
        )


def _was_attacked(batch: Any) -> bool:
    return isinstance(batch, dict) and ADVERSARIAL in batch


def _class_ids(y: Any, logits: Any) -> Any:
    """Labels of any form as class ids, int32, shape `(batch,)`."""
    if len(y.shape) == len(logits.shape):
        y = ops.argmax(y, axis=-1) if y.shape[-1] == logits.shape[-1] else ops.squeeze(y, axis=-1)
    return ops.cast(y, "int32")


def _only(x: Any) -> Any:
    """The one input of an example, which Keras may be given as a list of one."""
    return x[0] if isinstance(x, list | tuple) and len(x) == 1 else x


def _peek(x: Any, y: Any) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    """The data, and the inputs and labels that can be seen: all of arrays, else those of the first batch."""
    if x is None:
        raise ValueError("`x` must hold inputs, or give batches of them. Received: x=None")
    batch: Any = (x, y)
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    elif isinstance(x, Iterator):
        batch = next(x, None)
        # Keras takes a generator for one, and not any iterator.
        x = (one for one in itertools.chain([batch], x))
    elif y is None and not hasattr(x, "shape"):
        batch = next(iter(x), None)
    inputs, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
    inputs, labels = _only(inputs), _only(labels)
    if labels is None and inputs is not None:
        raise ValueError("`y` must hold labels, or `x` give batches `(inputs, labels)`. Received: no labels")
    if isinstance(inputs, dict | list | tuple):
        raise ValueError(f"`x` must hold one input an example, not several. Received: {type(inputs).__name__}")
    inputs = np.empty(0) if inputs is None else as_array(_backend.one_replicas(inputs))
    if inputs.size == 0:
        raise ValueError("`x` must hold at least one example. Received: none")
    labels = as_array(_backend.one_replicas(labels))
    if inputs.ndim < 2 or labels.ndim == 0:
        raise ValueError(
            "`x` must hold inputs of shape (count, ...), or give batches of them (a tf.data.Dataset: call `.batch`). "
            f"Received: inputs of shape {inputs.shape}"
        )
    return x, (inputs, labels)


def _from_logits(loss: Any) -> bool | None:
    """What a loss expects of the outputs; None where it does not say."""
    if isinstance(loss, keras.losses.Loss):
        return getattr(loss, "from_logits", None)
    try:
        parameter = inspect.signature(loss).parameters["from_logits"]
    except (TypeError, ValueError, KeyError):
        return None
    return parameter.default


def _check_outputs(loss: Any, outputs: np.ndarray) -> None:
    """`ValueError` for a model whose outputs are not what the loss takes them for."""
    from_logits, found = _from_logits(loss), f"Received: values from {outputs.min():g} to {outputs.max():g}"
    if from_logits is False and not looks_like_probabilities(outputs):
        raise ValueError(
            "`loss` has `from_logits=False`, but the outputs of `model` are no probabilities: give the loss "
            f"`from_logits=True`, or the model a softmax. {found}"
        )
    if from_logits and looks_like_probabilities(outputs):
        raise ValueError(
            "`loss` has `from_logits=True`, but the outputs of `model` look like probabilities: leave its "
            f"`from_logits` out. {found}"
        )


def _values_of(loss: Any) -> Callable:
    """A loss as a function that returns one value an example."""
    return loss.call if isinstance(loss, keras.losses.Loss) else loss


def _check_per_sample(loss: Callable, labels: np.ndarray, outputs: Any) -> None:
    """`ValueError` for a loss that returns a scalar: its mean over weights and replicas is not known."""
    try:
        values = _values_of(loss)(ops.convert_to_tensor(labels), outputs)
    except NotImplementedError:
        return
    if len(values.shape) == 0:
        raise ValueError("`loss` must return one value an example, shape (batch,). Received: one that returns a scalar")
