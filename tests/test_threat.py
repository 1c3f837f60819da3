"""`ThreatModel` and the projections: expected values come from loops in NumPy."""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import ThreatModel
from keras_drsl.threat import farthest, project, random_delta, steepest_ascent
from tests.backends import values

pytestmark = pytest.mark.short


def points(count=30):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (count, 2, 3)).astype("float32")
    return x, (x + rng.normal(0, 0.5, x.shape)).astype("float32")


def nearest(x_adv, x, eps, norm, low, high):
    """Project one row in float64."""
    delta = x_adv.astype("float64") - x
    if norm == "inf":
        delta = np.array([max(-eps, min(eps, value)) for value in delta.ravel()]).reshape(delta.shape)
    elif norm == 1:
        return nearest_in_both(delta, x.astype("float64"), eps, low, high)
    else:
        length = math.sqrt(sum(value**2 for value in delta.ravel()))
        delta = delta * min(1.0, eps / length)
    return np.minimum(np.maximum(x + delta, low), high)


def nearest_in_both(delta, x, eps, low, high):
    """Return the nearest point of the L1 ball and the range, from a solver of constrained problems."""
    optimize = pytest.importorskip("scipy.optimize")
    sizes, signs = np.abs(delta).ravel(), np.sign(delta)
    room = np.where(delta > 0, high - x, x - low).ravel()
    found = optimize.minimize(
        lambda values: ((values - sizes) ** 2).sum(),
        np.zeros(len(sizes)),
        jac=lambda values: 2 * (values - sizes),
        bounds=[(0, value) for value in room],
        constraints={
            "type": "ineq",
            "fun": lambda values: eps - values.sum(),
            "jac": lambda values: -np.ones(len(sizes)),
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return x + signs * found.x.reshape(x.shape)


@pytest.mark.parametrize("eps", [0.05, 0.3, 1.0, 5.0])
def test_the_projection_in_l1_fits_ball_and_range(eps):
    threat = ThreatModel(eps, 1, clip_min=0.1, clip_max=0.9)
    x, x_adv = points()
    x = x.clip(0.1, 0.9)
    x[:5] = 0.1  # half of the directions have no room
    expected = [nearest(row_adv, row, eps, 1, 0.1, 0.9) for row_adv, row in zip(x_adv, x, strict=True)]
    found = values(threat.project(x_adv, x))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert threat.contains(found, x).all()
    # Each row may have a radius of its own.
    bounds = threat.tensors
    radii = np.where(np.arange(len(x)) % 2, eps, eps / 2).astype("float32").reshape(-1, 1, 1)
    by_row = project(*map(ops.convert_to_tensor, (x_adv, x)), bounds._replace(eps=ops.convert_to_tensor(radii)), 1)
    np.testing.assert_allclose(values(by_row)[1::2], found[1::2], atol=1e-6)
    np.testing.assert_allclose(
        values(by_row)[::2], values(threat.replace(eps=eps / 2).project(x_adv, x))[::2], atol=1e-6
    )


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_points_of_many_equal_features_lie_in_the_ball(value):
    threat = ThreatModel(12, 1)
    x = np.full((2, 224, 224, 3), value, "float32")
    x_adv = np.where(np.arange(3) < 2, 1 - x, x + 0.2).clip(0, 1).astype("float32")
    assert threat.size(x_adv.astype("float64") - x).min() > 1000
    found = values(threat.project(x_adv, x))
    np.testing.assert_allclose(threat.size(found.astype("float64") - x), 12, rtol=2e-3)
    assert threat.contains(found, x).all()
    step = values(steepest_ascent(ops.convert_to_tensor(x_adv - 0.5), 1))
    stepped = np.clip(x + 12 * step, 0, 1).astype("float32")
    assert threat.contains(stepped, x).all()
    assert not threat.contains((x + 1.01 * (found - x)).astype("float32"), x).any()


def test_the_projection_in_l1_keeps_radii_and_fixed_features():
    eps = np.array([0.2, 0.0, 0.1])
    threat = ThreatModel(eps, 1, mask=[False, False, False])
    x, x_adv = points()
    found = values(threat.project(x_adv, x))
    # In units of the radii it is the projection on the ball of radius 0.2 with features in those units.
    scaled = np.array([1.0, np.inf, 0.5])
    for row, row_adv, expected in zip(x, x_adv, found, strict=True):
        delta = np.where(eps > 0, (row_adv - row).astype("float64") / scaled, 0)
        low, high = np.where(eps > 0, -row / scaled, 0), np.where(eps > 0, (1 - row) / scaled, 0)
        shrunk = nearest_in_both(delta, np.zeros_like(delta), 0.2, low, high)
        np.testing.assert_allclose(
            row + np.where(eps > 0, shrunk * np.where(eps > 0, scaled, 0), 0), expected, atol=2e-6
        )
    masked = ThreatModel(0.3, 1, mask=[True, False, False])
    outside = x.copy()
    outside[..., 0] = 7.0
    moved = values(masked.project(x_adv, outside))
    np.testing.assert_array_equal(moved[..., 0], 7.0)
    np.testing.assert_allclose(np.abs(moved - outside).sum((1, 2)), 0.3, atol=1e-5)


def test_the_farthest_point_in_l1_fills_the_largest_gradients():
    x, gradient = points()
    gradient = gradient - 0.5
    threat = ThreatModel(0.9, 1)
    found = values(farthest(*map(ops.convert_to_tensor, (gradient, x)), threat.tensors))
    assert threat.contains(found, x).all()
    linprog = pytest.importorskip("scipy.optimize").linprog
    for row, slope, point in zip(x.reshape(30, -1), gradient.reshape(30, -1), found.reshape(30, -1), strict=True):
        # Of the parts above and below 0 of the change.
        limits = [(0, 1 - value) for value in row] + [(0, value) for value in row]
        best = linprog(np.concatenate([-slope, slope]), A_ub=np.ones((1, 12)), b_ub=[0.9], bounds=limits)
        assert ((point - row) * slope).sum() == pytest.approx(-best.fun, abs=1e-5)


@pytest.mark.parametrize("norm", ["inf", 2, 1])
def test_projections_are_the_nearest_points(norm):
    threat = ThreatModel(0.3, norm, clip_min=0.1, clip_max=0.9)
    x, x_adv = points()
    x = x.clip(0.1, 0.9)
    expected = [nearest(row_adv, row, 0.3, norm, 0.1, 0.9) for row_adv, row in zip(x_adv, x, strict=True)]
    np.testing.assert_allclose(values(threat.project(x_adv, x)), expected, atol=1e-6)
    tensors = map(ops.convert_to_tensor, (x_adv, x))
    np.testing.assert_allclose(values(project(*tensors, threat.tensors, norm)), expected, atol=1e-6)
    assert threat.contains(values(threat.project(x_adv, x)), x).all()


def test_sizes_and_contents_are_counted():
    x, x_adv = points()
    delta = x_adv.astype("float64") - x
    np.testing.assert_allclose(ThreatModel(1, "inf").size(delta), [max(abs(row.ravel())) for row in delta])
    np.testing.assert_allclose(ThreatModel(1, 1).size(delta), [sum(map(abs, row.ravel())) for row in delta])
    lengths = [math.sqrt((row**2).sum()) for row in delta]
    np.testing.assert_allclose(ThreatModel(1, 2).size(delta), lengths)
    inside = [length <= 1 and row.min() >= 0 and row.max() <= 1 for length, row in zip(lengths, x_adv, strict=True)]
    assert 0 < sum(inside) < len(inside)
    np.testing.assert_array_equal(ThreatModel(1, 2).contains(x_adv, x), inside)
    x_adv[0] = np.nan
    assert not ThreatModel(1, 2).contains(x_adv, x)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["inf", 2, 1])
def test_samples_fill_the_ball(norm, training):
    threat = ThreatModel(0.5, norm)
    if training:
        delta = values(random_delta((2000, 3), threat.tensors, norm, keras.random.SeedGenerator(0)))
    else:
        delta = threat.sample([np.random.default_rng(seed) for seed in range(2000)], (3,))
    sizes = threat.size(delta)
    np.testing.assert_allclose(delta.mean(0), 0, atol=0.02)
    np.testing.assert_allclose((delta > 0).mean(0), 0.5, atol=0.05)
    assert sizes.max() <= 0.5 + 1e-6
    # A share (r / eps)^3 of the ball's volume lies within r.
    assert np.mean(sizes <= 0.25) == pytest.approx(0.125, abs=0.03)


def test_the_steepest_step_has_size_one():
    gradient = np.array([[3.0, -4.0], [0.0, 0.0], [1e-30, 0.0]], "float32")
    np.testing.assert_array_equal(values(steepest_ascent(ops.convert_to_tensor(gradient), "inf")), np.sign(gradient))
    expected = [[0.6, -0.8], [0.0, 0.0], [1.0, 0.0]]
    np.testing.assert_allclose(values(steepest_ascent(ops.convert_to_tensor(gradient), 2)), expected, atol=1e-6)
    expected = [[0, -1], [0, 0], [1, 0]]
    np.testing.assert_array_equal(values(steepest_ascent(ops.convert_to_tensor(gradient), 1)), expected)
    # Three of 60 features, in units of their radii.
    gradient = np.array([np.arange(60.0) - 5, np.zeros(60)], "float32")
    scale = np.where(np.arange(60) == 59, 0.5, 1.0).astype("float32")
    step = values(steepest_ascent(ops.convert_to_tensor(gradient), 1, ops.convert_to_tensor(scale)))
    np.testing.assert_allclose(step[0], np.where(np.isin(np.arange(60), [56, 57, 58]), 1 / 3, 0), atol=1e-6)
    assert (step[1] == 0).all()


def test_equal_numbers_make_equal_threat_models():
    threat = ThreatModel(8 / 255, norm=np.inf)
    assert threat == ThreatModel(8 / 255, "inf", 0, 1)
    assert len({threat, ThreatModel(8 / 255), threat.replace(eps=0.1)}) == 2
    assert eval(repr(threat)) == threat
    assert ThreatModel(**threat.to_dict()) == threat


def test_a_threat_model_is_frozen():
    with pytest.raises(AttributeError):
        ThreatModel(0.1).eps = 0.2


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"eps": 0}, "`eps` must be a positive number. Received: eps=0"),
        ({"eps": math.nan}, "`eps` must be a positive number. Received: eps=nan"),
        ({"eps": 2}, "`eps` must be no larger than the range, clip_max - clip_min = 1. Received: eps=2"),
        ({"eps": 8}, r"Received: eps=8. Images in \[0, 255\] need clip_max=255"),
        ({"eps": 0.1, "norm": 3}, "`norm` must be one of 'inf', 2, 1. Received: norm=3"),
        ({"eps": 0.1, "clip_min": math.inf}, "`clip_min` must be a finite number. Received: clip_min=inf"),
        ({"eps": 0.1, "clip_min": 1}, "`clip_min` must be below `clip_max`. Received: clip_min=1.0, clip_max=1.0"),
        ({}, "`eps` or `threat` must be given. Received: neither"),
        ({"threat": 0.1}, "`threat` must be a keras_drsl.ThreatModel. Received: threat=0.1"),
        (
            {"threat": ThreatModel(0.1), "eps": 0.1, "clip_max": 1.0},
            "`threat` must be given without `eps`, `norm`, `clip_min`, `clip_max` and `mask`, which it holds. "
            r"Received: threat=ThreatModel\(.*\) and eps=0.1, clip_max=1.0",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        ThreatModel.from_arguments(**arguments)


def test_inputs_that_do_not_fit_are_named():
    x = np.full((2, 4), 0.5, "float32")
    ThreatModel(2, 2).validate("x", x)
    for norm, largest in ((2, 2), (1, 4)):
        ThreatModel(largest, norm).validate("x", x)
        with pytest.raises(ValueError, match=f"no larger than the distance of two valid inputs, {largest} in L{norm}"):
            ThreatModel(largest + 0.1, norm).validate("x", x)
    for bad in (x * 255, x * np.nan):
        with pytest.raises(
            ValueError, match=r"`images` must lie in \[clip_min, clip_max\] = \[0, 1\]. Received: values"
        ):
            ThreatModel(0.1).validate("images", bad)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ([0, 200], r" Images in \[0, 255\] need clip_max=255; the usual 8/255 of \[0, 1\] is eps=8 there."),
        ([-1, 1], r" Images in \[-1, 1\] need clip_min=-1; the usual 8/255 of \[0, 1\] is eps=16/255 there."),
        ([-300, 300], "to 300. Give clip_min and clip_max that hold all valid values.$"),
    ],
)
def test_inputs_out_of_range_are_told_the_usual_eps(values, hint):
    with pytest.raises(ValueError, match=hint):
        ThreatModel(8 / 255).validate("x", np.array([values], "float32"))


# D7
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("Linf", "inf"),
        ("L2", 2),
        ("l2", 2),
        ("L_inf", "inf"),
        (np.inf, "inf"),
        (2.0, 2),
        (np.int64(2), 2),
        ("2", 2),
        ("L1", 1),
        (1.0, 1),
    ],
)
def test_a_norm_is_read_as_people_write_it(norm, expected):
    threat = ThreatModel(0.1, norm)
    assert threat == ThreatModel(0.1, expected)
    assert json.loads(json.dumps(threat.to_dict()))["norm"] == expected


@pytest.mark.parametrize("norm", ["L3", "l", "", 3, 0, None, [2], True, float("nan"), -np.inf])
def test_a_norm_that_is_none_is_refused(norm):
    with pytest.raises(ValueError, match="`norm` must be one of 'inf', 2, 1. Received: norm="):
        ThreatModel(0.1, norm)


@pytest.mark.parametrize(("eps", "expected"), [("8/255", 8 / 255), (" 1/2 ", 0.5)])
def test_eps_is_read_as_people_write_it(eps, expected):
    assert ThreatModel(eps).eps == expected
    assert keras_drsl.attacks.FGSM(eps).eps == expected


@pytest.mark.parametrize("eps", ["0.1", "8/0", "1/x", "", "-1/255", "nan", "1e999", "1" * 5000 + "/1", "8 / 255 / 2"])
def test_a_text_that_is_no_eps_is_refused(eps):
    with pytest.raises(ValueError, match="`eps` must be "):
        ThreatModel(eps)
