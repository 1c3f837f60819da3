"""Models with several inputs, and embeddings, get the verdict that a linear model has in closed form."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, evaluate_robustness, robustness_curve
from keras_drsl.attacks import APGD, PGD, Noise, Square
from keras_drsl.models.inputs import Inputs, Layout, Part
from tests.backends import values
from tests.helpers import some_short

EPS = 0.1
IMAGE, TEXT, GATE = np.array([1.0, -0.8, 0.5, 0.2]), np.array([0.3, -0.2, 0.1]), np.array([0.4])


class Gate(layers.Layer):
    """Turns a flag into a number."""

    def call(self, x):
        return ops.cast(x, "float32")


def make_model(structure="dict", head=None):
    """Return a model of an image, integers and a flag, linear in each."""
    image = keras.Input((4,), name="image")
    text = keras.Input((3,), dtype="int32", name="text")
    flag = keras.Input((1,), dtype="bool", name="flag")
    unit = layers.Dense(1, head)
    outputs = unit(layers.Concatenate()([image, Gate()(text), Gate()(flag)]))
    inputs = {"image": image, "text": text, "flag": flag}
    model = keras.Model(inputs if structure == "dict" else list(inputs.values()), outputs)
    weights = np.concatenate([IMAGE, TEXT, GATE])
    unit.set_weights([weights[:, None], np.array([-0.5 * IMAGE.sum() - 0.3])])
    return model


# An evaluation leaves a model as it is, and the programs that were compiled for it serve the next one.
shared_model = functools.cache(make_model)


def make_data(count=80):
    """Return inputs, labels, and the margins of the logit."""
    rng = np.random.default_rng(0)
    x = {
        "image": rng.uniform(0.25, 0.75, (count, 4)).astype("float32"),
        "text": rng.integers(0, 3, (count, 3)).astype("int64"),
        "flag": rng.random((count, 1)) < 0.5,
    }
    z = (x["image"] - 0.5) @ IMAGE + x["text"] @ TEXT + x["flag"] @ GATE - 0.3
    return x, (z > 0).astype("int32"), np.abs(z)


def size(margin, norm="inf"):
    return margin / (np.abs(IMAGE).sum() if norm == "inf" else np.sqrt((IMAGE**2).sum()))


def assert_exact(report, smallest, eps=EPS):
    robust = np.array([broken is None for broken in report.per_example["broken_by"]])
    clear = np.abs(smallest - eps) > 1e-3
    assert 0.1 < robust.mean() < 0.9
    np.testing.assert_array_equal(robust[clear], (smallest > eps)[clear])


ATTACKS = [APGD(EPS, loss="margin", targeted=True, steps=10)]


@pytest.mark.parametrize("head", some_short([None, "sigmoid"], more=["sigmoid"]))
@pytest.mark.parametrize("structure", some_short(["dict", "list", "position"], "dict", more=["list", "position"]))
def test_the_input_that_is_named_is_attacked_and_the_others_stay(structure, head):
    x, y, margin = make_data()
    given = x if structure == "dict" else list(x.values())
    report = evaluate_robustness(
        shared_model(structure, head),
        given,
        y,
        eps=EPS,
        attacks=ATTACKS,
        attack_input=0 if structure == "position" else "image",
        verbose=0,
    )
    assert report.clean_accuracy == 1
    assert_exact(report, size(margin))
    assert report.trustworthy
    assert report.settings["attack_input"] == (0 if structure == "position" else "image")
    assert "mask" not in report.settings
    assert report.attacks[0]["settings"] == ATTACKS[0].settings


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=["inf"]))
def test_the_suite_is_exact_in_both_norms(norm):
    x, y, margin = make_data(40)
    eps = EPS if norm == "inf" else 2 * EPS
    report = evaluate_robustness(shared_model(), x, y, eps=eps, norm=norm, attack_input="image", verbose=0)
    assert_exact(report, size(margin, norm), eps)
    assert report.trustworthy
    # The fixed inputs are enough to tell some classes, whatever the image.
    unbounded = next(check for check in report.checks if check.name == "unbounded")
    fixed = np.abs(make_data(40)[0]["text"] @ TEXT + make_data(40)[0]["flag"] @ GATE - 0.3) > 0.5 * np.abs(IMAGE).sum()
    assert unbounded.status == ("warn" if fixed.any() else "pass")


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=["inf"]))
def test_attacks_without_gradients_spend_nothing_on_what_stays(norm):
    x, y, margin = make_data()
    eps = EPS if norm == "inf" else 2 * EPS
    for attack in (Square(eps, norm=norm, queries=1500), Noise(eps, norm=norm, points=300)):
        report = evaluate_robustness(
            shared_model(), x, y, eps=eps, norm=norm, attacks=[attack], checks=[], attack_input="image", verbose=0
        )
        robust = np.array([broken is None for broken in report.per_example["broken_by"]])
        smallest = size(margin, norm)
        assert robust[smallest > eps].all()
        # In L2, on inputs of four features, Square is as weak without the others.
        share = 0.5 if attack.name == "noise" else 0.9 if norm == "inf" else 0.75
        assert not robust[smallest < share * eps].any(), attack.name


def test_limits_eps_and_mask_are_those_of_the_attacked_input():
    x, y, margin = make_data()
    scale = np.array([1.0, 2.0, 4.0, 1.0])
    x["image"] = (x["image"] * scale).astype("float32")
    model = make_model()
    model.layers[-1].kernel.assign(np.concatenate([IMAGE / scale, TEXT, GATE])[:, None])
    eps = EPS * scale
    mask = [False, False, False, True]
    report = evaluate_robustness(
        model,
        x,
        y,
        eps=eps,
        clip_min=[-1.0, 0, 0, 0],
        clip_max=scale,
        mask=mask,
        suite="quick",
        attack_input="image",
        verbose=0,
    )
    assert_exact(report, margin / np.abs(IMAGE)[:3].sum())
    assert report.settings["eps"] == eps.tolist()
    assert report.settings["mask"] == mask
    with pytest.raises(ValueError, match=r"`eps` must be one number or fit inputs of shape \(4,\)"):
        evaluate_robustness(model, x, y, eps=[0.1, 0.1], attack_input="image", verbose=0)


def batches(x, y, form):
    parts = [slice(start, start + 32) for start in range(0, len(y), 32)]
    for part in parts:
        inputs = {name: value[part] for name, value in x.items()}
        yield (inputs, y[part]) if form == "pairs" else inputs | {"label": y[part]}


@pytest.mark.parametrize("form", some_short(["pairs", "columns"], more=["columns"]))
def test_a_data_set_of_dictionaries_is_read(form):
    x, y, margin = make_data()
    data = batches(x, y, form)
    options = {"eps": EPS, "attacks": ATTACKS, "checks": [], "attack_input": "image", "verbose": 0}
    report = evaluate_robustness(shared_model(), data, **options)
    assert_exact(report, size(margin))
    arrays = evaluate_robustness(shared_model(), x, y, **options)
    assert report.per_example == arrays.per_example
    assert report.provenance["data"] == arrays.provenance["data"]


def test_shards_merge_and_a_pool_and_an_undefended_model_take_the_same_inputs(tmp_path):
    x, y, margin = make_data()
    options = {"eps": EPS, "attacks": ATTACKS, "attack_input": "image", "checks": ["transfer"], "verbose": 0}
    options |= {"undefended": make_model(), "x_pool": (x, y)}
    whole = evaluate_robustness(shared_model(), x, y, **options)
    parts = [evaluate_robustness(shared_model(), x, y, shard=(i, 2), **options) for i in range(2)]
    assert keras_drsl.RobustnessReport.merge(parts).per_example == whole.per_example
    assert_exact(whole, size(margin))
    whole.to_json(tmp_path / "report.json")
    read = keras_drsl.RobustnessReport.from_json(tmp_path / "report.json")
    assert read.settings["attack_input"] == "image"


def test_a_curve_and_a_monitor_attack_the_same_input():
    x, y, margin = make_data()
    curve = robustness_curve(
        shared_model(), x, y, eps=[0.05, EPS], suite="quick", checks=[], attack_input="image", verbose=0
    )
    for eps, accuracy in zip(curve.eps, curve.accuracy, strict=True):
        assert accuracy == pytest.approx((size(margin) > eps).mean(), abs=0.02)
    monitor = RobustnessMonitor(x, y, eps=EPS, attack_input="image")
    model = make_model()
    model.compile(keras.optimizers.SGD(0.0), keras.losses.BinaryCrossentropy(from_logits=True))
    model.fit(x, y, callbacks=[monitor], verbose=0)
    assert_exact(monitor.report, size(margin))


@pytest.mark.parametrize("structure", some_short(["dict", "list"], more=["list"]))
@pytest.mark.parametrize("method", some_short(["pgd", "trades", "consistency"], more=["trades", "consistency"]))
def test_a_training_attacks_the_same_input(structure, method):
    keras.utils.set_random_seed(0)
    x, y, _ = make_data()
    given = x if structure == "dict" else list(x.values())
    model = make_model(structure, "sigmoid")
    robust = AdversarialTraining(model, EPS, method=method, steps=10, attack_input="image")
    robust.compile(keras.optimizers.SGD(0.0), "binary_crossentropy", metrics=["accuracy"])
    history = robust.fit(given, y, verbose=0).history
    assert history["clean_accuracy"] == [1]
    attacked = robust._attack_batch(keras.tree.map_structure(ops.convert_to_tensor, given), ops.convert_to_tensor(y))
    moved = values(attacked.adversarial).astype("float64") - values(robust._inputs.pack_tensors(given))
    assert not moved[:, 4:].any()
    if method == "pgd":
        np.testing.assert_allclose(np.abs(moved[:, :4]), EPS, atol=1e-5)
        expected = (make_data()[2] > EPS * np.abs(IMAGE).sum()).mean()
        assert history["accuracy"] == [pytest.approx(expected, abs=0.02)]
    np.testing.assert_allclose(values(robust(given)), values(robust.model(given)), atol=1e-6)


def text_model(pooling="mean", layer_name="words", vocabulary=20, head="softmax"):
    """Return a classifier of token ids, linear in the embeddings that a mask leaves."""
    tokens = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(vocabulary, 3, mask_zero=pooling == "masked", name=layer_name)(tokens)
    pooled = layers.GlobalAveragePooling1D()(embedded)
    return keras.Model(tokens, layers.Dense(2, head)(pooled))


def text_data(model, count=60):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (count, 6))
    tokens[:, 4:] *= rng.integers(0, 2, (count, 2))
    return tokens, values(model(tokens)).argmax(1)


@pytest.mark.parametrize("attack_input", some_short(["embeddings", "words"], more=["words"]))
@pytest.mark.parametrize("pooling", some_short(["mean", "masked"], "masked", more=["mean"]))
def test_embeddings_get_the_exact_verdict(pooling, attack_input):
    keras.utils.set_random_seed(1)
    model = text_model(pooling)
    tokens, y = text_data(model)
    table, kernel, bias = (values(weight) for weight in model.weights)
    direction = (kernel[:, 1] - kernel[:, 0]).astype("float64")
    used = (tokens > 0) if pooling == "masked" else np.ones_like(tokens, bool)
    mean = (table[tokens] * used[..., None]).sum(1) / used.sum(1, keepdims=True)
    # Each embedding may move by eps, so their mean may.
    smallest = np.abs(mean @ direction + bias[1] - bias[0]) / np.abs(direction).sum()
    eps = float(np.median(smallest))
    limits = {"clip_min": -1, "clip_max": 1}
    report = evaluate_robustness(
        model, tokens, y, eps=eps, suite="quick", attack_input=attack_input, verbose=0, **limits
    )
    robust = np.array([broken is None for broken in report.per_example["broken_by"]])
    clear = np.abs(smallest - eps) > 1e-4
    np.testing.assert_array_equal(robust[clear], (smallest > eps)[clear])
    assert report.settings["outputs"] == "softmax"
    np.testing.assert_array_equal(values(model(tokens)).argmax(1), y)


@pytest.mark.more
def test_a_training_on_embeddings_also_trains_the_embeddings():
    keras.utils.set_random_seed(2)
    model = text_model()
    tokens, y = text_data(model)
    before = values(model.layers[1].embeddings).copy()
    robust = AdversarialTraining(model, 0.01, clip_min=-1, clip_max=1, attack_input="embeddings", steps=2)
    robust.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
    monitor = RobustnessMonitor(tokens, y, eps=0.01, clip_min=-1, clip_max=1, attack_input="embeddings")
    robust.fit(tokens, y, epochs=2, batch_size=len(y), shuffle=False, callbacks=[monitor], verbose=0)
    table = values(model.layers[1].embeddings)
    assert np.abs(table - before).max() > 1e-5
    # The monitor evaluates the embeddings of this epoch, not those that it began with.
    after = evaluate_robustness(
        model, tokens, y, eps=0.01, clip_min=-1, clip_max=1, attack_input="embeddings", suite="quick", verbose=0
    )
    assert monitor.report.per_example == after.per_example
    assert monitor.report.provenance["model"] == after.provenance["model"]


def test_the_gradient_of_a_training_on_embeddings_is_that_of_the_attacked_loss():
    keras.utils.set_random_seed(3)
    model = text_model()
    tokens, y = text_data(model, 8)
    reference = keras.models.clone_model(model)
    reference.set_weights(model.get_weights())
    robust = AdversarialTraining(model, 0.02, clip_min=-1, clip_max=1, attack_input="embeddings", method="clean")
    robust.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
    robust.train_on_batch(tokens, y)
    reference.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
    reference.train_on_batch(tokens, y)
    for trained, expected in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(trained, expected, atol=1e-6)


def test_another_thread_sees_the_plain_embeddings():
    import threading

    from keras_drsl.models.inputs import changed_embedding

    model = text_model()
    tokens, _ = text_data(model)
    plain = values(model(tokens))
    seen = {}
    with changed_embedding(model.layers[1], ops.zeros_like):
        thread = threading.Thread(target=lambda: seen.update(there=values(model(tokens))))
        thread.start()
        thread.join()
        seen["here"] = values(model(tokens))
    np.testing.assert_array_equal(seen["there"], plain)
    assert np.abs(seen["here"] - plain).max() > 1e-4
    np.testing.assert_array_equal(values(model(tokens)), plain)


def test_a_model_whose_embeddings_were_attacked_is_saved_as_before(tmp_path):
    model = text_model()
    tokens, y = text_data(model)
    evaluate_robustness(
        model, tokens, y, eps=0.01, clip_min=-1, clip_max=1, attack_input="embeddings", suite="quick", verbose=0
    )
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(values(again(tokens)), values(model(tokens)))


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3), (5, 2)])
def test_a_layout_gives_back_what_it_was_given(shape):
    rng = np.random.default_rng(0)
    parts = (Part("a", (7,), "int32"), Part("b", shape, "float32"), Part("c", (2, 3), "bool"), Part("d", (), "float32"))
    layout = Layout("dict", parts, 1, shape)
    inputs = {
        "a": rng.integers(0, 2**24, (4, 7)),
        "b": rng.random((4, *shape)).astype("float32"),
        "c": rng.random((4, 2, 3)) < 0.5,
        "d": rng.random(4).astype("float32"),
    }
    packed = layout.pack(inputs)
    assert packed.shape[1:-1] == shape[:-1]
    found, attacked, label = layout.unpack(packed)
    assert label is None
    np.testing.assert_array_equal(values(attacked), inputs["b"])
    for name, value in inputs.items():
        np.testing.assert_array_equal(values(found[name]), value)
    with_labels, rows = layout.repeat_for_labels(values(packed), 3)
    found, _, label = with_labels.unpack(ops.convert_to_tensor(rows))
    np.testing.assert_array_equal(values(label), np.tile([0, 1, 2], 4))
    np.testing.assert_array_equal(with_labels.labels(rows), np.tile([0, 1, 2], 4))
    np.testing.assert_array_equal(values(found["a"]), np.repeat(inputs["a"], 3, axis=0))


def test_what_does_not_fit_is_named():
    x, y, _ = make_data()
    model = make_model()

    def evaluate(model=model, x=x, y=y, **options):
        return evaluate_robustness(model, x, y, **{"eps": EPS, "suite": "quick", "verbose": 0} | options)

    as_tuples = [tuple(x[name] for name in ("image", "text", "flag"))] * 2
    several = (
        "`attack_input` must name one of the inputs of `model`: 'flag', 'image', 'text'. Received: attack_input=None"
    )
    for inputs in (x, list(as_tuples[0])):
        with pytest.raises(ValueError, match=several):
            evaluate(x=inputs)
    with pytest.raises(ValueError, match=several):
        AdversarialTraining(model, EPS)
    with pytest.raises(ValueError, match=several):
        evaluate(x=iter([(inputs, y) for inputs in as_tuples]), y=None)
    with pytest.raises(
        ValueError, match="For a model with several inputs, let `attack_input` name .*: image, text, flag"
    ):
        RobustnessMonitor(x, y, eps=EPS)  # before the model is known
    with pytest.raises(ValueError, match=r"one label for each input. Received: 80 examples, labels of shape \(7,\)"):
        evaluate(y=y[:7], attack_input="image")
    with pytest.raises(ValueError, match=r"Received: 80 examples, labels of shape \(7,\)"):
        evaluate(x=iter([(x, y[:7])]), y=None, attack_input="image")
    listed = "`attack_input` must name one of the inputs: 'flag', 'image', 'text'. Received: attack_input="
    for wrong in ("picture", 7):
        with pytest.raises(ValueError, match=listed):
            evaluate(attack_input=wrong)
    with pytest.raises(ValueError, match="`attack_input` must be a name or a position. Received: attack_input=True"):
        evaluate(attack_input=True)
    with pytest.raises(ValueError, match="`x` must hold all inputs of `model`: .*image.* Received: one of"):
        evaluate(x=x["image"], attack_input="image")
    one_input = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="`attack_input` must be left out for a model with one input"):
        evaluate_robustness(one_input, x["image"], y, eps=EPS, attack_input="image", verbose=0)
    with pytest.raises(ValueError, match="The inputs of `model` must have one length. Received: image: "):
        evaluate(x=x | {"text": x["text"][:3]}, attack_input="image")
    with pytest.raises(
        ValueError, match="The input 'text' of `model` must hold numbers, as token ids in place of text"
    ):
        evaluate(x=x | {"text": np.array([["a", "b", "c"]] * 80)}, attack_input="image")
    with pytest.raises(ValueError, match="The input 'extra' of `model` must hold finite numbers"):
        evaluate(x=x | {"extra": np.full((80, 1), np.nan)}, attack_input="image")
    with pytest.raises(ValueError, match=r"The input 'image' of `model` must have shape \(count, ...\)"):
        evaluate(x=x | {"image": x["image"][:, 0]}, attack_input="image")
    with pytest.raises(ValueError, match="The input 'text' of `model` must hold integers up to 2\\^24"):
        evaluate(x=x | {"text": x["text"] + 2**25}, attack_input="image")
    with pytest.raises(
        ValueError, match=r"`x_or_dataset\['image'\]` must lie in .* to -749.* Give clip_min and clip_max that hold all"
    ):
        evaluate(x=x | {"image": x["image"] - 750}, attack_input="image")
    with pytest.raises(ValueError, match="`attack_input` must name one of the embedding layers of `model`, .*: none"):
        evaluate(attack_input="embeddings")
    with pytest.raises(
        ValueError, match=r"`x_pool` must hold inputs .image. of shape \(4,\).* Received: .image. of shape \(5,\)"
    ):
        evaluate(attack_input="image", x_pool=x | {"image": np.zeros((80, 5))})
    robust = AdversarialTraining(model, EPS, attack_input="image")
    robust.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r"`x\['image'\]` must lie in"):
        robust.fit(x | {"image": x["image"] + 0.5}, y, verbose=0)
    two = text_model("mean")
    tokens, labels = text_data(two)
    with pytest.raises(ValueError, match="`x_or_dataset, embedded` must lie in .* need clip_min=-1"):
        evaluate(two, tokens, labels, attack_input="embeddings")
    with pytest.raises(ValueError, match="`undefended` must be left out where embeddings are attacked"):
        evaluate(two, tokens, labels, attack_input="embeddings", clip_min=-1, undefended=text_model())
    later = [({name: value[:8] for name, value in x.items()}, y[:8])]
    later += [(later[0][0] | {"text": x["text"][:8, :2]}, y[:8])]
    with pytest.raises(
        ValueError,
        match=r"`x_or_dataset` must hold inputs .*.text. of shape \(3,\).* Received: .*.text. of shape \(2,\)",
    ):
        evaluate(x=iter(later), y=None, attack_input="image")


def test_layers_of_one_name_are_refused():
    towers = [keras.Sequential([layers.Embedding(20, 3, name="tokens"), layers.Flatten()]) for _ in range(2)]
    given = [keras.Input((6,), dtype="int32", name=name) for name in ("a", "b")]
    features = [tower(tokens) for tower, tokens in zip(towers, given, strict=True)]
    model = keras.Model(given, layers.Dense(2)(layers.Concatenate()(features)))
    for attack_input in ("embeddings", "tokens"):
        with pytest.raises(ValueError, match="which need different names: 'tokens', 'tokens'"):
            Inputs(model, attack_input)


class Wrapped(keras.Model):
    """Takes a dictionary of one input."""

    def __init__(self):
        super().__init__()
        self.unit = layers.Dense(2)

    def call(self, x):
        return self.unit(x["q"])


def test_one_input_in_a_dictionary_stays_in_it():
    model, x = Wrapped(), np.random.default_rng(0).random((12, 4)).astype("float32")
    y = values(model({"q": x})).argmax(1)
    report = evaluate_robustness(model, {"q": x}, y, eps=0.01, suite="quick", attack_input="q", checks=[], verbose=0)
    assert report.clean_accuracy == 1


def test_a_monitor_warns_where_training_moves_embeddings_out_of_the_range():
    model = text_model()
    tokens, y = text_data(model)
    monitor = RobustnessMonitor(tokens, y, eps=0.01, clip_min=-0.06, clip_max=0.06, attack_input="embeddings")
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    push = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.layers[1].embeddings.assign(model.layers[1].embeddings + 1.0)
    )
    with pytest.warns(RuntimeWarning, match="The robust accuracy of this epoch counts as 0: .* must lie in"):
        history = model.fit(tokens, y, epochs=2, callbacks=[monitor, push], verbose=0).history
    assert history["val_robust_accuracy"][1] == 0
    assert history["val_robustness_warning"][1] == 1


def test_attacks_that_cannot_keep_inputs_are_refused():
    x, y, _ = make_data()
    transfer = keras_drsl.attacks.Transfer(make_model(), PGD(EPS))
    with pytest.raises(ValueError, match="`attacks` cannot hold transfer_pgd_ce for a model of several inputs"):
        evaluate_robustness(shared_model(), x, y, eps=EPS, attacks=[transfer], attack_input="image", verbose=0)


def test_a_layer_that_is_called_twice_is_refused():
    tokens, other = keras.Input((6,), dtype="int32", name="a"), keras.Input((6,), dtype="int32", name="b")
    layer = layers.Embedding(20, 3)
    model = keras.Model([tokens, other], layers.Dense(2)(layers.Flatten()(layer(tokens) + layer(other))))
    x = np.ones((4, 6), "int32")
    with pytest.raises(ValueError, match="`attack_input` must name an embedding layer that `model` calls once"):
        Inputs(model, "embeddings").pack([x, x])
