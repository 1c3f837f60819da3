"""Interval bounds, against corner points, random points and a float64 loop."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import layers

import keras_drsl
from keras_drsl.certificates import certify_interval, interval_bounds
from tests import reference
from tests.linear import distance, inputs, linear_model

RANDOM = {"kernel_initializer": "random_normal", "bias_initializer": "random_normal"}


def corners(lower, upper):
    """Return all corner points of a box, shape `(2^n, ...)`."""
    ends = np.stack([lower.ravel(), upper.ravel()], axis=1)
    return np.array(list(itertools.product(*ends)), "float32").reshape(-1, *lower.shape)


def box(shape, seed=0, width=0.5):
    random = np.random.default_rng(seed)
    lower = random.uniform(-1, 1, shape).astype("float32")
    return lower, lower + random.uniform(0, width, shape).astype("float32")


def of_layer(shape, *some, seed=0):
    """Return a model of a few layers and a Flatten, with random weights."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), *some, layers.Flatten()])
    for variable in model.variables:
        if "moving_variance" in variable.path or "variance" in variable.path:
            variable.assign(np.random.default_rng(1).uniform(0.5, 2, variable.shape))
        elif "seed" not in variable.path:
            variable.assign(np.random.default_rng(2).normal(0, 1, variable.shape))
    return model


# One layer on a box of at most ten numbers: its bounds are reached at corner points.
LAYERS = {
    "dense": ((6,), lambda: layers.Dense(4)),
    "dense relu": ((6,), lambda: layers.Dense(4, activation="relu")),
    "dense tanh": ((6,), lambda: layers.Dense(4, activation="tanh")),
    "conv1d": ((5, 2), lambda: layers.Conv1D(3, 2, strides=2)),
    "conv2d": ((3, 3, 1), lambda: layers.Conv2D(2, 2, padding="same", activation="relu")),
    "conv2d groups": ((2, 2, 2), lambda: layers.Conv2D(2, 2, groups=2)),
    "conv2d dilated": ((3, 3, 1), lambda: layers.Conv2D(2, 2, dilation_rate=2)),
    "conv3d": ((2, 2, 2, 1), lambda: layers.Conv3D(2, 2)),
    "depthwise": ((2, 2, 2), lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, padding="same")),
    "batch normalization": ((2, 2, 2), lambda: layers.BatchNormalization()),
    "rescaling": ((6,), lambda: layers.Rescaling(-2.0, offset=1.0)),
    "normalization": ((6,), lambda: layers.Normalization(mean=0.3, variance=2.0)),
    "relu": ((6,), lambda: layers.ReLU(max_value=0.5)),
    "leaky relu": ((6,), lambda: layers.LeakyReLU(negative_slope=0.2)),
    "elu": ((6,), lambda: layers.ELU()),
    "activation": ((6,), lambda: layers.Activation("sigmoid")),
    "max pooling": ((4, 2, 1), lambda: layers.MaxPooling2D(2)),
    "average pooling": ((4, 2, 1), lambda: layers.AveragePooling2D(2)),
    "max pooling 1d": ((4, 2), lambda: layers.MaxPooling1D(2)),
    "average pooling 1d": ((4, 2), lambda: layers.AveragePooling1D(2)),
    "global max": ((2, 2, 2), lambda: layers.GlobalMaxPooling2D()),
    "global average": ((2, 2, 2), lambda: layers.GlobalAveragePooling2D()),
    "reshape": ((6,), lambda: layers.Reshape((2, 3))),
    "permute": ((2, 3), lambda: layers.Permute((2, 1))),
    "padding": ((2, 2, 1), lambda: layers.ZeroPadding2D(1)),
    "cropping": ((3, 3, 1), lambda: layers.Cropping2D(1)),
    "dropout": ((6,), lambda: layers.Dropout(0.5)),
    "noise": ((6,), lambda: layers.GaussianNoise(0.5)),
    "repeat": ((3,), lambda: layers.RepeatVector(2)),
}


@pytest.mark.short
@pytest.mark.parametrize("name", LAYERS)
def test_bounds_of_one_layer_are_reached_at_corners(name):
    shape, make = LAYERS[name]
    model, (lower, upper) = of_layer(shape, make()), box(shape)
    outputs = model.predict(corners(lower, upper), verbose=0)
    low, high = interval_bounds(model, lower[None], upper[None])
    np.testing.assert_allclose(low[0], outputs.min(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(high[0], outputs.max(axis=0), rtol=1e-4, atol=1e-5)


def tiny_network():
    """Return a network of two branches with a softmax at its end."""
    keras.utils.set_random_seed(0)
    x = keras.Input((3, 3, 1))
    z = layers.Conv2D(4, 2, activation="relu", **RANDOM)(x)
    z = layers.BatchNormalization()(z)
    branches = [layers.Conv2D(4, 1, activation=name, **RANDOM)(z) for name in ("relu", "tanh")]
    z = layers.Concatenate()([layers.Add()(branches), z])
    z = layers.Dense(8, activation="relu", **RANDOM)(layers.Flatten()(layers.MaxPooling2D(2, strides=1)(z)))
    return keras.Model(x, layers.Dense(3, activation="softmax", **RANDOM)(z))


@pytest.mark.short
def test_all_points_of_a_box_lie_within_the_bounds():
    model, (lower, upper) = tiny_network(), box((3, 3, 1))
    random = np.random.default_rng(1).uniform(lower, upper, (10_000, 3, 3, 1)).astype("float32")
    logits = keras_drsl.models.find_logits(model, random[:4]).classifier.logits
    low, high = interval_bounds(model, lower[None], upper[None])
    for points in (corners(lower, upper), random):
        found = logits(points)
        # Both are logits, where a constant may be added to all of a row.
        for first, second in itertools.permutations(range(3), 2):
            assert (found[:, first] - found[:, second] <= high[:, first] - low[:, second] + 1e-4).all()
    assert (high >= low).all()


def test_a_network_equals_the_float64_loop():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 3, strides=2, padding="same", activation="relu", **RANDOM),
            layers.MaxPooling2D(2, strides=1),
            layers.Flatten(),
            layers.Dense(5, activation="relu", **RANDOM),
            layers.Dense(3, **RANDOM),
        ]
    )
    lower, upper = box((4, 4, 2))
    low, high = interval_bounds(model, lower[None], upper[None])
    conv, _, _, first, second = model.layers
    ends = reference.interval_conv(lower, upper, *conv.get_weights(), strides=2)
    ends = reference.interval_max_pool(*reference.rectified(*ends))
    ends = [np.ravel(end) for end in ends]
    ends = reference.rectified(*reference.interval_dense(*ends, *first.get_weights()))
    expected = reference.interval_dense(*ends, *second.get_weights())
    np.testing.assert_allclose([low[0], high[0]], expected, rtol=1e-5, atol=1e-6)


class Mine(layers.Dense):
    """A layer that may compute something else."""


def relu(x):
    """Compute something else under the name of an activation."""
    return x**2


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dense(4, activation="gelu"),
        lambda: layers.Dense(4, activation="softmax"),
        lambda: layers.Activation("swish"),
        lambda: layers.Activation(relu),
        lambda: layers.Activation(functools.partial(relu)),
        lambda: layers.Dense(4, activation=layers.Activation("silu")),
        lambda: layers.ELU(alpha=-1.0),
        lambda: keras.Sequential([keras.Input((4,)), layers.Dense(4)]),
        lambda: layers.LayerNormalization(),
        lambda: layers.UnitNormalization(),
        lambda: Mine(4),
        lambda: layers.Lambda(lambda x: -x),
    ],
)
def test_layers_without_bounds_are_refused(layer):
    model = keras.Sequential([keras.Input((4,)), layer(), layers.Dense(3)])
    with pytest.raises(ValueError, match=f"that have interval bounds. Received: layer '{model.layers[0].name}'"):
        interval_bounds(model, np.zeros((1, 4)), np.ones((1, 4)))


def test_causal_convolutions_are_refused():
    model = keras.Sequential([keras.Input((4, 1)), layers.Conv1D(2, 2, padding="causal"), layers.Flatten()])
    with pytest.raises(ValueError, match="Conv1D"):
        interval_bounds(model, np.zeros((1, 4, 1)), np.ones((1, 4, 1)))


def test_models_that_are_no_graph_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    class OwnSequential(keras.Sequential):
        def call(self, x):
            return -super().call(x)

    for model in (Own(), OwnSequential([keras.Input((4,)), layers.Dense(3)])):
        with pytest.raises(ValueError, match="Sequential or functional"):
            interval_bounds(model, np.zeros((1, 4)), np.ones((1, 4)))


def test_a_softmax_before_the_end_is_refused():
    softmax, x = layers.Softmax(), keras.Input((3,))
    model = keras.Model(x, softmax(layers.Dense(3)(softmax(x))))
    with pytest.raises(ValueError, match="Softmax"):
        interval_bounds(model, np.zeros((1, 3)), np.ones((1, 3)))


def test_compiled_models_have_bounds():
    model, x = linear_model(), np.full((1, 4), 0.5, "float32")
    model.compile("sgd", lambda y, z: z)
    np.testing.assert_allclose(interval_bounds(model, x, x)[0], model.predict(x, verbose=0), rtol=1e-5)


def test_limits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`upper` must be at least"):
        interval_bounds(linear_model(), np.ones((1, 4)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="shape of `lower`"):
        interval_bounds(linear_model(), np.ones((1, 4)), np.ones((2, 4)))
    for wrong in (np.ones((1, 5)), np.ones(4), np.ones((0, 4))):
        with pytest.raises(ValueError, match="`lower` must hold inputs of shape"):
            interval_bounds(linear_model(), wrong, wrong)
    with pytest.raises(ValueError, match="`batch_size`"):
        interval_bounds(linear_model(), np.ones((1, 4)), np.ones((1, 4)), batch_size=0)


def test_a_single_unit_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    with pytest.raises(ValueError, match="`model` must have a unit for each class"):
        certify_interval(model, np.zeros((1, 4), "float32"), [0])


def test_the_model_is_left_as_it_was():
    model, x = linear_model(), np.full((1, 4), 0.5, "float32")
    before = model.predict(x, verbose=0)
    interval_bounds(model, x, x)
    assert len(model.layers[0]._inbound_nodes) == 1
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


def test_new_weights_are_seen():
    model, x = linear_model(), np.full((1, 4), 0.5, "float32")
    interval_bounds(model, x, x)
    model.layers[0].set_weights([np.ones((4, 3)), np.zeros(3)])
    np.testing.assert_allclose(interval_bounds(model, x, x)[0], 2.0)


def test_radii_of_two_classes_are_exact():
    weights = np.array([[1.0, -1.0], [0.3, 0.8], [-0.4, 0.1], [0.2, 0.2]], "float32")
    # Of one layer the bound of a difference of two logits is wider than the exact one.
    model, (x, y) = linear_model(weights), inputs(40, weights)
    report = certify_interval(model, x, y)
    exact = distance(x, y, "inf", weights)
    loose = np.abs((x @ weights)[:, 0] - (x @ weights)[:, 1]) / np.abs(weights).sum()
    np.testing.assert_allclose(report.radii, loose, atol=1e-5)
    assert (report.radii <= exact + 1e-6).all()
    assert report.settings["norm"] == "inf"


@pytest.mark.more
def test_no_attack_succeeds_within_the_radii():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(16, activation="relu"), layers.Dense(3)])
    x, y = inputs(60)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=30, verbose=0)
    report = certify_interval(model, x, y)
    assert report.accuracy() > 0.2
    found = keras_drsl.minimal_distances(model, x, y, steps=20, verbose=0)
    assert (report.radii <= found.distances + 1e-5).all()
    assert "interval bounds" in str(report)


def test_a_mistake_has_no_radius():
    x, y = inputs(10)
    report = certify_interval(linear_model(), x, (y + 1) % 3)
    assert not report.radii.any()
