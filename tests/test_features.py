"""A radius, limits and a mask of their own for each channel or feature. Expected values are closed forms."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import AdversarialTraining, RobustnessMonitor, ThreatModel, evaluate_robustness, robustness_curve
from keras_drsl.attacks import APGD, FGSM, PGD, Noise, Square
from keras_drsl.models import Classifier
from tests.backends import values
from tests.helpers import few_of, some_short
from tests.linear import WEIGHTS, linear_model

LOW, HIGH = np.array([-100.0, 0.0, 0.0, -3.0]), np.array([120.0, 1.0, 10.0, 3.0])
EPS = np.array([20.0, 0.05, 1.0, 0.3])
MASK = np.array([False, False, True, False])
THREATS = {
    "eps": ThreatModel(EPS, clip_min=LOW, clip_max=HIGH),
    "mask": ThreatModel(0.2, mask=MASK),
    "both": ThreatModel(EPS, clip_min=LOW, clip_max=HIGH, mask=MASK),
    "L2": ThreatModel(2 * EPS, 2, LOW, HIGH, MASK),
}
ATTACKS = {
    "fgsm": FGSM,
    "pgd": lambda **options: PGD(loss="margin", **options),
    "apgd": lambda **options: APGD(loss="margin", targeted=True, **options),
    "square": lambda **options: Square(queries=300, **options),
    "noise": Noise,
}


def model_and_inputs(threat, count=60):
    """Return a linear model and inputs near its centre, so that in L2 no limit is met."""
    low, high = (np.broadcast_to(limit, 4) for limit in (threat.clip_min, threat.clip_max))
    weights = (WEIGHTS / (high - low)[:, None]).astype("float32")
    width = 0.2 if threat.norm == 2 else 0.5
    x = np.random.default_rng(0).uniform(0.5 - width, 0.5 + width, (count, 4)) * (high - low) + low
    x = x.astype("float32")
    return linear_model(weights), weights.astype("float64"), x, (x @ weights).argmax(1)


def exact_margins(weights, x, y, threat):
    """Return the largest margin of another class that the attacker can reach, by feature."""
    eps = np.broadcast_to(threat.eps, 4) * ~np.broadcast_to(threat.mask or False, 4)
    largest = np.full(len(x), -np.inf)
    for row, (point, label) in enumerate(zip(x.astype("float64"), y, strict=True)):
        for other in set(range(3)) - {label}:
            gradient = weights[:, other] - weights[:, label]
            if threat.norm == 2:
                gain = np.sqrt(((gradient * eps) ** 2).sum())
            else:
                moved = np.where(
                    gradient > 0, np.minimum(point + eps, threat.clip_max), np.maximum(point - eps, threat.clip_min)
                )
                gain = gradient @ (moved - point)
            largest[row] = max(largest[row], gradient @ point + gain)
    return largest


@pytest.mark.parametrize("name", some_short(THREATS, "both"))
def test_the_verdict_on_a_linear_model_is_exact(name):
    threat = THREATS[name]
    model, weights, x, y = model_and_inputs(threat)
    margin = exact_margins(weights, x, y, threat)
    clear = np.abs(margin) > 1e-3
    attacks = [APGD(threat=threat, loss="margin", targeted=True, steps=60)]
    report = evaluate_robustness(model, x[clear], y[clear], threat=threat, attacks=attacks, checks=[], verbose=0)
    robust = [name is None for name in report.per_example["broken_by"]]
    assert 5 < sum(robust) < len(robust) - 5
    assert robust == (margin[clear] < 0).tolist()


@pytest.mark.parametrize(
    ("name", "attack"),
    few_of(THREATS, ATTACKS, keep=[("eps", "pgd"), ("eps", "square"), ("L2", "apgd"), ("L2", "noise")]),
)
def test_attacks_stay_within_the_radius_of_each_feature(name, attack):
    threat = THREATS[name]
    model, _, x, y = model_and_inputs(threat)
    moved = ATTACKS[attack](threat=threat)(model, x, y) - x.astype("float64")
    eps = np.broadcast_to(threat.eps, 4)
    free = ~np.broadcast_to(threat.mask or False, 4)
    assert not moved[:, ~free].any()
    relative = np.abs(moved[:, free] / eps[free])
    size = relative.max(1) if threat.norm == "inf" else np.sqrt((relative**2).sum(1))
    assert 0.8 < size.max() <= 1 + 1e-3
    assert (relative.max(0) > (0.9 if threat.norm == "inf" else 0)).all()
    assert threat.contains((x + moved).astype("float32"), x).all()
    assert (x + moved >= np.asarray(threat.clip_min) - 1e-4).all()
    assert (x + moved <= np.asarray(threat.clip_max) + 1e-4).all()


@pytest.mark.parametrize("name", some_short(THREATS, "L2"))
def test_samples_and_projections_lie_in_the_ball(name):
    threat = THREATS[name]
    generators = [np.random.default_rng(seed) for seed in range(400)]
    points = threat.sample(generators, (4,))
    eps = np.broadcast_to(threat.eps, 4) * ~np.broadcast_to(threat.mask or False, 4)
    with np.errstate(invalid="ignore"):
        relative = np.where(eps > 0, points / eps, 0)
    size = np.abs(relative).max(1) if threat.norm == "inf" else np.sqrt((relative**2).sum(1))
    assert not points[:, eps == 0].any()
    assert size.max() <= 1 + 1e-5
    # A ball of d features has the share 0.5 ** d of its points within half its radius.
    features = (eps > 0).sum()
    assert (size < 0.5).mean() == pytest.approx(0.5**features, abs=0.06)
    x = np.broadcast_to((np.asarray(threat.clip_min) + threat.clip_max) / 2, (400, 4)).astype("float32")
    far = (x + 10 * points).astype("float32")
    assert threat.contains(values(threat.project(far, x)), x).all()
    inside = (x + 0.5 * points).astype("float32")
    np.testing.assert_allclose(values(threat.project(inside, x)), inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["inf", 2, 1])
@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_points_just_outside_are_outside(norm, factor):
    threat = ThreatModel([0.2, 0.02, 0.1], norm, mask=[False, False, True])
    x = np.full((2, 3), 0.5, "float32")
    moved = np.array([[0.2, 0.0, 0.0], [0.0, 0.02, 0.0]]) * factor
    assert threat.contains((x + moved).astype("float32"), x).tolist() == [factor < 1] * 2
    moved[:, 2] = 0.001
    assert not threat.contains((x + moved).astype("float32"), x).any()


ARGUMENTS = {"eps": 0.3 * EPS, "clip_min": LOW.tolist(), "clip_max": tuple(HIGH), "mask": MASK.tolist()}


def evaluate(model, x, y, **arguments):
    report = evaluate_robustness(model, x, y, suite="quick", verbose=0, **arguments)
    assert "by feature" in repr(report)
    return report.settings


def curve(model, x, y, eps, **arguments):
    radii = [0.5 * eps, eps]
    found = robustness_curve(model, x, y, eps=radii, suite="quick", verbose=0, **arguments)
    assert found.eps == pytest.approx([max(radius[~MASK]) for radius in radii])
    return found.settings | {"eps": eps.tolist()}


def monitor(model, x, y, **arguments):
    callback = RobustnessMonitor(x, y, **arguments)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert "val_robust_accuracy" in model.fit(x, y, callbacks=[callback], verbose=0).history
    return callback._evaluator.settings


def train(model, x, y, **arguments):
    robust = AdversarialTraining(model, **arguments)
    robust.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    robust.fit(x, y, verbose=0)
    return robust.threat.to_dict()


@pytest.mark.parametrize("call", some_short([evaluate, curve, monitor, train], more=[curve, monitor]))
def test_each_call_takes_them_in_every_form(call):
    threat = ThreatModel(**ARGUMENTS)
    model, _, x, y = model_and_inputs(threat)
    settings = call(model, x, y, **ARGUMENTS)
    assert json.loads(json.dumps({name: settings[name] for name in ARGUMENTS})) == {
        "eps": (0.3 * EPS).tolist(),
        "clip_min": LOW.tolist(),
        "clip_max": HIGH.tolist(),
        "mask": MASK.tolist(),
    }


@pytest.mark.parametrize("method", some_short(["pgd", "fgsm", "trades", "mart", "consistency"], "pgd"))
def test_the_attack_of_a_training_leaves_masked_features(method):
    threat = THREATS["both"]
    model, _, x, y = model_and_inputs(threat)
    robust = AdversarialTraining(model, threat=threat, method=method)
    attacked = robust._attack(Classifier(model), ops.convert_to_tensor(x), ops.convert_to_tensor(y), ops.ones(()))
    moved = np.abs(values(attacked.adversarial) - x) / EPS
    assert not moved[:, MASK].any()
    assert moved.max() <= 1 + 1e-4
    assert (moved[:, ~MASK].max(0) > (0.002 if method == "trades" else 0.5)).all()


def test_equal_numbers_in_any_form_are_equal():
    forms = [EPS, EPS.tolist(), tuple(EPS)]
    threats = {ThreatModel(eps, clip_min=LOW, clip_max=HIGH) for eps in forms}
    assert len(threats) == 1
    (threat,) = threats
    assert eval(repr(threat)) == threat
    of_tensor = ThreatModel(ops.convert_to_tensor(EPS, "float32"), clip_min=LOW, clip_max=HIGH)
    assert of_tensor.eps == pytest.approx(threat.eps)
    assert ThreatModel([0.1], mask=[False]) == ThreatModel(0.1)
    assert ThreatModel(**threat.to_dict()) == threat
    assert threat.with_radius(10).eps == pytest.approx(tuple(EPS / 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": [0.1, -0.1]}, "`eps` must be a number >= 0. Received: eps=-0.1"),
        ({"eps": [0.0, 0.0]}, "`eps` must hold a positive number"),
        ({"eps": [0.1, float("nan")]}, "`eps` must be a number >= 0. Received: eps=nan"),
        ({"eps": [[0.1], [0.1, 0.2]]}, "`eps` must hold rows of equal length"),
        ({"eps": ["a", "b"]}, "`eps` must hold numbers"),
        ({"eps": []}, "`eps` must hold numbers"),
        ({"eps": [0.1, 2.0]}, "`eps` must be no larger than the range"),
        ({"eps": 0.1, "clip_max": [1.0, 0.05]}, "`eps` must be no larger than the range"),
        ({"eps": 0.1, "clip_min": [0.0, 1.0]}, "`clip_min` must be below `clip_max`"),
        ({"eps": [0.1, 0.1], "clip_min": [0, 0, 0]}, "must have shapes that fit each other"),
        ({"eps": 0.1, "mask": [True, True]}, "`mask` must leave at least one feature"),
        ({"eps": [0.1, 0.0], "mask": [True, False]}, "`mask` must leave at least one feature"),
        ({"eps": 0.1, "mask": [0.5, 1]}, "`mask` must hold True or False"),
        ({"eps": 0.1, "mask": True}, "`mask` must hold True or False"),
        ({"eps": 0.1, "mask": "pixels"}, "`mask` must hold"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[").replace("(", r"\(")):
        ThreatModel(**arguments)


@pytest.mark.parametrize("name", ["eps", "clip_min", "clip_max", "mask"])
def test_numbers_that_do_not_fit_the_inputs_are_named(name):
    arguments = {"eps": 0.1} | {name: {"clip_min": [0.0] * 3, "clip_max": [1.0] * 3}.get(name, [0.1, 0.2, 0.0])}
    arguments |= {"mask": [True, False, False]} if name == "mask" else {}
    x, y = np.full((4, 4), 0.5, "float32"), np.zeros(4, int)
    with pytest.raises(ValueError, match=rf"`{name}` must be one number or fit inputs of shape \(4,\)"):
        evaluate_robustness(linear_model(), x, y, **arguments, suite="quick", verbose=0)


def test_the_report_tells_the_radius_of_features():
    threat = THREATS["both"]
    model, _, x, y = model_and_inputs(threat)
    report = evaluate_robustness(model, x, y, threat=threat, suite="quick", verbose=0)
    assert "eps 0.05 to 20, by feature of -100..120, masked" in " ".join(str(report).split())


def test_a_batch_of_images_has_a_radius_per_channel():
    eps = [0.1, 0.0, 0.2]
    rng = np.random.default_rng(0)
    x = rng.uniform(0.3, 0.7, (6, 5, 5, 3)).astype("float32")
    model = keras.Sequential(
        [keras.Input((5, 5, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    y = values(model(x)).argmax(1)
    attacks = [PGD(eps), Square(eps, queries=100), Noise(eps, norm=2), APGD(eps, norm=1, steps=10)]
    for attack in (*attacks, Square(eps, queries=100, norm=2), Square(eps, queries=100, norm=1)):
        moved = np.abs(attack(model, x, y) - x).max((0, 1, 2))
        assert moved[1] == 0
        # In L1 few features move, those of the largest radius first.
        assert moved[0] > 0 or attack.norm == 1
        assert moved[0] <= 0.1 + 1e-6
        assert 0 < moved[2] <= 0.2 + 1e-6


def test_reports_states_and_merges_know_them(tmp_path):
    threat = THREATS["both"]
    model, _, x, y = model_and_inputs(threat)
    options = {"threat": threat, "suite": "quick", "verbose": 0}
    report = evaluate_robustness(model, x, y, **options, state_path=tmp_path / "state")
    again = evaluate_robustness(model, x, y, **options, state_path=tmp_path / "state")
    assert again.per_example == report.per_example
    with pytest.raises(ValueError, match="settings"):
        evaluate_robustness(model, x, y, **options | {"threat": THREATS["eps"]}, state_path=tmp_path / "state")
    report.to_json(tmp_path / "report.json")
    settings = keras_drsl.RobustnessReport.from_json(tmp_path / "report.json").settings
    assert ThreatModel(**{name: settings[name] for name in threat.to_dict()}) == threat
    parts = [evaluate_robustness(model, x, y, **options, shard=(i, 2)) for i in range(2)]
    assert keras_drsl.RobustnessReport.merge(parts).per_example == report.per_example


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", [20.0, "0.05", 1.0, 0.3]),
        ("eps", [[20.0, 0.05], [1.0]]),
        ("eps", []),
        ("eps", [20.0, -0.05, 1.0, 0.3]),
        ("eps", [20.0, 0.05, 100.0, 0.3]),
        ("clip_min", [0.0, 0.0]),
        ("mask", [0, 0, 1, 0]),
        ("mask", [True, True, True, True]),
        ("mask", True),
        ("output", ["cat"]),
        ("output", -1),
    ],
)
def test_reports_with_wrong_numbers_are_refused(name, value, tmp_path):
    threat = THREATS["both"]
    model, _, x, y = model_and_inputs(threat, 10)
    evaluate_robustness(model, x, y, threat=threat, attacks=["fgsm_ce"], checks=[], verbose=0).to_json(tmp_path / "a")
    content = json.loads((tmp_path / "a").read_text())
    content["settings"][name] = value
    (tmp_path / "b").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="settings"):
        keras_drsl.RobustnessReport.from_json(tmp_path / "b")
