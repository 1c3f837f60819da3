"""The density of features, and the probabilities that it scales."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl.density import DensitySoftmax, RealNVP
from tests.backends import values
from tests.linear import inputs


def random_flow(size=3, couplings=3):
    """Return a flow with random weights."""
    flow, random = RealNVP(size, couplings=couplings, width=5), np.random.default_rng(0)
    flow.adapt(random.normal(1, [0.5, 2, 1][:size], (500, size)))
    for variable in flow.trainable_variables:
        variable.assign(random.normal(0, 0.5, variable.shape))
    return flow


def mapped(flow, h):
    """Compute what the flow maps a vector to, in float64, by loops over the layers."""
    mean, deviation = (values(variable).astype("float64") for variable in (flow._mean, flow._deviation))
    z = (h - mean) / deviation
    for network in flow._networks:
        (first, first_bias), (second, second_bias) = (
            [values(weight).astype("float64") for weight in layer.weights] for layer in network.layers
        )
        size = first.shape[0]
        a, b = z[:size], z[size:]
        out = np.tanh(a @ first + first_bias) @ second + second_bias
        scale, shift = np.split(out, 2)
        z = np.concatenate([b * np.exp(2 * np.tanh(scale / 2)) + shift, a])
    return z


@pytest.mark.short
@pytest.mark.parametrize("size", [2, 3])
def test_the_density_is_that_of_a_change_of_variables(size):
    flow = random_flow(size)
    points = np.random.default_rng(1).normal(1, 1, (5, size))
    expected = []
    for h in points:
        jacobian = np.stack([(mapped(flow, h + step) - mapped(flow, h - step)) / 2e-5 for step in 1e-5 * np.eye(size)])
        z = mapped(flow, h)
        expected.append(np.linalg.slogdet(jacobian)[1] - z @ z / 2 - size / 2 * np.log(2 * np.pi))
    np.testing.assert_allclose(values(flow(points.astype("float32"))), expected, rtol=1e-4, atol=1e-4)


def test_the_density_has_the_integral_1():
    flow = random_flow(2)
    axis = np.linspace(-25, 25, 801)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype("float32")
    log_density = flow.predict(grid, batch_size=10_000, verbose=0)
    assert np.exp(log_density).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1.0, abs=0.02)


@pytest.mark.more
def test_a_fitted_flow_comes_near_the_entropy():
    random = np.random.default_rng(0)
    # A ring, which one normal distribution does not fit.
    angle, radius = random.uniform(0, 2 * np.pi, 2_000), random.normal(3, 0.3, 2_000)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype("float32")
    keras.utils.set_random_seed(0)
    flow = RealNVP(2)
    flow.adapt(x)
    normal = -values(flow(x)).mean()
    flow.compile(keras.optimizers.Adam(0.02), RealNVP.loss)
    flow.fit(x, np.zeros(len(x)), epochs=20, batch_size=200, verbose=0)
    fitted = -values(flow(x)).mean()
    entropy = np.log(2 * np.pi) + np.log(3) + 0.5 * np.log(2 * np.pi * np.e * 0.09)  # about, of a thin ring
    assert entropy - 0.05 < fitted < normal - 0.2


@pytest.mark.parametrize("options", [{"size": 1}, {"size": 2, "couplings": 0}, {"size": 2, "width": 0.5}])
def test_bad_arguments_of_a_flow_are_refused(options):
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}` must be an integer"):
        RealNVP(**options)


def classifier(activation="softmax"):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, activation="relu"), layers.Dense(3, activation=activation)]
    )


@pytest.fixture(scope="module")
def fitted():
    x, y = inputs(200)
    careful = DensitySoftmax(classifier())
    careful.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    histories = careful.fit(x, y, epochs=30, density_epochs=10, head_epochs=2, verbose=0)
    return careful, histories, x, y


def test_three_stages_are_trained(fitted):
    _, histories, _, _ = fitted
    assert {name: len(history.epoch) for name, history in histories.items()} == {"model": 30, "density": 10, "head": 2}
    losses = histories["density"].history["loss"]
    assert losses[-1] < losses[0]
    assert histories["model"].history["loss"][-1] < 0.7 * histories["model"].history["loss"][0]


def test_predictions_are_those_of_the_model(fitted):
    careful, _, x, _ = fitted
    far = np.random.default_rng(0).normal(0, 5, (500, 4)).astype("float32")
    for points in (x, far):
        plain = careful.model.predict(points, verbose=0)
        np.testing.assert_array_equal(careful.predict(points, verbose=0).argmax(1), plain.argmax(1))


def test_the_scale_falls_away_from_the_data(fitted):
    careful, _, x, _ = fitted
    near = values(careful.scale(careful.features(x)))[:, 0]
    assert near.max() == pytest.approx(1.0, abs=1e-4)
    assert near.min() == pytest.approx(np.exp(-1), abs=1e-4)
    far = values(careful.scale(careful.features(x + 10)))[:, 0]
    assert far.max() < 0.1
    logits = values(ops.matmul(careful.features(x), careful.head.kernel) + careful.head.bias)
    expected = values(ops.softmax(near[:, None] * logits))
    np.testing.assert_allclose(careful.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.more
def test_the_penalty_moves_features_towards_one_to_one():
    x, y = inputs(200)
    ratios = []
    for lipschitz in (0.0, 10.0):
        careful = DensitySoftmax(classifier(), lipschitz=lipschitz)
        careful.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
        careful.fit(x, y, epochs=15, density_epochs=0, head_epochs=0, verbose=0)
        delta = 0.01 * np.random.default_rng(1).normal(size=x.shape).astype("float32")
        moved = values(careful.features(x + delta)) - values(careful.features(x))
        ratios.append(np.linalg.norm(moved, axis=1) / np.linalg.norm(delta, axis=1))
    assert np.abs(ratios[1] - 1).mean() < 0.5 * np.abs(ratios[0] - 1).mean()


def test_it_is_saved(fitted, tmp_path):
    careful, _, x, _ = fitted
    careful.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), careful.predict(x, verbose=0), atol=1e-6)


def test_it_is_as_robust_as_the_model(fitted):
    """The scale changes no prediction: an evaluator that it misleads would find it more robust."""
    careful, _, x, y = fitted
    options = {"eps": 0.05, "attacks": ["apgd_ce", "apgd_t_margin"], "checks": [], "verbose": 0, "max_samples": 60}
    plain = keras_drsl.evaluate_robustness(careful.model, x, y, **options)
    scaled = keras_drsl.evaluate_robustness(careful, x, y, **options)
    assert 0.1 < plain.robust_accuracy < 0.95
    assert [name is None for name in scaled.per_example["broken_by"]] == [
        name is None for name in plain.per_example["broken_by"]
    ]


@pytest.mark.more
def test_logits_are_scaled_too():
    x, y = inputs(60)
    careful = DensitySoftmax(classifier("linear"))
    careful.compile("adam", keras_drsl.DRSLoss(0.1, from_logits=True))
    np.testing.assert_allclose(careful.predict(x, verbose=0), careful.model.predict(x, verbose=0), rtol=1e-5)
    careful.fit(x, y, epochs=1, density_epochs=1, head_epochs=1, verbose=0)
    ratio = careful.predict(x, verbose=0) / careful.model.predict(x, verbose=0)
    np.testing.assert_allclose(ratio, values(careful.scale(careful.features(x))) * np.ones((1, 3)), rtol=1e-3)


def negated():
    x = keras.Input((4,))
    return keras.Model(x, -layers.Dense(3)(x))


def two_outputs():
    x = keras.Input((4,))
    return keras.Model(x, [layers.Dense(3)(x), layers.Dense(3)(x)])


def test_dropout_is_equal_on_both_sides_of_the_penalty():
    x, y = inputs(60)
    losses = []
    for lipschitz in (0.0, 0.01):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(8), layers.Dropout(0.5, seed=0), layers.Dense(3, activation="softmax")]
        )
        careful = DensitySoftmax(model, lipschitz=lipschitz)
        careful.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
        losses += careful.fit(x, y, epochs=1, density_epochs=0, head_epochs=0, verbose=0)["model"].history["loss"]
    # Of different masks, the change over a distance of 0.01 would be in the hundreds, and its square counts.
    assert losses[1] - losses[0] < 1


def test_images_of_bytes_are_taken():
    x, y = inputs(40)
    careful = DensitySoftmax(classifier())
    careful.compile("adam", "sparse_categorical_crossentropy")
    careful.fit((255 * x).astype("uint8"), y, epochs=1, density_epochs=1, head_epochs=1, verbose=0)


@pytest.mark.parametrize("name", ["epochs", "density_epochs", "head_epochs", "batch_size"])
def test_bad_numbers_of_a_fit_are_refused(name):
    careful = DensitySoftmax(classifier())
    careful.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
        careful.fit(*inputs(10), **{name: -1})


def test_models_of_another_end_are_refused():
    for model in (
        keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="sigmoid")]),
        keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Softmax()]),
        keras.Sequential([keras.Input((4,)), layers.Dense(1), layers.Dense(3)]),
        negated(),
        two_outputs(),
    ):
        with pytest.raises(ValueError, match="ends in a Dense layer"):
            DensitySoftmax(model)
    with pytest.raises(ValueError, match="`lipschitz` must be a non-negative"):
        DensitySoftmax(classifier(), lipschitz=-1)
    with pytest.raises(ValueError, match="Call `compile`"):
        DensitySoftmax(classifier()).fit(*inputs(10))
