"""The Keras model that trains another model on attacked inputs."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from keras_drsl import _renamed, _validation
from keras_drsl._data import binary_labels, class_ids, first_batch, only_input, position_ids
from keras_drsl._typing import Norm, Numbers, Tensor
from keras_drsl.models.heads import View, in_one_axis, two_classes, two_classes_each
from keras_drsl.models.inputs import Inputs
from keras_drsl.models.logits import LogitsModel, check_num_labels, find_logits_of, log_probabilities
from keras_drsl.models.state import check_model, keep_counters, preserve_state, random_counters
from keras_drsl.predictions import Reduction, logits_behind_softmax
from keras_drsl.threat import ThreatModel
from keras_drsl.training import safeguards
from keras_drsl.training.inner_attack import (
    InnerAttack,
    ReplicaSeeds,
    as_class_ids,
    mean_of_sample,
    per_sample,
    to_rows,
)
from keras_drsl.training.methods import (
    ATTACK_LOSSES,
    METHODS,
    AttackedBatch,
    CleanBatch,
    Method,
    Outputs,
    compiled_loss,
    cross_entropy,
)

CHECKED_ROWS = 32  # The first inputs, on which model and loss are tried before training.


class AdversarialTraining(keras.Model):
    """Train a classifier on the worst inputs near those it is given.

    Use it if the classifier must withstand attacks as strong as those that papers report. No loss alone achieves this.
    `AdversarialTraining` wraps a model and shares its weights: call `compile` and `fit` of the wrapper as of any Keras
    model, then use and save the model itself. `evaluate_robustness` measures how robust the trained model is.
    `RobustnessMonitor` measures it after each epoch.

    The model maps inputs `(batch, ...)` to outputs `(batch, C)`, logits or a softmax.

    Formula: each method minimizes the mean over the batch of

    - `"pgd"`: `L(y, z')`. The attack takes `steps` steps that increase `attack_loss`. It starts at a random point of
      the ball (Madry et al.).
    - `"fgsm"`: `L(y, z')`. The attack is the same with a single step (Wong et al.). The method is cheap and prone to
      catastrophic overfitting: `attack_strength` drops to about 0 or below while `accuracy` rises steeply.
    - `"nfgsm"`: as `"fgsm"`. The attack starts in a ball twice as large, and is not clipped (de Jorge et al.).
    - `"flat"`: `L(y, z) + eps / step_size * (L(y, z') - L(y, z))`. The attack takes one step from x that increases L,
      the whole loss, so this is about `L(y, z)` plus `eps` times the slope of L along that step: in L-inf and L2, the
      dual norm of its gradient with respect to x. Metrics and `attack_strength` are at that small step, of the
      model as it trains.
    - `"trades"`: `L(y, z) + beta * KL(p || p')`. The attack takes `steps` steps that increase `KL(p || p')`. It starts
      close to x (Zhang et al.).
    - `"mart"`: `L(y, z') - log(1 - max_{k != y} p'_k) + beta * KL(p || p') * (1 - p_y)`. The attack is that of `"pgd"`
      (Wang et al.).
    - `"consistency"`: `(L(y, z') + L(y, z'')) / 2 + beta * (d' - d'')^2`, without an attack. x' and x'' are drawn
      uniformly from the ball and are not clipped.
    - `"clean"`: `L(y, z)`, the baseline.

    x is the input, x' the attacked one, and y the true class. z and z' are the logits of x and x', p and p' their
    softmax. L is the loss given to `compile`. d' is the true logit of x' minus the mean of its other logits. z'' and
    d'' are those of x''.

    Note:

    - The attack sees the model as at inference: without dropout, and with the moving statistics of BatchNormalization,
      which it does not change.
    - `History` holds `loss`, `accuracy` and the other compiled metrics on the attacked batch; for `"consistency"`, the
      metrics are on x''.
    - `History` also holds `clean_accuracy`, the accuracy before the attack, and `attack_strength`, the increase of the
      cross-entropy by the attack. Both are of the model as at inference, and ignore sample weights. Without an attack,
      `attack_strength` is 0.
    - `evaluate`, `predict` and `validation_data` do not attack.
    - `"consistency"` is meant for `keras_drsl.DRSLoss(lam=1.0)` and an `eps` of about 2.5 times the radius of the
      expected attacks; 4 times was much worse in our study. In L-inf, its noise has the standard deviation
      `eps / sqrt(3)`. A training step takes about twice as long as a plain one, plus one forward pass.
    - Losses that layers add are added once. If they depend on the inputs, as an activity regularizer does, they are
      added once for each of x and x' that the method uses; on JAX, only for the last of these.
    - Layers that draw random numbers, such as noise or crops, draw the same for x and x'. On torch, only layers with a
      seed do.
    - `fit` checks all of an array, and the first batch of any other data. It draws that batch once more for this: a
      data set that shuffles itself then continues with its next order.
    - Under `tf.distribute`, create both the model and its `AdversarialTraining` in the scope of the strategy.
    - `save` and `export` save the plain model, not compiled.
    - `save_weights` saves the state of the training, with that of random numbers. Only an `AdversarialTraining` can
      load it. To save the weights of the plain model alone, call its own `save_weights`.
    - With `keras.callbacks.BackupAndRestore`, a training that was killed resumes exactly, except for the order in
      which Keras shuffles arrays.

    Args:
        model: A classifier with one input, of float values.
        eps: The radius of the ball around each input, in units of the input, > 0 and no larger than the range of the
            inputs; 8/255 by default.
        method: The name of a method above, or a `keras_drsl.training.Method` of your own.
        steps: The number of steps of the attack, >= 1. `"fgsm"`, `"nfgsm"` and `"flat"` always take one,
            `"consistency"` and `"clean"` none.
        step_size: The size of a step, in units of the input, > 0. By default `2.5 * eps / steps`, at most `eps`;
            `1.25 * eps` for `"fgsm"`, `eps` for `"nfgsm"` and `0.1 * eps` for `"flat"`. Ignored without an attack.
        attack_loss: The loss that the attack of `"pgd"`, `"fgsm"`, `"nfgsm"` and `"mart"` increases:
            `"cross_entropy"` (the default), `"margin"` (the largest non-true logit minus the true one) or `"loss"` (the
            loss given to `compile`). With `DRSLoss`, `"loss"` was best for `"pgd"` and `"margin"` for `"fgsm"` in our
            study.
        norm: `"inf"` (the default), 2 or 1.
        beta: The weight `beta` above, >= 0. By default 6 for `"trades"` and `"mart"`, and 0.3 for `"consistency"`.
            Ignored by the other methods.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        warmup_epochs: The number of epochs with a radius below `eps`, >= 0. The radius increases evenly. Each `fit`
            starts the warm-up again, unless it is given an `initial_epoch`.
        seed: The seed of the random starts, >= 0.
        threat: A `keras_drsl.ThreatModel` in place of `eps`, `norm`, `clip_min`, `clip_max` and `mask`.
        output: The name or position of the output that is trained; None for a model with one output.
        preprocessing: A Keras layer or a function in front of the model, as in `evaluate_robustness`. It is not trained
            and not saved.
        expectation_draws: Over how many calls the attack averages the probabilities of a model that is random at
            inference, >= 1.
        attack_input: For a model with several inputs, the one that is attacked, or an embedding layer; as in
            `evaluate_robustness`.
        task: `"multiclass"`, or `"multilabel"` for a model with a unit per label, or `"positions"` for one that
            classifies each position. Attacks and penalties are then averages over the labels or positions. Negative
            labels do not count, nor the `ignore_class` of the loss, nor positions of sample weight 0.

    Raises:
        ValueError: If an argument is out of its range. In `fit` and in the first `train_on_batch`: if inputs do not
            fit the threat model, labels are no classes, outputs do not match the `from_logits` of the loss, or the loss
            returns a scalar. In `fit`: if the loss is not finite. Model and optimizer are then restored to the start of
            the epoch.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> robust = keras_drsl.AdversarialTraining(model, eps=0.1, steps=3)
    >>> robust.compile(optimizer="sgd", loss=keras_drsl.DRSLoss(lam=0.03), metrics=["accuracy"])
    >>> history = robust.fit(np.random.rand(32, 8), np.arange(32) % 3, verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'attack_strength', 'clean_accuracy', 'loss']

    Reference: Madry et al., arXiv:1706.06083; Wong et al., arXiv:2001.03994; de Jorge et al., arXiv:2202.01181; Zhang
    et al., arXiv:1901.08573; Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR 2020.
    """

    def __init__(
        self,
        model: keras.Model,
        eps: Numbers | None = None,
        *,
        method: str | Method = "pgd",
        steps: int = 10,
        step_size: float | None = None,
        attack_loss: str | None = None,
        norm: Norm | None = None,
        beta: float | None = None,
        clip_min: Numbers | None = None,
        clip_max: Numbers | None = None,
        mask: Any = None,
        warmup_epochs: int = 0,
        seed: int = 0,
        threat: ThreatModel | None = None,
        output: str | int | None = None,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        expectation_draws: int = 1,
        attack_input: str | int | None = None,
        task: str = "multiclass",
    ) -> None:
        check_model("model", model)
        if isinstance(model, AdversarialTraining):
            raise ValueError("`model` must be a plain model. Received: an AdversarialTraining")
        if attack_input is None:
            safeguards.check_inputs(model)
        # The attack needs inputs of full precision; the model casts them itself.
        super().__init__(dtype=model.dtype_policy, autocast=False)
        if eps is None and threat is None:
            eps = 8 / 255
        self.threat = ThreatModel.from_arguments(eps, norm, clip_min, clip_max, threat, mask)
        self.method = self._read_method(method, attack_loss)
        steps = _validation.check_integer("steps", steps, at_least=1)
        self.steps = 1 if self.method.single_step else steps
        if step_size is None:
            radius = self.threat.radius
            step_size = self.method.step_share(steps) * radius
        self.step_size = _validation.check_positive("step_size", step_size)
        self.beta = _validation.check_non_negative("beta", self.method.beta if beta is None else beta)
        self.warmup_epochs = _validation.check_integer("warmup_epochs", warmup_epochs, at_least=0)
        self.model = model
        self._view = View(output, preprocessing, expectation_draws, attack_input, task).check()
        # Of a model with several inputs, from the first batch on: how they lie in what the attack is given.
        self._inputs: Inputs | None = None
        # An attribute of its own, for Keras to track its state.
        self._seeds = ReplicaSeeds(_validation.check_integer("seed", seed, at_least=0))
        self._attack = InnerAttack(self.method, self.threat, self.steps, self.step_size, self._seeds)
        self._eps_scale = self.add_weight(
            name="eps_scale", shape=(), initializer="ones", dtype="float32", trainable=False
        )
        self._clean_accuracy = keras.metrics.Mean(name="clean_accuracy")
        self._attack_strength = keras.metrics.Mean(name="attack_strength")
        self._logits_model: LogitsModel | None = None
        self._is_training = False
        self.built = model.built

    def _read_method(self, method: str | Method, attack_loss: str | None) -> Method:
        """Return the method by its name, with the given `attack_loss`."""
        if isinstance(method, Method):
            result = method
        else:
            _renamed.refuse_old_value("method", method)
            result = METHODS[_validation.check_name("method", method, tuple(METHODS))]
        if attack_loss is not None:
            attack_loss = _validation.check_name("attack_loss", attack_loss, tuple(ATTACK_LOSSES))
            if result.loss_fn is not cross_entropy:
                raise ValueError(
                    "`attack_loss` must be left out unless the attack of the method increases the cross-entropy by "
                    "default, as those of 'pgd', 'fgsm', 'nfgsm' and 'mart' do. "
                    f"Received: attack_loss={attack_loss!r}, method={method!r}"
                )
            result = result.replace(loss_fn=ATTACK_LOSSES[attack_loss])
        return result.replace(loss_fn=self._compiled_loss) if result.loss_fn is compiled_loss else result

    @property
    def current_eps(self) -> float:
        """The radius of the attack in the current epoch: smaller than `threat.radius` during the warm-up."""
        return self.threat.radius * float(ops.convert_to_numpy(self._eps_scale))

    def call(self, inputs: Tensor | AttackedBatch, training: bool | None = None) -> Tensor | Outputs:
        """Return the outputs `(batch, C)` for inputs `(batch, ...)`, and `Outputs` for an `AttackedBatch`."""
        if not isinstance(inputs, AttackedBatch):
            return self._outputs_of(inputs, training)
        needs_clean = "clean" in self.method.learns_from or self.method.penalty is not None
        if not needs_clean:
            return Outputs(None, self._outputs_of(inputs.adversarial, training, packed=True))
        rewind = keep_counters(self.model)
        adversarial = self._outputs_of(inputs.adversarial, training, packed=True)
        # Layers must draw the same noise or crops again: the two outputs are compared.
        rewind()
        return Outputs(self._outputs_of(inputs.clean, training, packed=True), adversarial)

    def _outputs_of(self, x: Any, training: bool | None, *, packed: bool = False) -> Tensor:
        """Return the outputs for inputs as the model takes them, or packed as the attack is given them."""
        view = self._packed_view if packed else self._view
        return view.call(self.model, x, training)

    @property
    def _packed_view(self) -> View:
        inputs = self._inputs
        return self._view if inputs is None else self._view.replace(layout=inputs.layout, embedding=inputs.embedding)

    def train_step(self, *arguments: Any) -> Any:
        """Run one training step on an attacked batch, with the backend's own arguments and results."""
        *state, data = arguments
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x = x if self._inputs is not None else only_input(x)
        weights = self._position_weights(sample_weight)
        if not state:
            return super().train_step((self._attack_batch(x, y, weights), y, sample_weight))
        # On JAX a step is a pure function: it receives the values of all variables and returns the new ones. The attack
        # runs in a scope with these values. Those that it changes, such as random counters, are passed on.
        trainable, non_trainable, *others = state[0]
        values = [*zip(self.trainable_variables, trainable, strict=True)]
        values += zip(self.non_trainable_variables, non_trainable, strict=True)
        with keras.StatelessScope(state_mapping=values) as scope:
            x = self._attack_batch(x, y, weights)
        non_trainable = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
        return super().train_step((trainable, non_trainable, *others), (x, y, sample_weight))

    def _position_weights(self, sample_weight: Tensor | None) -> Tensor | None:
        """Return the weights of positions, or None: positions of weight 0 do not count for the attack either."""
        has_weights = self._view.task == "positions" and sample_weight is not None and len(sample_weight.shape) > 1
        return sample_weight if has_weights else None

    def _attack_batch(self, x: Any, y: Tensor, weights: Tensor | None = None) -> AttackedBatch:
        if self._inputs is not None:
            x = self._inputs.pack_tensors(x)
        return self._attack(self._found_logits().classifier, x, y, self._eps_scale, weights)

    def _found_logits(self) -> LogitsModel:
        if self._logits_model is None:
            raise ValueError("Train by `fit` or `train_on_batch`: they find the model's logits in the first batch.")
        return self._logits_model

    def _compiled_loss(self, logits: Tensor, batch: CleanBatch) -> Tensor:
        """Compute the loss given to `compile`, shape `(batch,)`."""
        found, labels = self._found_logits(), batch.labels
        if found.unit is not None:
            outputs = logits[..., 1] - logits[..., 0]
            outputs = outputs if found.unit == "logit" else ops.sigmoid(outputs)
            if self._view.task == "multiclass":
                labels = ops.reshape(labels, (-1, 1))
            outputs = ops.reshape(outputs, ops.shape(labels))
        else:
            outputs = logits if found.outputs == "logits" else keras.activations.softmax(logits)
            if self._view.task == "positions":
                is_one_hot = math.prod(labels.shape[1:]) == math.prod(logits.shape[1:])
                positions = labels.shape[1:-1] if is_one_hot else labels.shape[1:]
                outputs = ops.reshape(outputs, (-1, *positions, logits.shape[-1]))
        return safeguards.loss_function(keras.losses.get(self.loss))(labels, outputs)

    # It needs the labels of a sample together.
    _compiled_loss.takes_positions = True  # type: ignore[attr-defined]

    def compute_loss(
        self,
        x: Any = None,
        y: Tensor = None,
        y_pred: Tensor | Outputs = None,
        sample_weight: Tensor | None = None,
        training: bool = True,
    ) -> Tensor:
        """Compute the loss of the method for an attacked batch, and the compiled loss for any other."""
        compute_loss = super().compute_loss
        if not isinstance(y_pred, Outputs):
            return compute_loss(x, y, y_pred, sample_weight, training)
        names = self.method.learns_from
        losses = [compute_loss(x, y, getattr(y_pred, name), sample_weight, training) for name in names]
        loss = sum(losses) / len(losses)
        if self.method.slope:
            clean, adversarial = losses if names[0] == "clean" else losses[::-1]
            loss = clean + self._eps_scale * (self.threat.radius / self.step_size) * (adversarial - clean)
        if self.method.penalty is None:
            return loss
        log_p, log_q = self._log_probabilities(y_pred.clean), self._log_probabilities(y_pred.adversarial)
        ids = as_class_ids(y, log_p, self._ignore_class)
        penalty = self.method.penalty(
            to_rows(log_p), to_rows(log_q), ops.reshape(ops.maximum(ids, 0), (-1,)), self.beta
        )
        if len(log_p.shape) == 3:
            weights = ops.cast(ids >= 0, "float32")
            if sample_weight is not None and len(sample_weight.shape) > 1:
                weights *= ops.cast(ops.reshape(sample_weight, ops.shape(weights)), "float32")
                sample_weight = None
            penalty = mean_of_sample(penalty, weights)
        average = Reduction(name="penalty", reduction=getattr(self.loss, "reduction", "sum_over_batch_size"))
        return loss + average(penalty, penalty, sample_weight=sample_weight)

    def _log_probabilities(self, outputs: Tensor) -> Tensor:
        found = self._found_logits()
        if found.unit is not None:
            pair = two_classes_each if self._view.task == "multilabel" else two_classes
            outputs, are_logits = pair(outputs, found.unit), found.unit == "logit"
        else:
            outputs, are_logits = logits_behind_softmax(outputs, found.outputs == "logits", -1)
        outputs = ops.cast(outputs, "float32")
        if self._view.task == "positions":
            outputs = in_one_axis(outputs)
        return ops.log_softmax(outputs) if are_logits else log_probabilities(outputs)

    def _increase(self, x: Tensor, y: Tensor, outputs: Outputs, sample_weight: Tensor | None) -> Tensor:
        """Compute the increase of the cross-entropy from the clean outputs to the others, shape `(batch,)`."""
        clean, adversarial = map(self._log_probabilities, outputs)
        batch = self._attack.clean_batch(x, y, clean, self._position_weights(sample_weight))
        entropy = per_sample(cross_entropy)
        return entropy(adversarial, batch) - entropy(clean, batch)

    @property
    def _ignore_class(self) -> int | None:
        """The class id of positions that the loss does not count."""
        return getattr(self.loss, "ignore_class", None) if self._view.task == "positions" else None

    def compute_metrics(
        self, x: Any, y: Tensor, y_pred: Tensor | Outputs, sample_weight: Tensor | None = None
    ) -> dict[str, Any]:
        """Update the compiled metrics and, for an attacked batch, those of the attack."""
        if isinstance(y_pred, Outputs):
            self._clean_accuracy.update_state(x.is_correct)
            increase = self._increase(x.clean, y, y_pred, sample_weight) if self.method.slope else x.loss_increase
            self._attack_strength.update_state(increase)
            y_pred = y_pred.adversarial
        results: dict[str, Any] = super().compute_metrics(x, y, y_pred, sample_weight)
        return results

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The compiled metrics and, during training, those of the attack."""
        own = (self._clean_accuracy, self._attack_strength)
        return [metric for metric in super().metrics if self._is_training or metric not in own]

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
    ) -> keras.callbacks.History:
        """Train as `keras.Model.fit` does, with the same arguments, after checks of model, loss and data."""
        x = self._prepare(x, y)
        if epochs <= self.warmup_epochs:
            warnings.warn(
                "`epochs` must be larger than `warmup_epochs` to reach the full `eps`. "
                f"Received: epochs={epochs}, warmup_epochs={self.warmup_epochs}",
                stacklevel=2,
            )
        own: list[keras.callbacks.Callback] = [
            safeguards.Warmup(self._eps_scale, self.warmup_epochs),
            safeguards.StopAtNaN(),
        ]
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.callbacks.CallbackList([*own, *callbacks.callbacks], model=self, **callbacks.params)
        else:
            callbacks = [*own, *keras.tree.flatten(callbacks or [])]
        try:
            with self._set_training(True):
                return super().fit(x, y, batch_size, epochs, verbose, callbacks, *arguments, **options)
        finally:
            # A callback may have restored the weights of a warm-up epoch.
            self._eps_scale.assign(1.0)

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate as `keras.Model.evaluate` does, with the same arguments, without an attack."""
        with self._set_training(False):
            return super().evaluate(*arguments, **options)

    def train_on_batch(self, x: Any, y: Any = None, *arguments: Any, **options: Any) -> Any:
        """Train on one batch as `keras.Model.train_on_batch` does, with the same arguments, on attacked inputs."""
        if self._logits_model is None:
            self._prepare(x, y)
        with self._set_training(True):
            return super().train_on_batch(x, y, *arguments, **options)

    @contextmanager
    def _set_training(self, is_training: bool) -> Iterator[None]:
        before, self._is_training = self._is_training, is_training
        try:
            yield
        finally:
            self._is_training = before

    def save(self, *arguments: Any, **options: Any) -> None:
        """Save the plain model, with the arguments of `keras.Model.save`."""
        self.model.save(*arguments, **options)

    def export(self, *arguments: Any, **options: Any) -> None:
        """Export the plain model, with the arguments of `keras.Model.export`."""
        self.model.export(*arguments, **options)

    def get_config(self) -> dict[str, Any]:
        """Raise `NotImplementedError`: only the plain model can be saved."""
        raise NotImplementedError(
            "Save the plain model: `save` does, and so does `keras.saving.save_model` on `model`."
        )

    def save_own_variables(self, store: Any) -> None:
        """Save the variables, and the random counters, which Keras leaves out."""
        super().save_own_variables(store)
        for index, counter in enumerate(random_counters(self)):
            store[f"random_{index}"] = ops.convert_to_numpy(counter)

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` saved."""
        names = [name for name in store.keys() if not name.startswith("random_")]  # noqa: SIM118, no dictionary
        super().load_own_variables({name: store[name] for name in names})
        for index, counter in enumerate(random_counters(self)):
            counter.assign(store[f"random_{index}"])

    def _prepare(self, x: Any, y: Any) -> Any:
        """Check data, model and loss, and find the logits of the model; return the data with no batch lost."""
        if not self.compiled:
            raise ValueError("Call `compile` of the AdversarialTraining first: that of `model` has no effect here.")
        attack_input, name = self._view.attack_input, "x"
        x, (inputs, labels) = first_batch(x, y, several=attack_input is not None)
        if attack_input is None:
            attacked = inputs
            tried = given = inputs[:CHECKED_ROWS].astype("float32")
        else:
            self._inputs = Inputs(self.model, attack_input, self._view.preprocessing)
            given = keras.tree.map_structure(lambda values: values[:CHECKED_ROWS], inputs)
            tried = self._inputs.pack(given)
            layout = self._inputs.layout
            assert layout is not None
            self._attack = dataclasses.replace(self._attack, threat=layout.extend(self.threat))
            attacked, name = self._inputs.attacked(inputs, tried), layout.name_in(name)
        self.threat.validate(name, attacked)
        safeguards.check_loss(self.loss)
        loss = keras.losses.get(self.loss)
        task = self._view.task
        with preserve_state(self.model, inputs=None if attack_input is not None else tried):
            found = self._logits_model = find_logits_of(self.model, tried, None, self._packed_view)
            outputs = found.model.logits(tried)
            safeguards.check_outputs(loss, outputs)
            self._attack = dataclasses.replace(self._attack, ignore_class=self._ignore_class)
            if task == "multilabel":
                check_num_labels(binary_labels(labels).shape[1], outputs.shape[1])
            elif task == "positions":
                position_ids(labels[:CHECKED_ROWS], outputs, self._ignore_class)
            else:
                count = len(keras.tree.flatten(inputs)[0])
                class_ids(labels, count, outputs.shape[-1], allow_ties=True)  # as mixed images have them
            shown = self._outputs_of(keras.tree.map_structure(ops.convert_to_tensor, given), training=False)
            labels = labels[:CHECKED_ROWS]
            labels = labels.reshape(-1, 1) if found.unit is not None and task == "multiclass" else labels
            safeguards.check_value_per_sample(loss, labels, shown)
        if not self.optimizer.built and getattr(self, "_distribute_strategy", None) is None:
            # On TensorFlow Keras would build it during the first epoch, and a NaN in that epoch could not be undone.
            self.optimizer.build(self.trainable_variables)
        return x
