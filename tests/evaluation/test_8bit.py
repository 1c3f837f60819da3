"""Images of integer values: what attacks find among real values is tried once more when rounded."""

import json

import numpy as np
import pytest
from keras import ops

from keras_drsl import RobustnessReport, ThreatModel, evaluate_robustness
from keras_drsl.attacks import Attack
from tests.linear import distance, linear_model

# The weights of both classes have one sum, so their border goes through grey images of any brightness.
TWO = np.array([[1.0, 0.0], [-0.71, 0.0], [-0.52, 0.0], [0.23, 0.0]], "float32")
EPS = 2.5


class Corner(Attack):
    """Move to the corner of the ball that is worst for a linear model of two classes."""

    def run(self, classifier, batch):
        towards = np.sign(TWO[:, 1] - TWO[:, 0]) * np.where(batch.y == 0, 1, -1)[:, None]
        return (batch.x + self.eps * towards).astype("float32")


def integers(count=200, centre=100):
    x = np.random.default_rng(0).integers(centre - 9, centre + 10, (count, 4))
    return x.astype("uint8"), (x @ TWO).argmax(axis=1)


def evaluate(x, y, **options):
    attacks, threat = [Corner(EPS, clip_max=255)], {"eps": EPS, "clip_max": 255}
    return evaluate_robustness(linear_model(TWO), x, y, **threat, attacks=attacks, checks=[], verbose=0, **options)


def test_rounded_images_are_counted_apart():
    x, y = integers()
    size = distance(x.astype("float64"), y, "inf", TWO)
    report = evaluate(x, y)
    assert report.robust_accuracy == (size > EPS).mean()
    # Integers within 2.5 are those within 2.
    expected = size < 2
    np.testing.assert_array_equal(report.per_example["broken_rounded"], expected)
    assert report.robust_accuracy < report.robust_accuracy_8bit == pytest.approx(1 - expected.mean())
    assert f"as 8-bit images  {1 - expected.mean():7.1%}   upper bound" in str(report)
    assert f"Against images rounded to 8 bits: **{1 - expected.mean():.1%}**" in report.to_markdown()


def test_images_that_are_misclassified_without_an_attack_are_broken():
    x, y = integers()
    y[:10] = 1 - y[:10]
    report = evaluate(x, y)
    assert report.per_example["broken_rounded"][:10] == [True] * 10


def test_other_inputs_are_not_rounded():
    x, y = integers()
    report = evaluate(x.astype("float32"), y)
    assert "broken_rounded" not in report.per_example
    assert report.robust_accuracy_8bit is None
    assert "8-bit" not in str(report) + report.to_markdown()


def test_files_shards_and_states_keep_it(tmp_path):
    x, y = integers()
    whole = evaluate(x, y, batch_size=16, state_path=tmp_path / "state")
    again = evaluate(x, y, batch_size=16, state_path=tmp_path / "state")
    merged = RobustnessReport.merge([evaluate(x, y, shard=(part, 2)) for part in range(2)])
    whole.to_json(tmp_path / "report.json")
    for report in (again, merged, RobustnessReport.from_json(tmp_path / "report.json")):
        assert report.per_example == whole.per_example


@pytest.mark.parametrize("source", ["robust", "clean", "text"])
def test_reports_that_contradict_themselves_are_refused(tmp_path, source):
    x, y = integers()
    y[0] = 1 - y[0]
    report = evaluate(x, y).to_dict()
    rounded, broken_by = report["per_example"]["broken_rounded"], report["per_example"]["broken_by"]
    rounded[broken_by.index({"robust": None, "clean": "clean", "text": "corner"}[source])] = {
        "robust": True,
        "clean": False,
        "text": "yes",
    }[source]
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"`per_example.broken_rounded(\[\d+\])?` must"):
        RobustnessReport.from_json(tmp_path / "report.json")


@pytest.mark.parametrize("norm", ["inf", 2, 1])
@pytest.mark.parametrize("eps", [0.4, 1.6, [3.6, 0.7, 0, 9.2]])
def test_rounding_stays_in_the_ball(norm, eps):
    rng = np.random.default_rng(0)
    threat = ThreatModel(eps, norm, 0, 255)
    x = rng.integers(0, 256, (300, 4)).astype("float32")
    x_adv = np.asarray(ops.convert_to_numpy(threat.project((x + rng.normal(0, 5, x.shape)).astype("float32"), x)))
    rounded = threat.round_to_integers(x_adv, x)
    np.testing.assert_array_equal(rounded, np.rint(rounded))
    assert threat.contains(rounded, x).all()
    delta, moved = x_adv.astype("float64") - x, rounded.astype("float64") - x
    radii = np.broadcast_to(np.asarray(eps, "float64"), (4,))
    if norm == "inf":
        nearest = np.rint(delta)
        np.testing.assert_array_equal(moved, np.where(np.abs(nearest) <= radii, nearest, np.trunc(delta)))
    else:
        assert (np.abs(moved) <= np.ceil(np.abs(delta) + 1e-4)).all()
        assert (np.abs(moved) >= np.floor(np.abs(delta) - 1e-4)).all()


def test_rounding_keeps_most_of_a_perturbation_of_many_features():
    rng = np.random.default_rng(0)
    threat = ThreatModel(127.5, 2, 0, 255)
    x = rng.integers(50, 200, (4, 64, 64, 3)).astype("float32")
    x_adv = ops.convert_to_numpy(threat.project((x + rng.normal(0, 5, x.shape)).astype("float32"), x))
    delta, moved = x_adv - x, threat.round_to_integers(x_adv, x) - x
    assert threat.contains(x + moved, x).all()
    cosine = (delta * moved).sum((1, 2, 3)) / np.sqrt((delta**2).sum((1, 2, 3)) * (moved**2).sum((1, 2, 3)))
    assert cosine.min() > 0.8
