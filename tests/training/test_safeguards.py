"""The checks before a training, the warm-up, and the stop at a loss that is not finite."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl.training import StopAtCollapse
from tests.backends import on_tensorflow
from tests.training.cases import BIAS, EPS, SLOPES, cross_entropies, data, linear, smooth, train, worst_inputs, wrap


class TestWarmup:
    def test_increases_eps_evenly(self):
        x, y = data()
        options = {"epochs": 4, "warmup_epochs": 2, "steps": 3, "step_size": 2 * EPS}
        _, history = train(linear(), x, y, optimizer=keras.optimizers.SGD(0.0), **options)
        clean = cross_entropies(x @ SLOPES + BIAS, y)
        increases = [
            (cross_entropies(worst_inputs(x, y, scale * EPS) @ SLOPES + BIAS, y) - clean).mean()
            for scale in (1 / 3, 2 / 3, 1, 1)
        ]
        np.testing.assert_allclose(history["attack_strength"], increases, atol=1e-5)

    def test_serves_a_callback_list_made_by_keras(self):
        x, y = data()
        robust = wrap(linear(), warmup_epochs=1, graph=False)
        radii = []
        record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: radii.append(robust.current_eps))
        callbacks = keras.callbacks.CallbackList([record], add_history=True, model=robust)
        for _ in range(2):
            robust.fit(x, y, epochs=2, callbacks=callbacks, verbose=0)
        assert radii == pytest.approx([EPS / 2, EPS, EPS / 2, EPS])
        assert len(callbacks.callbacks) == 2

    def test_ends_when_early_weights_are_restored(self):
        class Worse(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                logs["worse"] = epoch

        robust = wrap(linear(), warmup_epochs=9, graph=False)
        stop = keras.callbacks.EarlyStopping("worse", mode="min", restore_best_weights=True)
        with pytest.warns(UserWarning, match="warmup_epochs"):
            robust.fit(*data(), epochs=3, verbose=0, callbacks=[Worse(), stop])
        assert robust.current_eps == pytest.approx(EPS)

    def test_longer_than_training_warns(self):
        with pytest.warns(UserWarning, match="Received: epochs=2, warmup_epochs=2"):
            train(linear(), *data(), epochs=2, warmup_epochs=2, graph=False)


class Forge(keras.callbacks.Callback):
    """Replace metrics, and keep the weights at the start of each epoch."""

    def __init__(self, **metrics):
        super().__init__()
        self.metrics, self.weights = metrics, []

    def on_epoch_begin(self, epoch, logs=None):
        self.weights.append(self.model.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: values[epoch] for name, values in self.metrics.items()})


class TestStopAtCollapse:
    @pytest.mark.short
    @pytest.mark.parametrize(
        ("name", "values"), [("clean_accuracy", [0.8, 0.9, 0.62]), ("attack_strength", [1.0, 2.0, 0.39])]
    )
    def test_restores_the_start_of_the_epoch(self, name, values):
        other = {"clean_accuracy": "attack_strength", "attack_strength": "clean_accuracy"}[name]
        forge = Forge(**{name: [*values, 1.0], other: [0.5] * 4})
        robust = wrap(linear(), method="fgsm")
        with pytest.warns(RuntimeWarning, match=f"collapsed in epoch 3: `{name}` fell from {values[1]:g} to"):
            history = robust.fit(*data(), epochs=4, verbose=0, callbacks=[forge, StopAtCollapse()])
        assert len(history.epoch) == 3
        for weight, expected in zip(robust.model.get_weights(), forge.weights[2], strict=True):
            np.testing.assert_array_equal(weight, expected)

    def test_lets_other_trainings_run(self):
        forge = Forge(clean_accuracy=[0.9, 0.5, 0.9, 0.64], attack_strength=[5.0, 1.0, 2.0, 0.41])
        robust = wrap(linear(), method="fgsm", warmup_epochs=1, graph=False)
        history = robust.fit(*data(), epochs=4, verbose=0, callbacks=[forge, StopAtCollapse()])
        assert len(history.epoch) == 4

    def test_refuses_other_models(self):
        model = linear()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        with pytest.raises(ValueError, match="the fit of a Sequential"):
            model.fit(*data(), verbose=0, callbacks=[StopAtCollapse()])

    @pytest.mark.parametrize("name", ["accuracy", "strength"])
    def test_refuses_shares_out_of_range(self, name):
        with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
            StopAtCollapse(**{name: 1.0})


# D7
def test_upper_case_changes_no_method():
    x, y = data()
    weights = [train(linear(), x, y, method=method)[0] for method in ("PGD", "pgd")]
    np.testing.assert_array_equal(weights[0][0], weights[1][0])


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"eps": 0}, {"eps": -0.1}, {"eps": math.nan}, {"eps": 1.5}, {"method": "no"}, {"method": 1}, {"steps": 0},
            {"attack_loss": "ce"},
            {"step_size": 0}, {"norm": 3}, {"beta": -1}, {"clip_min": 1.0}, {"warmup_epochs": -1}, {"seed": -1},
        ],
    )  # fmt: skip
    def test_out_of_range_is_named(self, options):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"`{name}`.*Received: .*{value}"):
            keras_drsl.AdversarialTraining(linear(), **{"eps": EPS} | options)

    def test_old_method_name_is_refused_with_the_new(self):
        with pytest.raises(ValueError, match="`method='noise'`.*'consistency'.*Received: method='noise'"):
            keras_drsl.AdversarialTraining(linear(), EPS, method="noise")

    @pytest.mark.parametrize("method", ["trades", "clean"])
    def test_attack_loss_needs_a_method_that_uses_it(self, method):
        received = f"Received: attack_loss='loss', method='{method}'"
        with pytest.raises(ValueError, match=f"`attack_loss` must be left out.* {received}"):
            keras_drsl.AdversarialTraining(linear(), EPS, method=method, attack_loss="loss")

    def test_model_must_be_a_plain_keras_model(self):
        with pytest.raises(ValueError, match="`model` must be a keras.Model. Received: Dense"):
            keras_drsl.AdversarialTraining(keras.layers.Dense(3), EPS)
        robust = keras_drsl.AdversarialTraining(linear(), EPS)
        with pytest.raises(ValueError, match="`model` must be a plain model. Received: an AdversarialTraining"):
            keras_drsl.AdversarialTraining(robust, EPS)

    def test_model_must_take_one_input_of_floats(self):
        pixels = keras.Input((4,), dtype="uint8", name="pixels")
        model = keras.Model(pixels, keras.layers.Dense(3)(keras.layers.Rescaling(1 / 255)(pixels)))
        with pytest.raises(ValueError, match="must have an input of float values, .* Received: pixels of dtype uint"):
            keras_drsl.AdversarialTraining(model, EPS)
        inputs = [keras.Input((4,), name=name) for name in ("a", "b")]
        with pytest.raises(ValueError, match="must name one of the inputs of `model`: 'a', 'b'"):
            keras_drsl.AdversarialTraining(keras.Model(inputs, keras.layers.Add()(inputs)), EPS)


class TestLossAndOutputs:
    def test_must_be_one_each(self):
        x, y = data()
        inputs = keras.Input((4,))
        model = keras.Model(inputs, {"a": keras.layers.Dense(3)(inputs)})
        with pytest.raises(ValueError, match="`output` must name one of the outputs of `model`"):
            train(model, x, y)
        with pytest.raises(ValueError, match="`loss` must be one loss, for one output"):
            train(linear(), x, y, loss=[keras_drsl.DRSLoss(from_logits=True)])

    @pytest.mark.parametrize("loss", [keras_drsl.DRSLoss(), "sparse_categorical_crossentropy"])
    def test_logits_need_a_loss_from_logits(self, loss):
        with pytest.raises(ValueError, match="`from_logits=False`, but the outputs of `model` are no probabilities"):
            train(linear(), *data(), loss=loss)

    def test_probabilities_need_a_loss_of_probabilities(self):
        with pytest.raises(ValueError, match="`from_logits=True`, but the outputs of `model` look like probabilities"):
            train(linear(keras.layers.Softmax()), *data())

    def test_are_checked_again_after_compile(self):
        x, y = data()
        robust = wrap(linear(keras.layers.Softmax()), loss=keras_drsl.DRSLoss(), graph=False)
        robust.fit(x, y, verbose=0)
        robust.compile("sgd", keras_drsl.DRSLoss(from_logits=True))
        with pytest.raises(ValueError, match="`from_logits=True`, but the outputs of `model` look like probabilities"):
            robust.fit(x, y, verbose=0)

    def test_loss_must_return_a_value_per_sample(self):
        x, y = data()

        def scalar(y_true, y_pred):
            return ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True))

        class Scalar(keras.losses.Loss):
            def call(self, y_true, y_pred):
                return scalar(y_true, y_pred)

        for loss in (scalar, Scalar()):
            with pytest.raises(ValueError, match=r"`loss` must return one value per sample, shape \(batch,\)"):
                train(linear(), x, y, loss=loss)

    def test_compile_must_be_called_first(self):
        robust = keras_drsl.AdversarialTraining(linear(), EPS)
        with pytest.raises(ValueError, match="Call `compile` of the AdversarialTraining first"):
            robust.fit(*data())


class TestData:
    def test_must_lie_in_the_range(self):
        x, y = data()
        with pytest.raises(ValueError, match=r"`x` must lie in \[clip_min, clip_max\] = \[0, 1\].*to 255"):
            train(linear(), np.where(x == x[3, 3], 255.0, x), y)

    def test_must_allow_for_eps_in_l2(self):
        with pytest.raises(ValueError, match=r"`eps` must be no larger than the distance of two valid inputs, 2 in L2"):
            train(linear(), *data(), eps=2.1, norm=2)

    def test_all_of_an_array_is_checked(self):
        x, y = data(80)
        for row, value in ((70, 255.0), (71, math.nan)):
            wrong = x.copy()
            wrong[row] = value
            with pytest.raises(ValueError, match="`x` must lie in"):
                train(linear(), wrong, y)
        with pytest.raises(ValueError, match=r"`y` must hold class ids in \[0, 3\). Received: 3"):
            train(linear(), x, np.where(np.arange(80) == 75, 3, y))

    @on_tensorflow
    def test_data_set_without_batches_is_explained(self):
        import tensorflow as tf

        with pytest.raises(ValueError, match="a tf.data.Dataset: call `.batch`"):
            train(linear(), tf.data.Dataset.from_tensor_slices(data()), None, batch_size=None)

    def test_must_hold_examples_and_labels(self):
        x, y = data()
        with pytest.raises(ValueError, match="`x` must hold inputs, or give batches of them. Received: x=None"):
            train(linear(), None, None)
        for empty, labels in ((x[:0], y[:0]), ([], None)):
            with pytest.raises(ValueError, match="`x` must hold at least one example. Received: none"):
                train(linear(), empty, labels)
        for unlabeled in (x, iter([x])):
            with pytest.raises(ValueError, match="`y` must hold labels, or `x` give batches `.inputs, labels.`"):
                train(linear(), unlabeled, None)

    def test_must_hold_one_input_per_example(self):
        x, y = data()
        with pytest.raises(ValueError, match="`x` must hold one input per example, not several; .*Received: dict"):
            train(linear(), {"a": x, "b": x}, y)


@pytest.mark.parametrize(
    ("made_by_keras", "epoch"), [(False, 1), pytest.param(False, 2, marks=pytest.mark.short), (True, 2)]
)
def test_nan_restores_weights_of_epoch_start(made_by_keras, epoch):
    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        """NaN for the second batch of an epoch: its update makes the weights NaN, and the loss of the third batch."""

        def __call__(self, step):
            return ops.where(ops.equal(ops.cast(step, "int32"), 3 * epoch - 2), math.nan, 0.1)

    x, y = data(24)
    model = smooth()
    kept = [model.get_weights()]
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kept.append(model.get_weights()))
    robust = wrap(model, optimizer=keras.optimizers.Adam(Rate()), steps=1, graph=epoch == 1)
    settings = {"batch_size": 8, "shuffle": False, "verbose": 0}
    callbacks = keras.callbacks.CallbackList([keep], model=robust) if made_by_keras else [keep]
    with pytest.raises(ValueError, match=f"must be finite. Received: loss=nan in epoch {epoch}, step 3"):
        robust.fit(x, y, epochs=5, callbacks=callbacks, **settings)
    assert len(kept) == epoch
    for weight, expected in zip(model.get_weights(), kept[-1], strict=True):
        np.testing.assert_array_equal(weight, expected)
    robust.optimizer.iterations.assign(5)
    assert np.isfinite(robust.fit(x, y, **settings).history["loss"][0])
