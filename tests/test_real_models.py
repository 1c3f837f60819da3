"""Image classifiers of `keras.applications` are evaluated, trained against attacks, saved and loaded as they are.

Their weights are random, and their labels the predictions: the code is that of pretrained models, without a download.
"""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import AdversarialTraining, evaluate_robustness, robustness_curve
from keras_drsl.attacks import PGD
from tests.backends import values

RADII = [2.0**-power for power in range(12, 0, -1)]
COUNT = 8


def mobile_net():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    return model, keras.applications.mobilenet_v2.preprocess_input


def efficient_net():
    # It has its preprocessing inside.
    return keras.applications.EfficientNetV2B0(input_shape=(32, 32, 3), weights=None, classes=10), None


def res_net():
    model = keras.applications.ResNet50(input_shape=(32, 32, 3), weights=None, classes=10)
    return model, keras.applications.resnet50.preprocess_input


def front_of(preprocessing):
    """Return a function that leaves its input as it is; some of those of Keras change an array in place."""
    return None if preprocessing is None else lambda x: preprocessing(ops.copy(x))


def settle(model, x):
    """Give batch normalizations the statistics of some inputs: with those that they begin with, outputs are equal."""
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(mobile_net, marks=pytest.mark.more),
        pytest.param(efficient_net, marks=pytest.mark.slow),
        pytest.param(res_net, marks=pytest.mark.slow),
    ],
)
def test_applications_are_evaluated_trained_saved_and_loaded(make, tmp_path):
    keras.utils.set_random_seed(0)
    model, preprocessing = make()
    front = front_of(preprocessing)
    x = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3)).astype("uint8")
    tensor = ops.convert_to_tensor(x.astype("float32"))
    seen = tensor if front is None else front(tensor)
    settle(model, seen)
    y = values(model(seen)).argmax(1)
    options = {
        "clip_max": 255,
        "attacks": [partial(PGD, loss="margin", steps=5)],
        "checks": [],
        "preprocessing": front,
        "verbose": 0,
    }
    curve = robustness_curve(model, x, y, eps=[0, *RADII], **options)
    assert curve.accuracy[0] == 1
    eps = next(radius for radius, accuracy in zip(curve.eps, curve.accuracy, strict=True) if accuracy <= 0.75)
    report = evaluate_robustness(model, x, y, eps=eps, **options)
    assert 0.25 <= report.robust_accuracy <= 0.75
    assert report.robust_accuracy <= report.robust_accuracy_8bit <= 1
    assert report.settings["outputs"] == "softmax"

    before = model.get_weights()
    robust = AdversarialTraining(model, eps, clip_max=255, steps=1, preprocessing=front)
    robust.compile("sgd", "sparse_categorical_crossentropy")
    history = robust.fit(x.astype("float32"), y, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert any(np.abs(new - old).max() > 0 for new, old in zip(model.get_weights(), before, strict=True))
    robust.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(values(again(seen)), values(model(seen)), rtol=1e-4, atol=1e-6)
