"""Models of several labels get the verdict that linear models have in closed form, label by label."""

import functools
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, cli, evaluate_robustness, robustness_curve
from keras_drsl.attacks import APGD, Square
from tests.backends import values
from tests.helpers import some_short
from tests.layers import SigmoidOf

EPS = 0.04
WEIGHTS = np.array([[1.0, -0.5, 0.2], [-0.8, 0.3, 0.9], [0.5, 0.9, -0.4], [0.2, -0.1, 0.6]])
METHODS = ["pgd", "fgsm", "trades", "mart", "consistency"]
ATTACKS = [APGD(EPS, loss="margin", targeted=True, steps=10)]


def make_model(head=None, scale=1.0):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, head)])
    model.layers[0].set_weights([scale * WEIGHTS, -0.5 * scale * WEIGHTS.sum(0)])
    return model


# An evaluation leaves a model as it is, and the programs that were compiled for it serve the next one.
shared_model = functools.cache(make_model)


def make_data(count=60, norm="inf"):
    """Return inputs, labels, and the size of the perturbation that changes each label."""
    x = np.random.default_rng(0).uniform(0.25, 0.75, (count, 4)).astype("float32")
    z = (x - 0.5) @ WEIGHTS
    dual = np.abs(WEIGHTS).sum(0) if norm == "inf" else np.sqrt((WEIGHTS**2).sum(0))
    return x, (z > 0).astype("int32"), np.abs(z) / dual


def assert_exact(report, smallest, eps=EPS):
    robust = np.array([[by is None for by in row] for row in report.per_example["broken_by_label"]])
    clear = np.abs(smallest - eps) > 1e-3
    np.testing.assert_array_equal(robust[clear], (smallest > eps)[clear])
    assert 0.15 < robust.all(1).mean() < 0.8
    np.testing.assert_array_equal([by is None for by in report.per_example["broken_by"]], robust.all(1))
    assert report.robust_accuracy == robust.all(1).mean()
    assert report.robust_accuracy_by_label == dict(enumerate(robust.mean(0)))


HEADS = {
    "logits": shared_model,
    "sigmoid": lambda: shared_model("sigmoid"),
    "saturated": lambda: make_model("sigmoid", 2000.0),
    "sigmoid op": lambda: SigmoidOf(make_model()),
}


@pytest.mark.parametrize("name", some_short(HEADS, "sigmoid", more=set(HEADS) - {"sigmoid"}))
def test_each_label_has_the_exact_verdict(name):
    x, y, smallest = make_data()
    checks = ["outputs", "gradients", "independent_rows", "deterministic", "clean_accuracy", "perturbations"]
    options = {"eps": EPS, "attacks": ATTACKS, "checks": checks, "task": "multilabel", "verbose": 0}
    report = evaluate_robustness(HEADS[name](), x, y, **options)
    assert report.clean_accuracy == 1
    assert_exact(report, smallest)
    assert report.trustworthy
    assert report.settings["outputs"] == ("logits" if name == "logits" else "softmax")
    assert report.per_example["label"] == y.tolist()
    text = report.to_text()
    assert "60 examples of 3 labels, correct if all of them are" in text
    assert f"robust by label  0 {report.robust_accuracy_by_label[0]:.1%}, 1 " in text


@pytest.mark.parametrize("norm", some_short(["inf", 2], more=["inf"]))
def test_the_suite_is_exact_in_both_norms(norm):
    x, y, smallest = make_data(30, norm)
    eps = EPS if norm == "inf" else 2 * EPS
    report = evaluate_robustness(shared_model("sigmoid"), x, y, eps=eps, norm=norm, task="multilabel", verbose=0)
    assert_exact(report, smallest, eps)
    assert report.trustworthy
    assert all(check.status in ("pass", "skipped") for check in report.checks)


def test_one_label_alone_is_a_binary_task():
    x, y, smallest = make_data()
    options = {"eps": EPS, "attacks": ATTACKS, "checks": [], "verbose": 0}
    report = evaluate_robustness(shared_model("sigmoid"), x, y, task="multilabel", which=1, **options)
    weights = make_model().layers[0].get_weights()
    unit = keras.Sequential([keras.Input((4,)), layers.Dense(1, "sigmoid")])
    unit.layers[0].set_weights([weights[0][:, 1:2], weights[1][1:2]])
    binary = evaluate_robustness(unit, x, y[:, 1], **options)
    assert report.per_example == binary.per_example
    np.testing.assert_array_equal([by is None for by in report.per_example["broken_by"]], smallest[:, 1] > EPS)
    assert report.robust_accuracy_by_label is None
    assert (report.settings["task"], report.settings["which"]) == ("multilabel", 1)


def test_an_example_that_is_wrong_in_one_label_is_broken_without_an_attack():
    x, y, smallest = make_data()
    y[:6, 2] = 1 - y[:6, 2]
    options = {"eps": EPS, "attacks": ATTACKS, "checks": [], "task": "multilabel", "verbose": 0}
    report = evaluate_robustness(shared_model(), x, y, **options)
    assert report.clean_accuracy == pytest.approx(54 / 60)
    assert report.per_example["broken_by"][:6] == ["clean"] * 6
    assert all(row[2] == "clean" for row in report.per_example["broken_by_label"][:6])
    # The other labels of these examples are attacked as well.
    others = np.array([[by is None for by in row[:2]] for row in report.per_example["broken_by_label"]])
    np.testing.assert_array_equal(others, smallest[:, :2] > EPS)
    assert report.accuracy["apgd_t_margin"]["tried"] == 54


def test_attacks_and_their_order_decide_what_broke_an_example():
    x, y, _ = make_data()
    options = {"attacks": [Square(EPS, queries=30), *ATTACKS], "checks": [], "task": "multilabel", "verbose": 0}
    report = evaluate_robustness(shared_model(), x, y, eps=EPS, **options)
    rows = report.per_example["broken_by_label"]
    order = ["apgd_t_margin", "square"]
    assert [next((name for name in order if name in row), None) for row in rows] == report.per_example["broken_by"]


def test_a_pool_holds_images_of_the_same_label():
    x, y, _ = make_data()
    reader = keras_drsl.evaluation.reading.Reader(
        keras_drsl.ThreatModel(EPS), keras_drsl.models.heads.View(task="multilabel")
    )
    examples = reader.read(None, x, y, max_samples=None, shard=None)
    found = keras_drsl.models.logits.find_logits_of(make_model(), examples.x, None, reader.view_of(examples))
    pool = keras_drsl.attacks.Pool(found.classifier, *reader.whole_pool(examples), layout=examples.layout)
    images, there = pool.nearest(examples.x, 1 - examples.y)
    assert there.all()
    assert pool.empty_classes == []
    np.testing.assert_array_equal(examples.layout.labels(images), np.tile([0, 1, 2], len(x)))
    for row in range(9):
        label = row % 3
        others = x[y[:, label] != y[row // 3, label]]
        nearest = others[((others - x[row // 3]) ** 2).sum(1).argmin()]
        np.testing.assert_array_equal(examples.layout.attacked_part(images)[row], nearest)


def test_shards_merge_and_a_state_continues(tmp_path):
    x, y, smallest = make_data()
    options = {"eps": EPS, "suite": "quick", "task": "multilabel", "verbose": 0}
    whole = evaluate_robustness(shared_model(), x, y, state_path=tmp_path / "state", **options)
    again = evaluate_robustness(shared_model(), x, y, state_path=tmp_path / "state", **options)
    assert again.per_example == whole.per_example
    parts = [evaluate_robustness(shared_model(), x, y, shard=(i, 3), **options) for i in range(3)]
    merged = keras_drsl.RobustnessReport.merge(parts)
    assert merged.per_example == whole.per_example
    assert_exact(merged, smallest)
    few = evaluate_robustness(shared_model(), x, y, max_samples=20, **options)
    assert few.num_examples == 20
    assert few.per_example["label"] == y[few.per_example["index"]].tolist()


def test_a_report_is_read_again_and_refuses_labels_that_do_not_fit(tmp_path):
    x, y, _ = make_data(20)
    report = evaluate_robustness(shared_model(), x, y, eps=EPS, suite="quick", task="multilabel", verbose=0)
    path = tmp_path / "report.json"
    report.to_json(path)
    assert keras_drsl.RobustnessReport.from_json(path).per_example == report.per_example
    content = json.loads(path.read_text())
    rows = content["per_example"]["broken_by_label"]
    robust = content["per_example"]["broken_by"].index(None)

    def refuse(rows, match, **changes):
        changed = content | {"per_example": content["per_example"] | {"broken_by_label": rows} | changes}
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            keras_drsl.RobustnessReport.from_json(path)

    changed = [list(row) for row in rows]
    changed[robust][1] = "fgsm_ce"
    refuse(changed, "`per_example.broken_by` must be the first of `attacks` that broke a label")
    refuse([row[:2] for row in rows], "`per_example.broken_by_label` must have one item per label. Received: .2, 3.")
    refuse(rows, "must hold `broken_by_label` where `label` holds lists", label=[0] * len(rows))
    refuse([["else", *row[1:]] for row in rows], "`per_example.broken_by` must be the first of `attacks`")


def test_a_curve_and_a_monitor_have_the_exact_verdict():
    x, y, smallest = make_data()
    radii = [0, EPS / 2, EPS]
    curve = robustness_curve(shared_model(), x, y, eps=radii, suite="quick", checks=[], task="multilabel", verbose=0)
    assert curve.accuracy == [(smallest > eps).all(1).mean() for eps in radii]
    monitor = RobustnessMonitor(x, y, eps=EPS, task="multilabel")
    model = make_model("sigmoid")
    model.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    history = model.fit(x, y, callbacks=[monitor], verbose=0).history
    assert_exact(monitor.report, smallest)
    assert history["val_robust_accuracy"] == [monitor.report.robust_accuracy]


def test_the_command_reads_labels(tmp_path):
    x, y, smallest = make_data()
    make_model("sigmoid").save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    command = ["evaluate", str(tmp_path / "model.keras"), "--dataset", str(tmp_path / "data.npz"), "--quiet"]
    command += ["--eps", str(EPS), "--suite", "quick", "--task", "multilabel", "--state", str(tmp_path / "state")]
    assert cli.main([*command, "--out", str(tmp_path / "report.json")]) == 0
    assert_exact(keras_drsl.RobustnessReport.from_json(tmp_path / "report.json"), smallest)
    command[-1] = str(tmp_path / "other")
    assert cli.main([*command, "--which", "2", "--out", str(tmp_path / "one.json")]) == 0
    report = keras_drsl.RobustnessReport.from_json(tmp_path / "one.json")
    np.testing.assert_array_equal([by is None for by in report.per_example["broken_by"]], smallest[:, 2] > EPS)


@pytest.mark.parametrize("head", some_short([None, "sigmoid"], more=[None]))
@pytest.mark.parametrize("method", some_short(METHODS, more=set(METHODS) - {"trades"}))
def test_models_of_several_labels_are_trained_to_withstand_attacks(method, head):
    keras.utils.set_random_seed(0)
    x, y, _ = make_data(200)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, head)])
    robust = AdversarialTraining(model, 0.03, method=method, steps=3, task="multilabel")
    loss = keras.losses.BinaryCrossentropy(from_logits=head is None)
    robust.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"])
    history = robust.fit(x, y, epochs=15, verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert history["clean_accuracy"][-1] > 0.8
    report = evaluate_robustness(robust, x, y, eps=0.01, suite="quick", task="multilabel", verbose=0)
    assert report.robust_accuracy > 0.5


@pytest.mark.parametrize("attack_loss", ["cross_entropy", "margin", "loss"])
def test_the_attack_of_a_training_increases_the_mean_over_the_labels(attack_loss):
    x, y, _ = make_data(30)
    robust = AdversarialTraining(
        make_model("sigmoid"), EPS, attack_loss=attack_loss, steps=1, step_size=2 * EPS, task="multilabel"
    )
    robust.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    robust.fit(x, y, verbose=0)
    attacked = robust._attack_batch(ops.convert_to_tensor(x), ops.convert_to_tensor(y))
    z = (x - 0.5).astype("float64") @ WEIGHTS
    sign = 1 - 2 * y
    # The derivative of each label's loss by its logit: of the margin 1, of the cross-entropy a probability.
    slope = sign * (1.0 if attack_loss == "margin" else 1 / (1 + np.exp(-sign * z)))
    gradient = slope @ WEIGHTS.T
    clear = np.abs(gradient) > 0.1
    moved = values(attacked.adversarial) - x
    # From a random start, one step that is twice as long ends in the corner that the gradient points to.
    assert (np.sign(moved) == np.sign(gradient))[clear].mean() > 0.97
    np.testing.assert_allclose(np.abs(moved)[clear], EPS, atol=1e-5)


def test_what_does_not_fit_is_named(tmp_path):
    x, y, _ = make_data(10)

    def evaluate(x=x, y=y, model=None, **options):
        options = {"eps": EPS, "suite": "quick", "task": "multilabel", "verbose": 0} | options
        return evaluate_robustness(model or shared_model(), x, y, **options)

    with pytest.raises(ValueError, match="`task` must be one of .* 'positions'. Received: task='labels'"):
        evaluate(task="labels")
    with pytest.raises(ValueError, match='`which` must be left out unless task="multilabel". Received: which=1'):
        evaluate(task="multiclass", which=1)
    with pytest.raises(ValueError, match="`which` must be an integer of 0 or more. Received: which=-1"):
        evaluate(which=-1)
    with pytest.raises(ValueError, match="`which` must be one of the 3 labels in `y`. Received: which=3"):
        evaluate(which=3)
    with pytest.raises(
        ValueError, match=r"`y` must hold 0 or 1 for each label, shape \(count, labels\).* shape \(10,\)"
    ):
        evaluate(y=y[:, 0])
    with pytest.raises(ValueError, match="`y` must hold 0 or 1 for each label.* Received: a value of 2"):
        evaluate(y=2 * y)
    with pytest.raises(ValueError, match="`y` must have a column for each of the 3 labels of `model`. Received: 2"):
        evaluate(y=y[:, :2])
    with pytest.raises(ValueError, match="`x_pool` must hold labels for a model of several. Received: inputs alone"):
        evaluate(x_pool=x)
    with pytest.raises(ValueError, match="`task` and `attack_input` must be left out for a folder of images"):
        evaluate(x=str(tmp_path), y=None)
    image_model = keras.Sequential([keras.Input((4,)), layers.Reshape((2, 2))])
    with pytest.raises(ValueError, match=r"`model` must return one unit per label, shape \(batch, labels\)"):
        evaluate(model=image_model)
    robust = AdversarialTraining(make_model("sigmoid"), EPS, task="multilabel")
    robust.compile("sgd", "binary_crossentropy")
    with pytest.raises(ValueError, match="`y` must have a column for each of the 3 labels of `model`. Received: 2"):
        robust.fit(x, y[:, :2], verbose=0)
    with pytest.raises(ValueError, match=r"`y` must name one class in each row: .* task=.multilabel."):
        evaluate(task="multiclass", y=np.ones((10, 3)))
