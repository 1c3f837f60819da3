"""Models that classify each position are attacked by one perturbation of the whole input.

The largest number of positions that one perturbation gets wrong is found by brute force, for a model of eight inputs.
"""

import functools
import itertools
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, cli, evaluate_robustness, robustness_curve
from keras_drsl._intervals import of_ratio, wilson
from keras_drsl.attacks import APGD, PGD, Square
from keras_drsl.attacks.objectives import objective, share_wrong
from keras_drsl.evaluation import Outcome, check
from tests.backends import values
from tests.helpers import some_short

EPS = 0.1
METHODS = ["pgd", "fgsm", "trades", "mart", "consistency"]
RNG = np.random.default_rng(3)
# Each of four pixels has logits that depend on its own two channels, and a little on its neighbour.
OWN, NEXT = RNG.normal(size=(2, 3)), 0.4 * RNG.normal(size=(2, 3))


def logits_of(x):
    """Return the logits of inputs `(..., 4, 2)`, shape `(..., 4, 3)`."""
    x = x - 0.5
    return x @ OWN + np.roll(x, 1, axis=-2) @ NEXT


def make_model(head="logits", shape=(4, 2)):
    inputs = keras.Input(shape)
    x = layers.Reshape((4, 2))(inputs)
    kernel = np.zeros((8, 12))
    for position in range(4):
        kernel[2 * position : 2 * position + 2, 3 * position : 3 * position + 3] += OWN
        before = (position - 1) % 4
        kernel[2 * before : 2 * before + 2, 3 * position : 3 * position + 3] += NEXT
    dense = layers.Dense(12)
    outputs = layers.Reshape((*shape[:-1], 3))(dense(layers.Flatten()(x)))
    dense.set_weights([kernel, -0.5 * kernel.sum(0)])
    if head == "softmax":
        outputs = layers.Softmax()(outputs)
    return keras.Model(inputs, outputs)


# An evaluation leaves a model as it is, and the programs that were compiled for it serve the next one.
shared_model = functools.cache(make_model)


def make_data(count=12, ignored=False):
    """Return inputs, labels, and for each input the largest number of positions that one perturbation gets wrong."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.25, 0.75, (count, 4, 2)).astype("float32")
    y = logits_of(x).argmax(-1).astype("int32")
    if ignored:
        y[rng.random(y.shape) < 0.3] = -1
        y[:, 0] = logits_of(x).argmax(-1)[:, 0]
    # A grid of 5^8 points of the ball: what it finds is a lower bound of the worst, and close to it.
    steps = np.array(list(itertools.product([-1.0, -0.5, 0.0, 0.5, 1.0], repeat=8)), "float32").reshape(-1, 4, 2)
    worst = []
    for row, labels in zip(x.astype("float64"), y, strict=True):
        wrong = (logits_of(row + EPS * steps).argmax(-1) != labels) & (labels >= 0)
        worst.append(int(wrong.sum(1).max()))
    return x, y, np.array(worst)


def total(report):
    return np.array([row[-1] for row in report.per_example["wrong"]])


@pytest.mark.parametrize("head", some_short(["logits", "softmax"], "softmax", more=["logits"]))
@pytest.mark.parametrize("ignored", some_short([False, True], True, more=[False]))
def test_the_suite_finds_what_brute_force_finds(head, ignored):
    x, y, worst = make_data(ignored=ignored)
    attacks = [APGD(EPS, loss="ce"), APGD(EPS, loss="margin"), APGD(EPS, loss="js")]
    report = evaluate_robustness(
        shared_model(head), x, y, eps=EPS, attacks=attacks, checks=["outputs"], task="positions", verbose=0
    )
    counts = (y >= 0).sum(1)
    assert report.clean_accuracy == 1
    assert 0.1 < report.robust_accuracy < 0.9
    assert (total(report) >= worst - 1).all()
    assert total(report).sum() >= worst.sum() - 1
    assert report.per_example["positions"] == counts.tolist()
    assert report.robust_accuracy == pytest.approx(1 - total(report).sum() / counts.sum())
    assert report.settings["outputs"] == head
    assert report.num_positions == counts.sum()


@pytest.mark.more
def test_the_standard_suite_and_its_checks(tmp_path):
    x, y, worst = make_data()
    report = evaluate_robustness(shared_model("softmax"), x, y, eps=EPS, task="positions", verbose=0)
    assert total(report).sum() >= worst.sum() - 1
    assert report.trustworthy, report.to_text()
    assert [attack["name"] for attack in report.attacks] == ["apgd_ce", "apgd_js", "apgd_margin", "square"]
    text = report.to_text()
    assert "12 examples of 48 positions, which are counted one by one" in text
    shares = [report.accuracy[name]["cumulative"] for name in report.accuracy]
    assert shares == sorted(shares, reverse=True)
    assert report.robust_accuracy <= shares[-1]
    report.plot(tmp_path / "report.png")
    report.to_json(tmp_path / "report.json")
    assert keras_drsl.RobustnessReport.from_json(tmp_path / "report.json").to_text() == text


def test_what_checks_find_lowers_the_accuracy():
    @check()
    def finds_more(context):
        return Outcome("warn", 0.5, "", broken=[2, np.int64(5)], wrong={2: 3, np.int64(5): np.int64(4)})

    x, y, _ = make_data()
    options = {
        "eps": EPS,
        "attacks": [PGD(EPS, loss="margin", steps=1, step_size=1e-9, random_start=False)],
        "checks": [finds_more],
        "task": "positions",
        "verbose": 0,
    }
    report = evaluate_robustness(shared_model(), x, y, **options)
    assert total(report).tolist() == [0, 0, 3, 0, 0, 4, 0, 0, 0, 0, 0, 0]
    assert report.robust_accuracy == 1 - 7 / 48
    assert report.per_example["broken_by"][5] == "check:finds_more"
    assert report.per_example["broken_by"].count(None) == 11


def test_every_point_that_counts_lies_in_the_ball_and_is_wrong_there():
    x, y, _ = make_data()
    model = shared_model()
    attack = PGD(EPS, loss="margin", steps=10)
    found = keras_drsl.models.logits.find_logits_of(model, x, None, keras_drsl.models.heads.View(task="positions"))
    x_adv = attack(found.classifier, x, y)
    assert np.abs(x_adv - x).max() <= EPS + 1e-6
    wrong = (logits_of(x_adv.astype("float64")).argmax(-1) != y).sum(1)
    report = evaluate_robustness(model, x, y, eps=EPS, attacks=[attack], checks=[], task="positions", verbose=0)
    np.testing.assert_array_equal(total(report), wrong)


def test_ignored_positions_change_nothing():
    x, y, _ = make_data()
    model = shared_model()
    options = {"eps": EPS, "attacks": [APGD(EPS, loss="margin", steps=20)], "checks": [], "verbose": 0}
    masked = y.copy()
    masked[:, 1] = -1
    first = evaluate_robustness(model, x, masked, task="positions", **options)
    again = masked.copy()
    again[:, 1] = 255
    second = evaluate_robustness(model, x, again, task="positions", ignore_class=255, **options)
    weights = np.ones(y.shape)
    weights[:, 1] = 0
    batches = ((x[part], y[part], weights[part]) for part in (slice(0, 6), slice(6, 12)))
    third = evaluate_robustness(model, batches, task="positions", **options)
    assert first.per_example == second.per_example == third.per_example
    # Labels of images are often of 8 bits, which do not hold -1.
    small = evaluate_robustness(model, x, again.astype("uint8"), task="positions", ignore_class=255, **options)
    curve = robustness_curve(
        model, x, again.astype("uint8"), eps=[0], task="positions", ignore_class=255, verbose=0, suite="quick"
    )
    assert small.per_example == first.per_example
    assert curve.accuracy == [1]
    per_example = ((x[part], y[part].astype("uint8"), np.ones(6)) for part in (slice(0, 6), slice(6, 12)))
    assert evaluate_robustness(model, per_example, task="positions", **options).per_example["positions"] == [4] * 12
    wrong = [(x, y, np.ones((12, 3)))]
    with pytest.raises(
        ValueError, match=r"must give one sample weight for each position, .* weights of shape \(12, 3\)"
    ):
        evaluate_robustness(model, iter(wrong), task="positions", **options)
    one_hot = [(x, np.eye(3)[y], weights)]
    fourth = evaluate_robustness(model, iter(one_hot), task="positions", **options)
    assert fourth.per_example == first.per_example
    assert first.per_example["positions"] == [3] * 12
    assert second.settings["ignore_class"] == 255


@pytest.mark.parametrize("form", some_short(["column", "one-hot", "image"], more=["column", "one-hot"]))
def test_labels_and_positions_of_any_form(form):
    x, y, _ = make_data()
    options = {"eps": EPS, "attacks": [PGD(EPS, loss="margin", steps=5)], "checks": [], "task": "positions"}
    expected = evaluate_robustness(shared_model(), x, y, verbose=0, **options)
    model = shared_model(shape=(2, 2, 2)) if form == "image" else shared_model()
    forms = {"column": y[..., None], "one-hot": np.eye(3)[y], "image": y.reshape(-1, 2, 2)}
    given = x.reshape(-1, 2, 2, 2) if form == "image" else x
    report = evaluate_robustness(model, given, forms[form], verbose=0, **options)
    wrong = np.array(report.per_example["wrong"])
    if form == "image":  # other random numbers: they depend on the shape
        assert np.abs(wrong - np.array(expected.per_example["wrong"])).max() <= 1
    else:
        np.testing.assert_array_equal(wrong, expected.per_example["wrong"])


def test_one_unit_per_position_is_two_classes():
    x, _, _ = make_data()
    inputs = keras.Input((4, 2))
    dense = layers.Dense(1, "sigmoid")
    model = keras.Model(inputs, dense(inputs))
    weight = np.array([[1.0], [-0.5]])
    dense.set_weights([weight, np.array([-0.25])])
    z = x @ weight[:, 0] - 0.25
    y = (z > 0).astype("int32")
    report = evaluate_robustness(
        model, x, y, eps=EPS, attacks=[APGD(EPS, loss="margin", steps=20)], task="positions", checks=[], verbose=0
    )
    # The positions do not share inputs, so all can be attacked at once.
    expected = (np.abs(z) < EPS * 1.5).sum(1)
    np.testing.assert_array_equal(total(report), expected)
    assert report.settings["outputs"] == "softmax"


def test_the_interval_is_that_of_a_ratio_of_sums():
    x, y, _ = make_data(ignored=True)
    report = evaluate_robustness(
        shared_model(), x, y, eps=EPS, attacks=[PGD(EPS, steps=5)], checks=[], task="positions", verbose=0
    )
    wrong, counts = total(report).astype(float), np.array(report.per_example["positions"])
    low, high = report.confidence_interval
    # The delta method by the jackknife, which agrees with it to first order.
    n = len(wrong)
    left_out = np.array([1 - np.delete(wrong, i).sum() / np.delete(counts, i).sum() for i in range(n)])
    deviation = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.2)
    assert low < report.robust_accuracy < high
    # Where all examples are alike, it is that of as many independent examples.
    assert of_ratio([0, 0], [100, 100]) == wilson(2, 2)
    assert of_ratio([100] * 3, [100] * 3) == wilson(0, 3)
    # Examples of one position each are independent positions, up to n - 1 in the variance.
    single = of_ratio([1] * 30 + [0] * 70, [1] * 100)
    np.testing.assert_allclose(single, wilson(70, 100), atol=1e-3)


def test_a_stopped_evaluation_and_shards_end_as_one_call(tmp_path):
    x, y, _ = make_data()
    options = {"eps": EPS, "suite": "quick", "task": "positions", "verbose": 0, "batch_size": 4}
    whole = evaluate_robustness(shared_model(), x, y, **options)

    class Stop(PGD):
        """Stops an evaluation in its second batch."""

        calls = 0

        def run(self, classifier, batch):
            Stop.calls += 1
            if Stop.calls == 2:
                raise KeyboardInterrupt
            return super().run(classifier, batch)

    attacks = [keras_drsl.attacks.FGSM(EPS), Stop(EPS, loss="margin", steps=20)]
    path = tmp_path / "state"
    stopped = {**options, "attacks": attacks, "checks": "quick", "state_path": path}
    del stopped["suite"]
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(shared_model(), x, y, **stopped)
    again = evaluate_robustness(shared_model(), x, y, **stopped)
    assert again.per_example["wrong"] == whole.per_example["wrong"]
    parts = [evaluate_robustness(shared_model(), x, y, shard=(i, 2), **options) for i in range(2)]
    assert keras_drsl.RobustnessReport.merge(parts).per_example == whole.per_example


def test_a_report_is_read_again_and_refuses_numbers_that_do_not_fit(tmp_path):
    x, y, _ = make_data()
    report = evaluate_robustness(shared_model(), x, y, eps=EPS, suite="quick", task="positions", verbose=0)
    path = tmp_path / "report.json"
    report.to_json(path)
    assert keras_drsl.RobustnessReport.from_json(path).per_example == report.per_example
    content = json.loads(path.read_text())

    def refuse(match, **changes):
        path.write_text(json.dumps(content | {"per_example": content["per_example"] | changes}))
        with pytest.raises(ValueError, match=match):
            keras_drsl.RobustnessReport.from_json(path)

    wrong = content["per_example"]["wrong"]
    refuse("must hold 4 numbers for each example, none smaller", wrong=[[4, *row[1:-1], 0] for row in wrong])
    refuse("must hold 4 numbers for each example", wrong=[[*row, 4] for row in wrong])
    refuse("and at most its `positions`", wrong=[[*row[:-1], 5] for row in wrong])
    refuse("must hold `label`, or both `wrong` and `positions`", label=[0] * 12)


def test_a_curve_and_a_monitor_count_positions():
    x, y, worst = make_data()
    curve = robustness_curve(
        shared_model(), x, y, eps=[0, EPS / 2, EPS], suite="quick", checks=[], task="positions", verbose=0
    )
    assert curve.accuracy[0] == 1
    assert curve.accuracy == sorted(curve.accuracy, reverse=True)
    assert curve.accuracy[2] == pytest.approx(1 - worst.sum() / 48, abs=4 / 48)
    assert len(curve.breaking_eps) == 48
    assert curve.positions == [4] * 12
    low, high = curve.confidence_intervals[2]
    assert low < curve.accuracy[2] < high
    assert "12 examples" in str(curve)
    monitor = RobustnessMonitor(x, y, eps=EPS, task="positions")
    model = make_model()
    model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(x, y, callbacks=[monitor], verbose=0).history
    assert history["val_robust_accuracy"] == [monitor.report.robust_accuracy]
    assert history["val_robust_accuracy"][0] == pytest.approx(curve.accuracy[2], abs=2 / 48)
    assert history["val_softmax_diversity"][0] > 0


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "js"])
@pytest.mark.parametrize("targeted", [False, True])
def test_an_objective_is_the_mean_over_the_positions_that_count(loss, targeted):
    rng = np.random.default_rng(1)
    logits, y = 2 * rng.normal(size=(5, 6, 4)), rng.integers(-1, 4, (5, 6))
    target = rng.integers(0, 4, 5)
    found = objective(
        loss,
        ops.convert_to_tensor(logits.astype("float32")),
        ops.convert_to_tensor(y.astype("int32")),
        ops.convert_to_tensor(target.astype("int32")),
        targeted=targeted,
    )
    expected = []
    for row in range(5):
        at = []
        for position in range(6):
            z, true = logits[row, position], y[row, position]
            if true < 0 or (targeted and true == target[row]):
                continue
            p = np.exp(z) / np.exp(z).sum()
            other = z[target[row]] if targeted else np.delete(z, true).max()
            ordered = np.sort(z)[::-1]
            low = (ordered[2] + ordered[3]) / 2 if targeted else ordered[2]
            q = p[target[row]] if targeted else p[true]
            js = np.log(2) + (q * np.log(q) - (1 + q) * np.log(1 + q)) / 2
            at.append(
                {
                    "ce": np.log(p[target[row]]) if targeted else -np.log(p[true]),
                    "margin": min(other - z[true], 0),
                    "dlr": min((other - z[true]) / (ordered[0] - low), 0),
                    "js": -js if targeted else js,
                }[loss]
            )
        expected.append(np.mean(at) if at else 0.0)
    np.testing.assert_allclose(values(found), expected, rtol=2e-5, atol=1e-6)
    wrong = (logits.argmax(-1) != y) & (y >= 0)
    share = share_wrong(ops.convert_to_tensor(logits.astype("float32")), ops.convert_to_tensor(y.astype("int32")))
    np.testing.assert_allclose(values(share), wrong.sum(1) / np.maximum((y >= 0).sum(1), 1), rtol=1e-6)


@pytest.mark.parametrize("method", some_short(METHODS, "pgd", more=set(METHODS) - {"pgd"}))
def test_models_of_positions_are_trained_to_withstand_attacks(method):
    keras.utils.set_random_seed(0)
    x, y = _many(200)
    y[::3, 2] = -1
    inputs = keras.Input((4, 2))
    outputs = layers.Reshape((4, 3))(layers.Dense(12)(layers.Flatten()(inputs)))
    robust = AdversarialTraining(keras.Model(inputs, outputs), 0.05, method=method, steps=3, task="positions")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    robust.compile(keras.optimizers.Adam(0.1), loss)
    history = robust.fit(x, y, epochs=15, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert history["clean_accuracy"][-1] > 0.75
    options = {"eps": 0.02, "suite": "quick", "task": "positions", "verbose": 0}
    assert evaluate_robustness(robust, x, y, **options).robust_accuracy > 0.5


def _many(count):
    x = np.random.default_rng(0).uniform(0.25, 0.75, (count, 4, 2)).astype("float32")
    return x, logits_of(x).argmax(-1).astype("int32")


@pytest.mark.parametrize("form", some_short(["ids", "uint8", "one-hot"], "uint8", more=["ids", "one-hot"]))
@pytest.mark.parametrize("attack_loss", ["cross_entropy", "loss"])
def test_positions_of_weight_0_are_not_attacked(attack_loss, form):
    x, y = _many(16)
    y = {"ids": y, "uint8": y.astype("uint8"), "one-hot": np.eye(3, dtype="float32")[y]}[form]
    weights = np.ones((16, 4), "float32")
    weights[:, 2:] = 0
    robust = AdversarialTraining(make_model(), EPS, attack_loss=attack_loss, steps=2, task="positions")
    loss = keras_drsl.DRSLoss(lam=0.1, from_logits=True)
    robust.compile(keras.optimizers.SGD(0.1), loss)
    before = robust.model.get_weights()[0].copy()
    history = robust.fit(x, y, sample_weight=weights, batch_size=16, verbose=0).history
    change = np.abs(robust.model.get_weights()[0] - before).reshape(8, 4, 3)
    # The kernel of position 3 takes its own channels and those of position 2; both positions have no weight.
    assert change[:, 2:].max() == 0
    assert change[:, :2].max() > 0
    assert history["attack_strength"][0] > 0


def test_the_command_counts_positions(tmp_path):
    x, y, _ = make_data()
    make_model("softmax").save(tmp_path / "model.keras")
    y[:, 3] = 9
    np.savez(tmp_path / "data.npz", x=x, y=y)
    command = ["evaluate", str(tmp_path / "model.keras"), "--dataset", str(tmp_path / "data.npz"), "--quiet"]
    command += ["--eps", str(EPS), "--suite", "quick", "--task", "positions", "--ignore-class", "9"]
    command += ["--out", str(tmp_path / "report.json"), "--state", str(tmp_path / "state")]
    assert cli.main(command) == 0
    report = keras_drsl.RobustnessReport.from_json(tmp_path / "report.json")
    y[:, 3] = -1
    expected = evaluate_robustness(shared_model("softmax"), x, y, eps=EPS, suite="quick", task="positions", verbose=0)
    assert report.per_example == expected.per_example


def test_what_does_not_fit_is_named():
    x, y, _ = make_data()

    def evaluate(y=y, model=None, **options):
        options = {"eps": EPS, "suite": "quick", "task": "positions", "verbose": 0} | options
        return evaluate_robustness(model or shared_model(), x, y, **options)

    with pytest.raises(
        ValueError, match="`y` must hold one label for each of the 4 positions of each of the 12 inputs"
    ):
        evaluate(y=y[:, :3])
    with pytest.raises(ValueError, match=r"`y` must hold class ids in \[0, 3\), or negative ones .* Received: 3"):
        evaluate(y=y + 1)
    with pytest.raises(
        ValueError, match="`y` must have a label that counts for each input. Received: none for input 5"
    ):
        evaluate(y=np.where(np.arange(12)[:, None] == 5, -1, y))
    with pytest.raises(ValueError, match="`model` must return classes for each position"):
        evaluate(model=keras.Sequential([keras.Input((4, 2)), layers.Flatten(), layers.Dense(3)]))
    with pytest.raises(ValueError, match='`ignore_class` must be left out unless task="positions"'):
        evaluate(task="multiclass", ignore_class=1)
    fewer = keras.Sequential([keras.Input((4, 2)), layers.Dense(2)])
    with pytest.raises(ValueError, match="`undefended` must have the 3 classes of `model`. Received: 2"):
        evaluate(undefended=fewer)
    with pytest.raises(ValueError, match="`suite` must be one of quick, standard for a model of positions"):
        evaluate(suite="cleverhans")
    with pytest.raises(ValueError, match=r"must return outputs of shape \(batch, classes >= 2\).*task=.positions."):
        evaluate(task="multiclass")
    robust = AdversarialTraining(make_model(), EPS, task="positions")
    robust.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="`y` must hold one label for each of the 4 positions"):
        robust.fit(x, y[:, :3], verbose=0)


def test_square_raises_the_number_of_wrong_positions():
    x, y, worst = make_data()
    report = evaluate_robustness(
        shared_model(), x, y, eps=EPS, attacks=[Square(EPS, queries=300)], checks=[], task="positions", verbose=0
    )
    assert total(report).sum() >= 0.8 * worst.sum()
