"""Models of keras-hub, made from small configurations, are fitted to a small task, attacked, trained and saved."""

import keras
import numpy as np
import pytest

import keras_drsl
from keras_drsl import AdversarialTraining, evaluate_robustness, robustness_curve
from tests.backends import values
from tests.test_real_models import settle

pytestmark = pytest.mark.slow
COUNT = 300


def hub():
    return pytest.importorskip("keras_hub")


def bert():
    """Return a classifier of texts, inputs and labels: are most words of the second half of the vocabulary?"""
    rng = np.random.default_rng(0)
    backbone = hub().models.BertBackbone(
        vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32, max_sequence_length=8
    )
    length = rng.integers(4, 9, COUNT)
    mask = np.arange(8) < length[:, None]
    tokens = rng.integers(3, 30, (COUNT, 8)) * mask
    x = {"token_ids": tokens, "padding_mask": mask.astype("int32"), "segment_ids": np.zeros((COUNT, 8), "int32")}
    return hub().models.BertTextClassifier(backbone, num_classes=2), x, ((tokens >= 15).sum(1) > length / 2) * 1


def gpt2():
    """Return a language model, inputs and next tokens: each sequence counts in steps of its own."""
    rng = np.random.default_rng(0)
    backbone = hub().models.GPT2Backbone(
        vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32, max_sequence_length=8
    )
    steps = rng.integers(1, 4, (COUNT, 1)) * np.arange(9)
    tokens = (rng.integers(0, 20, (COUNT, 1)) + steps) % 20
    y = tokens[:, 1:].copy()
    y[:, 0] = -1  # the step is not known yet
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((COUNT, 8), "int32")}
    return hub().models.GPT2CausalLM(backbone), x, y


def paligemma():
    """Return a vision-language model, inputs and next tokens: the brightest channel, named twice."""
    rng = np.random.default_rng(0)
    backbone = hub().models.PaliGemmaBackbone(
        vocabulary_size=12,
        image_size=8,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        head_dim=8,
        vit_patch_size=4,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_num_layers=1,
        vit_intermediate_dim=32,
    )
    images = rng.random((COUNT, 8, 8, 3)).astype("float32")
    channel = rng.integers(0, 3, COUNT)
    images[np.arange(COUNT), :, :, channel] = 0.5 + images[np.arange(COUNT), :, :, channel] / 2
    words = np.stack([np.ones(COUNT), 3 + channel, 7 + channel, np.full(COUNT, 2)], 1).astype("int32")
    x = {"images": images, "token_ids": words[:, :-1], "padding_mask": np.ones((COUNT, 3), "int32")}
    x["response_mask"] = np.broadcast_to(np.arange(3) > 0, (COUNT, 3)).astype("int32")
    return hub().models.PaliGemmaCausalLM(preprocessor=None, backbone=backbone), x, words[:, 1:]


CASES = {
    "bert": (bert, "token_embedding", "multiclass", {"clip_min": -3, "clip_max": 3}),
    "gpt2": (gpt2, "embeddings", "positions", {"clip_min": -3, "clip_max": 3}),
    "paligemma": (paligemma, "images", "positions", {}),
}
# A task of two classes has no diversity, and no tokens that PRSLoss could compare.
LOSSES = [("bert", "DRSLoss"), *((name, loss) for name in ("gpt2", "paligemma") for loss in ("DRSLoss", "PRSLoss"))]


@pytest.mark.filterwarnings("ignore:With two classes")
@pytest.mark.parametrize(("name", "loss"), LOSSES)
def test_a_fitted_model_is_attacked_trained_saved_and_loaded(name, loss, tmp_path):
    keras.utils.set_random_seed(0)
    make, attack_input, task, limits = CASES[name]
    model, x, y = make()
    options = {"from_logits": True} | ({"ignore_class": -1} if task == "positions" else {})
    lam = {"DRSLoss": 0.01, "PRSLoss": 1e-5}[loss]
    model.compile(keras.optimizers.Adam(5e-3), getattr(keras_drsl, loss)(lam, **options))
    model.fit(x, y, epochs=80, batch_size=32, verbose=0)
    predicted = values(model.predict(x, verbose=0)).argmax(-1)
    assert (predicted == y)[y >= 0].mean() >= 0.9

    few = {key: value[:24] for key, value in x.items()}
    common = {"attack_input": attack_input, "task": task, "suite": "quick", "checks": [], "verbose": 0} | limits
    radii = [2.0**-power for power in range(8, 0, -1)]
    curve = robustness_curve(model, few, y[:24], eps=[0, *radii], **common)
    assert curve.accuracy[0] >= 0.9
    eps = next(radius for radius, accuracy in zip(curve.eps, curve.accuracy, strict=True) if accuracy <= 0.75)
    report = evaluate_robustness(model, few, y[:24], eps=eps, **common)
    assert 0.25 <= report.robust_accuracy <= 0.75
    assert report.settings["attack_input"] == attack_input

    robust = AdversarialTraining(model, eps / 4, steps=2, attack_input=attack_input, task=task, **limits)
    robust.compile(keras.optimizers.Adam(1e-3), getattr(keras_drsl, loss)(lam, **options))
    history = robust.fit(x, y, batch_size=64, verbose=0).history
    assert history["clean_accuracy"][0] >= 0.8
    assert history["attack_strength"][0] > 0
    robust.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(values(again.predict(few, verbose=0)), values(model.predict(few, verbose=0)), atol=1e-4)


def test_an_image_classifier_is_evaluated_through_its_preprocessor():
    keras.utils.set_random_seed(0)
    backbone = hub().models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    converter = hub().layers.ResNetImageConverter(image_size=(16, 16), scale=1 / 255)
    preprocessor = hub().models.ResNetImageClassifierPreprocessor(image_converter=converter)
    model = hub().models.ImageClassifier(backbone, num_classes=3, preprocessor=preprocessor)
    x = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype("float32")
    settle(model, converter(x))
    y = model.predict(x, verbose=0).argmax(-1)
    options = {"clip_max": 255, "suite": "quick", "checks": [], "preprocessing": converter, "verbose": 0}
    curve = robustness_curve(model, x, y, eps=[0, *(2.0**-power for power in range(6, -5, -1))], **options)
    assert curve.accuracy[0] == 1
    eps = next(radius for radius, accuracy in zip(curve.eps, curve.accuracy, strict=True) if accuracy <= 0.75)
    assert 0.25 <= evaluate_robustness(model, x, y, eps=eps, **options).robust_accuracy <= 0.75
