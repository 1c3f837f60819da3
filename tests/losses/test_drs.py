import math
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_drsl
from keras_drsl import DRSLoss, drs_loss
from tests import reference
from tests.backends import BACKEND, FIT_MODES, compiled, gradient, on_tensorflow, values
from tests.helpers import run_python, some_short
from tests.losses.cases import draw, small_data, small_model, softmax

CROSS_ENTROPY = {"sparse": keras.losses.SparseCategoricalCrossentropy, "one_hot": keras.losses.CategoricalCrossentropy}

each_space = pytest.mark.parametrize("space", ["log_softmax", "softmax"])
each_spread = pytest.mark.parametrize("kind", ["sum_of_squares", "variance"])
with_and_without_smoothing = pytest.mark.parametrize("label_smoothing", [0.0, 0.1])


def expected_mean(ids, p, **options):
    """Compute the mean loss of probabilities by the formula."""
    p = np.asarray(p, "float64")
    return reference.each(reference.drs_loss, reference.one_hot(ids, p.shape[-1]), np.log(p), **options).mean()


class TestValue:
    @with_and_without_smoothing
    @each_spread
    @each_space
    @pytest.mark.parametrize("lam", [0, 0.3, 5])
    def test_equals_the_formula(self, lam, space, kind, label_smoothing):
        z, ids, one_hot = draw()
        options = {"lam": lam, "space": space, "label_smoothing": label_smoothing}
        expected = reference.each(reference.drs_loss, one_hot, z, kind=kind, **options)
        got = values(drs_loss(ids, z, from_logits=True, spread=kind, **options))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        got = values(drs_loss(ids, softmax(z), spread=kind, **options))
        np.testing.assert_allclose(got, expected, rtol=1e-4)

    def test_smooths_label_distributions(self):
        z, _, _ = draw()
        y = np.random.default_rng(1).dirichlet(np.ones(5), 6)
        expected = reference.each(reference.drs_loss, y, z, label_smoothing=0.2)
        got = values(drs_loss(y, z, from_logits=True, label_smoothing=0.2))
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_distinguishes_more_than_2048_classes(self):
        z, _, _ = draw((2, 3000))
        ids = np.array([2048, 2049])
        one_hot = reference.one_hot(ids, 3000)
        expected = reference.each(reference.drs_loss, one_hot, z)
        for labels in (ids, ids[:, None], one_hot):
            got = values(DRSLoss(from_logits=True, reduction=None)(labels, z))
            np.testing.assert_allclose(got, expected, rtol=1e-5)

    def test_smoothing_does_not_change_the_penalty(self):
        z, ids, one_hot = draw()
        with_penalty = values(drs_loss(ids, z, 1.0, from_logits=True, label_smoothing=0.1))
        without = values(drs_loss(ids, z, 0.0, from_logits=True, label_smoothing=0.1))
        expected = reference.each(reference.spread, one_hot, z)
        np.testing.assert_allclose(with_penalty - without, expected, rtol=1e-4)

    @pytest.mark.short
    def test_takes_integer_predictions(self):
        expected = reference.each(reference.drs_loss, [[1, 0, 0]], [[3, 1, 2]])
        np.testing.assert_allclose(values(drs_loss([0], [[3, 1, 2]], from_logits=True)), expected, rtol=1e-5)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 7), st.integers(0, 2**16))
    def test_does_not_depend_on_the_batch(self, cut, seed):
        z, ids, _ = draw((8, 5), seed=seed)
        whole = values(drs_loss(ids, z, from_logits=True))
        parts = [values(drs_loss(ids[part], z[part], from_logits=True)) for part in (slice(cut), slice(cut, None))]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)


class TestGradient:
    @on_tensorflow
    @with_and_without_smoothing
    @each_spread
    @each_space
    def test_equals_central_differences(self, space, kind, label_smoothing):
        z, ids, one_hot = draw()
        y_soft = np.random.default_rng(1).dirichlet(np.ones(5), 6)
        options = {"space": space, "label_smoothing": label_smoothing}
        for y, distribution in ((ids, one_hot), (one_hot, one_hot), (y_soft, y_soft)):
            got = gradient(lambda z, y=y: drs_loss(y, z, from_logits=True, spread=kind, **options), z, "float64")
            loop = lambda z, y=distribution: reference.each(reference.drs_loss, y, z, kind=kind, **options)
            np.testing.assert_allclose(got, reference.gradient(loop, z), rtol=1e-6, atol=1e-7)

    def test_is_finite_in_softmax_space_for_large_logits(self):
        z = np.array([[0, 0, 0], [7, 7, 7], [1e4, -1e4, 0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]], "float32")
        ids = np.array([0, 1, 0, 0, 2])
        loss = lambda z: drs_loss(ids, z, from_logits=True, space="softmax")
        expected = reference.each(reference.drs_loss, reference.one_hot(ids, 3), z, space="softmax")
        np.testing.assert_allclose(values(loss(z)), expected, rtol=1e-5)
        assert np.all(np.isfinite(gradient(loss, z)))

    @each_space
    def test_is_finite_for_probabilities_of_0_and_1(self, space):
        p = np.array([[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]], "float32")
        for y in ([0, 0, 0], reference.one_hot([0, 0, 0], 3)):
            loss = lambda p, y=y: drs_loss(y, p, space=space)
            assert np.all(np.isfinite(values(loss(p))))
            assert np.all(np.isfinite(gradient(loss, p)))

    def test_is_that_of_cross_entropy_for_two_classes(self):
        z, ids, _ = draw((5, 2))
        expected = gradient(lambda z: keras.losses.sparse_categorical_crossentropy(ids, z, from_logits=True), z)
        np.testing.assert_allclose(gradient(lambda z: drs_loss(ids, z, from_logits=True), z), expected, rtol=1e-6)

    def test_a_warning_says_so_once(self):
        z, ids, _ = draw((5, 2))
        loss = DRSLoss(from_logits=True)
        with pytest.warns(UserWarning, match="With two classes `DRSLoss` is cross-entropy"):
            loss(ids, z)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(ids, z)
            DRSLoss(0.0, from_logits=True)(ids, z)
            DRSLoss(from_logits=True)(ids, draw((5, 3))[0])

    @on_tensorflow
    def test_is_not_zero_for_a_saturated_softmax(self):
        z = np.array([[200.0, 0.0, -50.0]], "float32")
        got = gradient(lambda z: drs_loss([1], ops.softmax(z)), z)
        expected = gradient(lambda z: drs_loss([1], z, from_logits=True), z)
        np.testing.assert_allclose(got, expected)
        assert np.abs(got).min() > 0

    @on_tensorflow
    def test_finds_the_softmax_of_a_graph(self):
        import tensorflow as tf

        loss = tf.function(lambda z: drs_loss([1], tf.nn.softmax(z)))
        z = np.array([[200.0, 0.0, -50.0]], "float32")
        expected = gradient(lambda z: drs_loss([1], z, from_logits=True), z)
        np.testing.assert_allclose(gradient(loss, z), expected)

    @on_tensorflow
    def test_skips_a_graph_softmax_of_another_axis(self):
        import tensorflow as tf

        # Each row holds the same numbers, shifted, so that the softmax sums to 1 along both axes.
        z = draw((1, 5))[0][0][(np.arange(5)[:, None] + np.arange(5)) % 5]
        ids = np.array([0, 3, 1, 2, 0])
        loss = tf.function(lambda z: drs_loss(ids, tf.nn.softmax(z), axis=0))
        np.testing.assert_allclose(values(loss(z)), values(drs_loss(ids, softmax(z), axis=0)), rtol=1e-4)

    @pytest.mark.parametrize("gap", [3.0, 40.0])
    def test_is_not_zero_for_a_float16_softmax(self, gap):
        z = np.array([[gap, 0.0, 1.0, -1.0]], "float16")
        y = np.array([1])
        ours = gradient(lambda z: DRSLoss()(y, ops.softmax(z)), z, "float16")
        theirs = gradient(lambda z: CROSS_ENTROPY["sparse"]()(y, ops.softmax(z)), z, "float16")
        assert np.all(np.isfinite(ours))
        if gap == 3.0 or BACKEND == "tensorflow":
            assert np.abs(ours).min() > 0
        assert np.count_nonzero(ours) >= np.count_nonzero(theirs)


class TestLamZero:
    """With `lam=0` the loss is Keras's cross-entropy, in value and gradient."""

    @pytest.mark.parametrize(
        "reduction",
        some_short(
            ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none", None],
            more=["sum", "mean", "none", None],
        ),
    )
    @pytest.mark.parametrize("labels", ["sparse", "one_hot"])
    @pytest.mark.parametrize("head", ["logits", "probabilities", "softmax"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_equals_keras_for_every_reduction(self, reduction, labels, head, weighted):
        z, ids, one_hot = draw()
        y = ids if labels == "sparse" else one_hot
        weights = np.array([0, 1, 2, 0.5, 3, 0], "float32") if weighted else None
        x = softmax(z) if head == "probabilities" else z
        outputs = (lambda x: ops.softmax(x)) if head == "softmax" else (lambda x: x)
        options = {"from_logits": head == "logits", "reduction": reduction}
        ours, theirs = DRSLoss(lam=0, **options), CROSS_ENTROPY[labels](**options)
        got, expected = (values(loss(y, outputs(x), weights)) for loss in (ours, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        got, expected = (gradient(lambda x, loss=loss: loss(y, outputs(x), weights), x) for loss in (ours, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("label_smoothing", [0.05, 0.5])
    def test_equals_keras_with_label_smoothing(self, label_smoothing):
        z, ids, one_hot = draw()
        expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing)(one_hot, z)
        for y in (ids, one_hot):
            got = DRSLoss(lam=0, from_logits=True, label_smoothing=label_smoothing)(y, z)
            np.testing.assert_allclose(values(got), values(expected), rtol=1e-6)

    @pytest.mark.parametrize("labels", ["sparse", "one_hot"])
    def test_equals_keras_for_a_saturated_softmax(self, labels):
        z = np.array([[1e3, 0, -1e3], [-1e3, 0, 1e3], [30, 0, 0]], "float32")
        y = np.array([0, 0, 1])
        y = y if labels == "sparse" else reference.one_hot(y, 3).astype("float32")
        ours, theirs = DRSLoss(lam=0), CROSS_ENTROPY[labels]()
        np.testing.assert_allclose(values(ours(y, ops.softmax(z))), values(theirs(y, ops.softmax(z))), rtol=1e-6)
        got, expected = (gradient(lambda z, loss=loss: loss(y, ops.softmax(z)), z) for loss in (ours, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def test_equals_keras_with_ignored_positions(self):
        z, ids, _ = draw((4, 6, 5))
        options = {"from_logits": True, "ignore_class": 3}
        got, expected = DRSLoss(lam=0, **options)(ids, z), CROSS_ENTROPY["sparse"](**options)(ids, z)
        np.testing.assert_allclose(values(got), values(expected), rtol=1e-6)

    @pytest.mark.parametrize("policy", some_short(["mixed_float16", "mixed_bfloat16"], more=["mixed_bfloat16"]))
    def test_is_as_exact_as_keras_in_mixed_precision(self, policy):
        x, y = small_data()

        def train(policy, loss):
            keras.config.set_dtype_policy(policy)
            try:
                model = small_model()
            finally:
                keras.config.set_dtype_policy("float32")
            model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
            model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
            return np.concatenate([weight.ravel() for weight in model.get_weights()])

        exact = train("float32", "sparse_categorical_crossentropy")
        ours = np.abs(train(policy, DRSLoss(lam=0)) - exact).max()
        theirs = np.abs(train(policy, "sparse_categorical_crossentropy") - exact).max()
        # Both are rounding errors, which differ between processors.
        assert ours <= 2 * theirs + 1e-5
        if BACKEND == "tensorflow":  # where the logits behind the rounded probabilities are found
            assert ours < 1e-3

    def test_uses_class_weights_as_keras(self):
        x, y = small_data()
        histories = []
        for loss in (DRSLoss(lam=0), "sparse_categorical_crossentropy"):
            model = small_model()
            model.compile(optimizer="sgd", loss=loss)
            history = model.fit(x, y, epochs=3, class_weight={0: 1, 1: 5, 2: 0, 3: 0.5}, shuffle=False, verbose=0)
            histories.append(history.history["loss"])
        np.testing.assert_allclose(*histories, rtol=1e-6)


class TestMasks:
    @pytest.mark.parametrize("labels", ["sparse", "outside"])
    def test_ignored_values_are_zero(self, labels):
        z, ids, one_hot = draw((4, 6, 5))
        ignored = ids == 2
        expected = reference.each(reference.drs_loss, one_hot, z)
        ids[ignored] = 255 if labels == "outside" else 2
        z[ignored] = np.nan
        got = values(drs_loss(ids, z, from_logits=True, ignore_class=255 if labels == "outside" else 2))
        assert np.all(got[ignored] == 0)
        np.testing.assert_allclose(got[~ignored], expected[~ignored], rtol=1e-5)

    @pytest.mark.parametrize("options", FIT_MODES)
    def test_ignored_positions_do_not_count_in_evaluate(self, options):
        x, y = small_data()
        y[::3] = -1
        model = small_model()
        metric = keras_drsl.SoftmaxDiversity(ignore_class=-1)
        model.compile(loss=DRSLoss(ignore_class=-1), metrics=[metric], **options)
        p = model.predict(x, verbose=0)[y >= 0].astype("float64")
        got = model.evaluate(x, y, batch_size=20, verbose=0, return_dict=True)
        np.testing.assert_allclose(got["loss"], expected_mean(y[y >= 0], p), rtol=1e-5)
        diversity = reference.each(reference.diversity, reference.one_hot(y[y >= 0], 4), np.log(p)).mean()
        np.testing.assert_allclose(got["softmax_diversity"], diversity, rtol=1e-4)

    def test_masked_label_distributions_may_be_nan(self):
        z, _, one_hot = draw((4, 6, 5))
        z[:, 4:] = 0.0
        expected = reference.each(reference.drs_loss, one_hot[:, :4], z[:, :4]).mean()
        one_hot[:, 4:] = np.nan
        got = DRSLoss(from_logits=True)(one_hot, keras.layers.Masking()(z))
        np.testing.assert_allclose(values(got), expected, rtol=1e-5)

    @pytest.mark.parametrize("ignore_class", [None, 1])
    def test_masks_pass_through_a_softmax(self, ignore_class):
        z, ids, _ = draw((4, 6, 5))
        z[:, 4:] = 0.0  # Masking masks steps of zeros
        outputs = keras.layers.Activation("softmax")(keras.layers.Masking()(z))
        ids[:, 4:] = 77
        kept = np.broadcast_to(np.arange(6) < 4, (4, 6)) & (ids != ignore_class)
        expected = reference.each(reference.drs_loss, reference.one_hot(ids[kept], 5), z[kept]).mean()
        np.testing.assert_allclose(values(DRSLoss(ignore_class=ignore_class)(ids, outputs)), expected, rtol=1e-5)

    @pytest.mark.parametrize(
        "policy", some_short(["float32", "mixed_bfloat16", "mixed_float16"], more=["mixed_float16"])
    )
    @pytest.mark.parametrize("eager", [True, False])
    def test_padding_labels_may_be_outside_the_classes(self, policy, eager):
        if policy != "float32" and keras.__version__.startswith("3.8."):
            pytest.skip("Keras 3.8 casts half-precision predictions, and loses their mask, before it calls the loss")
        ids = np.array([[1, 2, 3, 0], [2, 0, 0, 0]])
        labels = np.where(ids > 0, ids % 4, -1)
        model = keras.Sequential(
            [keras.layers.Embedding(5, 6, mask_zero=True), keras.layers.Dense(4, activation="softmax", dtype=policy)]
        )
        model.compile(loss=DRSLoss(), metrics=[keras_drsl.SoftmaxDiversity()], run_eagerly=eager, jit_compile=False)
        tolerance = 1e-4 if policy == "float32" else 5e-2
        kept = ids > 0
        p = model.predict(ids, verbose=0).astype("float64")[kept]
        got = model.evaluate(ids, labels, verbose=0, return_dict=True)
        np.testing.assert_allclose(got["loss"], expected_mean(labels[kept], p), rtol=tolerance)
        diversity = reference.each(reference.diversity, reference.one_hot(labels[kept], 4), np.log(p)).mean()
        np.testing.assert_allclose(got["softmax_diversity"], diversity, rtol=tolerance, atol=1e-4)

    @on_tensorflow
    def test_masks_of_another_rank_are_an_error(self):
        z, ids, _ = draw((4, 6, 5))
        logits = ops.convert_to_tensor(z)
        logits._keras_mask = ops.zeros((4,), "bool")
        with pytest.raises(ValueError, match=r"mask .*one value per position. Received: mask.shape=\(4,\)"):
            drs_loss(ids, logits, from_logits=True)


class TestInKeras:
    def test_fit_with_a_softmax_is_the_same_in_every_mode(self):
        x, y = small_data(18)
        results = []
        for options in FIT_MODES:
            model = small_model()
            model.compile(
                optimizer=keras.optimizers.SGD(0.1), loss=DRSLoss(), metrics=[keras_drsl.SoftmaxDiversity()], **options
            )
            history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
            results.append([*model.get_weights(), *map(np.array, history.values())])
        for other in results[1:]:
            for got, expected in zip(other, results[0], strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)

    def test_evaluate_includes_the_last_partial_batch(self):
        x, y = small_data(19)
        model = small_model()
        model.compile(loss=DRSLoss(lam=0.7))
        p = model.predict(x, verbose=0)
        expected = expected_mean(y, p, lam=0.7)
        np.testing.assert_allclose(model.evaluate(x, y, batch_size=8, verbose=0), expected, rtol=1e-5)
        np.testing.assert_allclose(values(DRSLoss(lam=0.7)(y, p)), expected, rtol=1e-5)

    def test_the_registered_function_is_a_loss(self):
        x, y = small_data()
        model = small_model()
        model.compile(loss=drs_loss)
        expected = expected_mean(y, model.predict(x, verbose=0))
        np.testing.assert_allclose(model.evaluate(x, y, verbose=0), expected, rtol=1e-5)
        assert keras.losses.deserialize(keras.losses.serialize(drs_loss)) is drs_loss

    @on_tensorflow
    def test_a_batch_of_unknown_size_is_traced_once(self):
        import tensorflow as tf

        traces = []

        @tf.function(input_signature=[tf.TensorSpec((None,), "int64"), tf.TensorSpec((None, 5))])
        def loss(y, z):
            traces.append(1)
            return drs_loss(y, z, from_logits=True)

        for count in (3, 7):
            z, ids, one_hot = draw((count, 5))
            np.testing.assert_allclose(loss(ids, z), reference.each(reference.drs_loss, one_hot, z), rtol=1e-5)
        assert len(traces) == 1

    @pytest.mark.more
    @on_tensorflow
    def test_two_replicas_train_the_same_weights_as_one(self):
        run_python(
            """
            import keras, numpy as np, tensorflow as tf, keras_drsl
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
            rng = np.random.default_rng(0)
            x, y = rng.normal(size=(24, 3)).astype("float32"), rng.integers(0, 80, 24)
            w = rng.random(24).astype("float32")

            one_device = tf.distribute.get_strategy()
            two_devices = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

            def train(strategy, classes, activation):
                with strategy.scope():
                    keras.utils.set_random_seed(0)
                    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(classes, activation)])
                    loss = keras_drsl.DRSLoss(from_logits=activation is None)
                    model.compile(optimizer=keras.optimizers.SGD(0.5), loss=loss)
                model.fit(x, y % classes, sample_weight=w, batch_size=8, epochs=2, shuffle=False, verbose=0)
                return model

            for head in ((4, "softmax"), (80, None)):
                one, two = train(one_device, *head), train(two_devices, *head)
                for weights, expected in zip(two.get_weights(), one.get_weights()):
                    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6)
                # The last batch holds a single sample: one of two replicas has none.
                last = two.fit(x[:9], y[:9] % head[0], batch_size=8, verbose=0).history["loss"]
                assert np.isfinite(last).all()
            """
        )

    def test_config_holds_the_arguments_of_its_own(self):
        options = {"lam": 0.7, "space": "softmax", "spread": "variance", "label_smoothing": 0.05}
        again = keras.losses.deserialize(keras.losses.serialize(DRSLoss(**options)))
        assert again.get_config() == DRSLoss(**options).get_config()
        assert again.get_config().items() >= options.items()


class TestBadInput:
    @pytest.mark.parametrize("lam", [-1, math.nan, math.inf, "0.3", None, True, [0.3], 1j])
    def test_lam_must_be_a_non_negative_number(self, lam):
        for make in (DRSLoss, lambda lam: drs_loss([0], [[0.5, 0.5]], lam)):
            with pytest.raises(ValueError, match=r"`lam` must be a non-negative number. Received: lam="):
                make(lam)

    @pytest.mark.parametrize("label_smoothing", [-0.1, 1, math.nan, "no"])
    def test_label_smoothing_must_be_in_its_range(self, label_smoothing):
        for make in (DRSLoss, lambda **options: drs_loss([0], [[0.5, 0.5]], **options)):
            with pytest.raises(
                ValueError, match=r"`label_smoothing` must be a number in \[0, 1\). Received: label_smoo"
            ):
                make(label_smoothing=label_smoothing)

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [("space", "logit", "'log_softmax', 'softmax'"), ("spread", None, "'sum_of_squares', 'variance'")],
    )
    def test_errors_name_the_choices(self, name, value, allowed):
        for make in (DRSLoss, lambda **options: drs_loss([0], [[0.5, 0.5]], **options)):
            with pytest.raises(ValueError, match=f"`{name}` must be one of {allowed}. Received: {name}={value!r}"):
                make(**{name: value})

    @pytest.mark.parametrize(
        ("y_shape", "z_shape"),
        [((3,), (4, 5)), ((4, 5, 1), (4, 5)), ((4, 3), (4, 5)), ((4, 5), (4, 6, 5, 3)), ((4, 5, 6), (4, 6, 5))],
    )
    def test_errors_name_shapes_that_cannot_match(self, y_shape, z_shape):
        received = rf"Received: y_true.shape=\({', '.join(map(str, y_shape))},?\), y_pred.shape=\({z_shape[0]}, "
        with pytest.raises(ValueError, match="`y_true` must hold one class id per position.*" + received):
            drs_loss(np.zeros(y_shape), np.zeros(z_shape), from_logits=True)

    def test_axis_must_be_an_axis_of_the_predictions(self):
        with pytest.raises(ValueError, match=r"`axis` must be an axis of `y_pred`.*axis=2"):
            drs_loss([0], [[0.5, 0.5]], axis=2)

    @pytest.mark.parametrize("label", [-1, 5, 1000, 1.5, math.nan])
    def test_errors_name_a_label_outside_the_classes(self, label):
        z, ids, _ = draw()
        y = ids.astype("float32")
        y[3] = label
        for loss in (DRSLoss(from_logits=True), lambda y, z: drs_loss(y, z, from_logits=True)):
            with pytest.raises(ValueError, match=rf"`y_true` must hold class ids in \[0, 5\).*Received: {label}"):
                loss(y, ops.convert_to_tensor(z))

    @pytest.mark.parametrize("label", [-1, 5, 1000, 1.5])
    def test_such_a_label_gives_nan_in_a_compiled_program(self, label):
        z, ids, _ = draw()
        y = ids.astype("float32")
        y[3] = label
        program = compiled(lambda y, z: drs_loss(y, z, from_logits=True))
        got = values(program(ops.convert_to_tensor(y), ops.convert_to_tensor(z)))
        assert np.array_equal(np.isnan(got), np.arange(6) == 3)
        grad = gradient(lambda z: program(ops.convert_to_tensor(y), z), z)
        assert np.array_equal(np.isnan(grad).any(axis=1), np.arange(6) == 3)

    @pytest.mark.parametrize(("dtype", "classes"), [("float16", 3000), ("bfloat16", 300)])
    def test_labels_of_too_small_a_dtype_are_an_error(self, dtype, classes):
        z, _, _ = draw((2, classes))
        rule = rf"represents all {classes} classes exactly. Received: y_true.dtype={dtype}"
        with pytest.raises(ValueError, match=rule):
            drs_loss(ops.cast([1, 2], dtype), z, from_logits=True)
        # The dtype of the loss does not change the labels.
        ids = np.array([classes - 1, classes - 2])
        got = DRSLoss(from_logits=True, dtype=dtype, reduction="sum")(ids, z / 100)
        expected = reference.each(reference.drs_loss, reference.one_hot(ids, classes), z / 100).sum()
        np.testing.assert_allclose(values(ops.cast(got, "float32")), expected, rtol=1e-2)

    def test_a_fraction_is_not_rounded_to_the_ignored_class(self):
        z, _, _ = draw((2, 5))
        with pytest.raises(ValueError, match=r"class ids in \[0, 5\).*Received: 1.5"):
            drs_loss(np.array([0, 1.5], "float32"), z, from_logits=True, ignore_class=1)

    @on_tensorflow
    @pytest.mark.parametrize("y_shape", [(6, 1), (5,)])
    def test_lengths_known_at_run_time_are_not_broadcast(self, y_shape):
        import tensorflow as tf

        z, _, _ = draw((6, 5))
        signature = [tf.TensorSpec([None] * len(y_shape)), tf.TensorSpec((None, 5))]
        loss = tf.function(lambda y, z: drs_loss(y, z, from_logits=True, label_smoothing=0.1), signature)
        with pytest.raises(tf.errors.InvalidArgumentError):
            loss(np.zeros(y_shape, "float32"), z)

    @on_tensorflow
    def test_from_logits_with_a_softmax_is_a_warning(self):
        z, ids, one_hot = draw()
        expected = reference.each(reference.drs_loss, one_hot, z)
        with pytest.warns(UserWarning, match="`from_logits=True`, but `y_pred` is the output of a softmax"):
            got = drs_loss(ids, ops.softmax(z), from_logits=True)
        np.testing.assert_allclose(values(got), expected, rtol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drs_loss(ids, ops.softmax(z))
