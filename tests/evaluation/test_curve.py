import json

import keras
import numpy as np
import pytest

from keras_drsl import robustness_curve
from tests.layers import Random
from tests.linear import distance, inputs, linear_model

RADII = [0.0, 0.05, 0.1, 0.2, 0.3]


@pytest.fixture(scope="module")
def curve():
    x, y = inputs(60)
    return robustness_curve(linear_model(), x, y, eps=RADII, attacks=["apgd_t_margin"], suite="quick", verbose=0)


def test_the_curve_of_a_linear_model_is_exact(curve):
    x, y = inputs(60)
    exact = distance(x, y, "inf")
    assert curve.accuracy == pytest.approx([(exact > eps).mean() for eps in RADII])
    bounds = np.array([*RADII, np.inf])
    np.testing.assert_array_equal(curve.breaking_eps, bounds[np.searchsorted(RADII, exact)])


def test_a_curve_can_be_written_and_drawn(curve, tmp_path):
    curve.to_json(tmp_path / "curve.json")
    content = json.loads((tmp_path / "curve.json").read_text())
    assert content["accuracy"] == curve.accuracy
    figures = pytest.importorskip("matplotlib.figure")
    axes = figures.Figure().subplots()
    assert curve.plot(ax=axes) is axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([RADII, np.multiply(curve.accuracy, 100)], axis=1))
    assert axes.get_legend() is None
    curve.plot(tmp_path / "curve.png", label="first", others={"second": curve})
    assert (tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="`path` must be a path where nothing exists"):
        curve.plot(tmp_path / "curve.png", overwrite=False)
    for _ in range(2):  # C9: as `keras.Model.save`
        curve.plot(tmp_path / "curve.png")
        curve.to_json(tmp_path / "curve.json")


def test_generators_and_numpy_integers_are_taken(curve):  # B9
    x, y = inputs(60)
    attacks = iter(["apgd_t_margin"])
    again = robustness_curve(
        linear_model(), x, y, eps=RADII, attacks=attacks, checks=iter([]), max_samples=np.int64(60), verbose=0
    )
    assert again.accuracy == curve.accuracy


def test_a_wrong_model_has_a_curve():
    x, y = inputs(10)
    curve = robustness_curve(linear_model(), x, (y + 1) % 3, eps=[0, 0.1], suite="quick", verbose=0)
    assert curve.accuracy == [0.0, 0.0]


@pytest.mark.parametrize("eps", [[], [0.2, 0.1], [0.1, 0.1], [-0.1], [0.1, 2], 0.1, "0.1"])
def test_bad_radii_are_refused(eps):
    x, y = inputs(5)
    with pytest.raises(ValueError, match="`eps` must"):
        robustness_curve(linear_model(), x, y, eps=eps, verbose=0)


def test_all_radii_are_checked_first(capsys):
    x, y = inputs(5)
    with pytest.raises(ValueError, match=r"`eps` must be no larger than the distance of two valid inputs, 2 in L2"):
        robustness_curve(linear_model(), x, y, eps=[0.1, 100], norm=2)
    assert capsys.readouterr().out == ""


def test_an_untrustworthy_curve_says_so():
    x, y = inputs(20)
    model = keras.Sequential([keras.Input((4,)), Random(), linear_model()])
    curve = robustness_curve(model, x, y, eps=[0.05], suite="quick", verbose=0)
    assert not curve.trustworthy
    assert not curve.to_dict()["trustworthy"]
    assert "an upper bound, of suite quick" in str(curve)  # D6
    assert str(curve).startswith("NOT TRUSTWORTHY")


def test_attacks_may_come_from_a_generator():
    x, y = inputs(20)
    names = ["fgsm_ce", "apgd_t_margin"]
    options = {"eps": [0.05, 0.1], "suite": "quick", "verbose": 0}
    listed = robustness_curve(linear_model(), x, y, attacks=names, **options)
    drawn = robustness_curve(linear_model(), x, y, attacks=(name for name in names), **options)
    assert drawn.to_dict() == listed.to_dict()
