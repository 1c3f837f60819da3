"""A model trained without its logits ends with the weights that `fit` of the model computes."""

import keras
import numpy as np
import pytest

from keras_drsl import DRSLoss, PRSLoss, SoftmaxDiversity
from keras_drsl.training import LinearHeadTraining
from tests.backends import needs_xla, on_torch
from tests.helpers import some_short

VOCABULARY = 300
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

needs_reversible = pytest.mark.skipif(
    not hasattr(keras.layers, "ReversibleEmbedding"), reason="this Keras has no ReversibleEmbedding"
)


class Cosine(keras.layers.Dense):
    """A head that is not linear."""

    def call(self, inputs):
        return super().call(keras.ops.normalize(inputs))


class OwnLoss(DRSLoss):
    """A loss with another formula."""

    def values(self, inputs):
        return 2 * super().values(inputs)


def layers_of(head):
    """Return the layers of a model of tokens with one of several heads."""
    body = [keras.Input((5,)), keras.layers.Embedding(VOCABULARY, 8, mask_zero=head == "mask")]
    if head in ("tied", "untied", "tied mask"):
        options = {"tie_weights": head != "untied", "mask_zero": head == "tied mask"}
        embedding = keras.layers.ReversibleEmbedding(VOCABULARY, 8, **options)
        tokens = keras.Input((5,))
        hidden = keras.layers.Dense(8, "relu")(embedding(tokens))
        return keras.Model(tokens, embedding(hidden, reverse=True))
    hidden = keras.layers.Dense(16, "relu")
    if head == "softmax":
        return keras.Sequential([*body, hidden, keras.layers.Dense(VOCABULARY), keras.layers.Softmax()])
    if head == "twice":
        return keras.Sequential([*body, hidden, keras.layers.Dense(VOCABULARY, "softmax"), keras.layers.Softmax()])
    if head == "own":
        return keras.Sequential([*body, hidden, Cosine(VOCABULARY)])
    if head == "regularized":
        return keras.Sequential([*body, hidden, keras.layers.Dense(VOCABULARY, activity_regularizer="l2")])
    options = {"activation": "softmax" if head == "activation" else None, "use_bias": head != "no bias"}
    return keras.Sequential([*body, hidden, keras.layers.Dense(VOCABULARY, **options)])


def tokens(count=24):
    rng = np.random.default_rng(0)
    return rng.integers(0, VOCABULARY, (count, 5)), rng.integers(0, VOCABULARY, (count, 5))


def both(make, loss, **options):
    """Train a model as it is and without its logits; return both weights and logs."""
    x, y = tokens()
    fit = {"x": x, "y": y, "batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0} | options
    found = []
    for is_dense in (True, False):
        keras.utils.set_random_seed(0)
        model = trained = make()
        if is_dense:
            model.compile(keras.optimizers.SGD(0.5), loss)
        else:
            trained = LinearHeadTraining(model, loss, chunk_size=64)
            trained.compile(keras.optimizers.SGD(0.5))
        history = trained.fit(**fit).history
        found.append((model.get_weights(), history["loss"], trained.evaluate(x, y, verbose=0)))
    return found


def assert_equal(dense, linear):
    for expected, got in zip(dense[0], linear[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(linear[1], dense[1], rtol=1e-5)
    np.testing.assert_allclose(linear[2], dense[2], rtol=1e-5)


LOSSES = {
    "drs": DRSLoss(0.1, from_logits=True),
    "variance": DRSLoss(1.0, from_logits=True, spread="variance", label_smoothing=0.1, ignore_class=7),
    "prs": PRSLoss(1e-2, start=1, end=6, from_logits=True),
    "weighted": PRSLoss(1e-2, from_logits=True, ignore_class=7, reduction="mean_with_sample_weight"),
    "cross-entropy": CROSS_ENTROPY,
}


@pytest.mark.short
@needs_xla
@pytest.mark.parametrize("name", some_short(LOSSES, more=["variance", "weighted"]))
def test_each_loss_trains_the_weights_of_fit(name):
    assert_equal(*both(lambda: layers_of("logits"), LOSSES[name]))


@needs_xla
@pytest.mark.parametrize("name", some_short(["drs", "prs", "weighted", "cross-entropy"], more=["prs", "cross-entropy"]))
def test_sample_weights_count(name):
    weights = np.random.default_rng(1).random((24, 5)).astype("float32")
    weights[0] = 0
    assert_equal(*both(lambda: layers_of("logits"), LOSSES[name], sample_weight=weights))


@needs_xla
@pytest.mark.parametrize("head", ["no bias", "mask"])
@pytest.mark.parametrize("name", some_short(["drs", "prs"], more=["drs"]))
def test_each_head_of_logits_is_found(head, name):
    assert_equal(*both(lambda: layers_of(head), LOSSES[name]))


@needs_xla
@needs_reversible
@pytest.mark.short
@pytest.mark.parametrize("head", some_short(["tied", "untied", "tied mask"], more=["untied", "tied mask"]))
@pytest.mark.parametrize("name", ["drs", "prs"])
def test_an_embedding_that_is_also_the_head_is_trained(head, name):
    assert_equal(*both(lambda: layers_of(head), LOSSES[name]))


@needs_xla
@pytest.mark.parametrize("head", ["softmax", "activation"])
def test_the_logits_behind_a_softmax_are_used(head):
    x, y = tokens()
    weights = []
    for kind, loss in (("logits", DRSLoss(0.1, from_logits=True)), (head, DRSLoss(0.1))):
        keras.utils.set_random_seed(0)
        model = layers_of(kind)
        training = LinearHeadTraining(model, loss)
        training.compile(keras.optimizers.SGD(0.5))
        training.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for expected, got in zip(*weights, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@needs_xla
def test_mixed_precision_scales_the_loss_as_fit_does():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(50, 8), keras.layers.Dense(50)], name="half")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        half = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(50, 8), keras.layers.Dense(50)])
    finally:
        keras.config.set_dtype_policy("float32")
    for made, scaled in ((model, False), (half, True)):
        training = LinearHeadTraining(made, CROSS_ENTROPY)
        training.compile("sgd")
        assert isinstance(training.optimizer, keras.optimizers.LossScaleOptimizer) == scaled


@needs_xla
def test_saves_the_plain_model(tmp_path):
    training = LinearHeadTraining(layers_of("logits"), CROSS_ENTROPY)
    training.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, _ = tokens(2)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), training.model.predict(x, verbose=0))
    assert training.predict(x, verbose=0).shape == (2, 5, 16)


@needs_xla
@pytest.mark.parametrize(
    ("make", "loss", "message"),
    [
        (lambda: layers_of("logits"), "mean_squared_error", "`loss` must be a DRSLoss, a PRSLoss or Keras's"),
        (lambda: layers_of("logits"), DRSLoss(), "`model` returns logits: `from_logits=True` in `loss`"),
        (lambda: layers_of("softmax"), CROSS_ENTROPY, "`model` returns probabilities, so `from_logits` must be False"),
        (lambda: layers_of("logits"), DRSLoss(space="softmax", from_logits=True), "`loss` must measure the spread in"),
        (lambda: layers_of("logits"), PRSLoss(end=300, from_logits=True), "`end` of the loss must be at most .* 299"),
        (
            lambda: keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "relu")]),
            CROSS_ENTROPY,
            "`model` must end in a Dense layer .* Received: a model that ends in Dense",
        ),
        (
            lambda: keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dropout(0.1)]),
            CROSS_ENTROPY,
            "Received: a model that ends in Dropout",
        ),
        (lambda: keras.Sequential([keras.layers.Dense(4)]), CROSS_ENTROPY, "`model` must be a functional model"),
        (lambda: layers_of("twice"), DRSLoss(), "`model` must end in a Dense layer"),
        (lambda: layers_of("own"), CROSS_ENTROPY, "Received: a model that ends in Cosine"),
        (lambda: layers_of("regularized"), CROSS_ENTROPY, "nor have an activity regularizer"),
        (lambda: layers_of("logits"), OwnLoss(from_logits=True), "`loss` must be a DRSLoss, a PRSLoss or Keras's"),
        (lambda: "model", CROSS_ENTROPY, "`model` must be a functional model.* Received: str"),
    ],
)
def test_refuses_other_models_and_losses(make, loss, message):
    with pytest.raises(ValueError, match=message):
        LinearHeadTraining(make(), loss)


@needs_xla
def test_refuses_a_loss_and_metrics_in_compile():
    training = LinearHeadTraining(layers_of("logits"), CROSS_ENTROPY)
    with pytest.raises(ValueError, match="`loss` must be given to LinearHeadTraining itself"):
        training.compile("adam", DRSLoss(from_logits=True))
    with pytest.raises(ValueError, match="`metrics` need the logits"):
        training.compile("adam", metrics=["accuracy"])
    with pytest.raises(ValueError, match="`weighted_metrics` need the logits"):
        training.compile("adam", weighted_metrics=[SoftmaxDiversity(from_logits=True)])
    with pytest.raises(ValueError, match="`chunk_size` must be an integer"):
        LinearHeadTraining(layers_of("logits"), CROSS_ENTROPY, chunk_size=0)


@on_torch
def test_torch_is_refused():
    with pytest.raises(RuntimeError, match="`LinearHeadTraining` needs TensorFlow or JAX"):
        LinearHeadTraining(layers_of("logits"), CROSS_ENTROPY)


@needs_xla
@pytest.mark.slow
def test_gpt2_trains_as_with_its_logits():
    hub = pytest.importorskip("keras_hub")

    def make():
        sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "max_sequence_length": 8}
        backbone = hub.models.GPT2Backbone(vocabulary_size=VOCABULARY, dropout=0.0, **sizes)
        return hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)

    x, y = tokens()
    inputs = {"token_ids": x, "padding_mask": np.ones_like(x)}
    weights = []
    for is_dense in (True, False):
        keras.utils.set_random_seed(0)
        model = trained = make()
        if is_dense:
            model.compile(keras.optimizers.SGD(0.5), DRSLoss(0.1, from_logits=True))
        else:
            trained = LinearHeadTraining(model, DRSLoss(0.1, from_logits=True), chunk_size=64)
            trained.compile(keras.optimizers.SGD(0.5))
        trained.fit(inputs, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for expected, got in zip(*weights, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
