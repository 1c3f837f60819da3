"""Certificates by randomized smoothing, on models whose true radius is known."""

import importlib
import importlib.util
import json
import math
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_drsl
from keras_drsl import CertificateReport, SmoothedClassifier, certify
from keras_drsl._intervals import confidence_sequence, is_outside_sequence
from keras_drsl.certificates import bounds
from tests.linear import inputs, linear_model

stats = pytest.importorskip("scipy.stats")
SIGMA = 0.25
QUIET = {"sigma": SIGMA, "draws": 500, "verbose": 0}


def two_classes(dimension=2):
    """Return a model that returns class 1 where the mean of the inputs is above 1/2."""
    weights = np.full((dimension, 1), dimension**-0.5) * [-1.0, 1.0]
    model = keras.Sequential([keras.Input((dimension,)), layers.Dense(2)])
    model.layers[0].set_weights([weights, np.array([0.5, -0.5]) * dimension**0.5])
    return model


def at_distances(distances, dimension=2):
    """Return inputs of class 1 at some distances from the boundary of that model."""
    return (0.5 + np.reshape(distances, (-1, 1)) * dimension**-0.5 * np.ones((1, dimension))).astype("float32")


def coverage_of(draws, count):
    """Certify points whose true radius is known, and return true radii and certified ones."""
    distances = np.linspace(0.1 * SIGMA, 2 * SIGMA, count)
    labels = np.ones(count, int)
    report = certify(
        two_classes(), at_distances(distances), labels, sigma=SIGMA, draws=draws, batch_size=20_000, verbose=0
    )
    return distances, report.radii


@pytest.mark.short
def test_radii_are_below_the_true_ones():
    distances, radii = coverage_of(2_000, 200)
    assert (radii > distances).sum() <= 2
    assert (radii / distances).mean() >= 0.8


@pytest.mark.more
def test_many_draws_come_near_the_true_radii():
    distances, radii = coverage_of(100_000, 1_000)
    assert (radii > distances).mean() <= 0.003
    assert (radii / distances).mean() >= 0.95
    assert radii.max() <= SIGMA * stats.norm.ppf(0.001 ** (1 / 100_000))


def test_no_radius_is_above_that_of_equal_draws():
    report = certify(two_classes(), at_distances([5.0]), [1], **QUIET)
    assert report.radii[0] == pytest.approx(SIGMA * stats.norm.ppf(0.001 ** (1 / 500)))


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (1, 10), (51, 100), (999, 1_000), (1_000, 1_000)])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_the_bound_is_that_of_other_libraries(hits, count, alpha):
    bound = bounds.lower_bound(hits, count, alpha)
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected, _ = proportion.proportion_confint(hits, count, alpha=2 * alpha, method="beta")
    assert bound == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("art") is None, reason="needs the extra rivals")
@pytest.mark.parametrize(("hits", "count"), [(51, 100), (999, 1_000)])
def test_the_bound_is_that_of_art(hits, count):
    smoothing = importlib.import_module("art.estimators.certification.randomized_smoothing.randomized_smoothing")
    mixin = type("Mixin", (smoothing.RandomizedSmoothingMixin,), {"__init__": lambda self: None, "alpha": 0.001})
    expected = mixin._lower_confidence_bound(mixin(), hits, count)
    assert bounds.lower_bound(hits, count, 0.001) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (3, 7), (90, 100), (500, 500)])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_a_share_is_outside_where_the_sequence_says(hits, count, alpha):
    low, high = confidence_sequence(hits, count, alpha)
    for share in (0.01, 0.3, 0.5, 0.9, 0.99):
        outside = is_outside_sequence(share, np.array([hits]), np.array([count]), alpha)
        assert outside[0] == (not low <= share <= high)


def test_early_ends_are_wrong_as_rarely_as_promised():
    """Of a share that is exactly that of the radius, at most alpha of all sequences may say that it is above."""
    radius, alpha, random = 0.2, 0.05, np.random.default_rng(0)
    share = stats.norm.cdf(radius / SIGMA)
    wrong = 0
    for _ in range(2_000):
        rule = bounds.Rule(1_000, alpha, SIGMA, radius)
        rule.add(random.random(1_000) < share)
        wrong += rule.radius > radius
    assert wrong <= stats.binom.ppf(0.999, 2_000, alpha)
    assert wrong > 0  # so that the test can fail


def test_early_ends_do_not_depend_on_the_batches():
    hits = np.random.default_rng(0).random(3_000) < 0.93
    whole, parts = (bounds.Rule(3_000, 0.001, SIGMA, 0.3) for _ in range(2))
    whole.add(hits)
    while not parts.has_ended:
        parts.add(hits[parts.count : parts.count + 7])
    assert whole.has_ended
    assert whole.count < 3_000
    assert (whole.hits, whole.count, whole.radius) == (parts.hits, parts.count, parts.radius)


def test_draws_end_early_where_nothing_is_certified():
    report = certify(two_classes(), at_distances([1.0, -1.0]), [1, 1], sigma=SIGMA, draws=10_000, verbose=0)
    assert report.per_example["draws"] == [10_100, 100]
    assert report.per_example["prediction"] == [1, 0]
    assert report.draws_used == pytest.approx(10_200 / 20_200)
    # A share of 0.4 is below 1/2 with certainty after a few hundred draws.
    rule = bounds.Rule(10_000, 0.001, SIGMA, None)
    rule.add(np.random.default_rng(0).random(10_000) < 0.4)
    assert rule.has_ended
    assert 10 < rule.count < 1_000
    assert rule.radius == 0
    assert rule.abstains


def test_a_radius_is_decided_with_fewer_draws():
    x, y = at_distances(np.linspace(0.05, 0.5, 20)), np.ones(20, int)
    decided = certify(two_classes(), x, y, sigma=SIGMA, draws=10_000, radius=0.25, verbose=0)
    whole = certify(two_classes(), x, y, sigma=SIGMA, draws=10_000, verbose=0)
    assert decided.draws_used < 0.5 * whole.draws_used
    differ = (decided.radii >= 0.25) != (whole.radii >= 0.25)
    assert differ.sum() <= 1  # at the boundary
    assert f"{decided.accuracy(0.25):.1%}" in str(decided)


@pytest.mark.short
def test_shards_and_batches_change_nothing(tmp_path):
    model, (x, y) = linear_model(), inputs(12)
    whole = certify(model, x, y, **QUIET)
    shards = [certify(model, x, y, shard=(i, 3), batch_size=64, **QUIET) for i in (2, 0, 1)]
    merged = CertificateReport.merge(shards)
    assert merged.per_example == whole.per_example
    assert {*merged.per_example["draws"]} != {100}
    path = tmp_path / "report.json"
    merged.to_json(path)
    again = CertificateReport.from_json(path)
    assert vars(again) == vars(merged)


def test_shards_that_do_not_fit_are_refused():
    model, (x, y) = linear_model(), inputs(6)
    first = certify(model, x, y, shard=(0, 2), **QUIET)
    with pytest.raises(ValueError, match="share some"):
        CertificateReport.merge([first, first])
    other = certify(model, x, y, shard=(1, 2), **QUIET | {"sigma": 0.5})
    with pytest.raises(ValueError, match="different settings"):
        CertificateReport.merge([first, other])
    for reports in ([], [first, 3]):
        with pytest.raises(ValueError, match="at least one"):
            CertificateReport.merge(reports)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    model, (x, y), path = linear_model(), inputs(10), tmp_path / "state"
    whole = certify(model, x, y, **QUIET)
    from keras_drsl.certificates import state

    monkeypatch.setattr(state, "EVERY", 0.0)
    add, seen = state.State.add, []

    def stop(self, index, row):
        add(self, index, row)
        seen.append(index)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(state.State, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        certify(model, x, y, state_path=path, **QUIET)
    report = certify(model, x, y, state_path=path, batch_size=100, **QUIET)
    assert seen == list(range(10))
    assert report.per_example == whole.per_example
    with pytest.raises(ValueError, match="that of another one. Different: settings"):
        certify(model, x, y, state_path=path, **QUIET | {"sigma": 0.3})
    path.write_text(path.read_text().replace('"draws": 600', '"draws": 601'))
    with pytest.raises(ValueError, match="checksum"):
        certify(model, x, y, state_path=path, **QUIET)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sigma": 0}, "`sigma` must be a positive number"),
        ({"sigma": math.nan}, "`sigma` must be a positive number"),
        ({"alpha": 0.5}, "`alpha` must be a number in"),
        ({"draws": 9}, "`draws` must be at least 10 for any certificate at alpha=0.001. Received: draws=9"),
        ({"draws": 1.5}, "`draws` must be an integer"),
        ({"radius": 0.0}, "`radius` must be a positive number"),
        ({"radius": 2.0}, "`radius` must be one that 500 draws can certify"),
        ({"selection_draws": 0}, "`selection_draws`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"shard": (2, 2)}, "`shard`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_bad_arguments_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        certify(linear_model(), *inputs(2), **QUIET | options)


def test_ten_draws_are_enough_for_a_certificate():
    report = certify(two_classes(), at_distances([5.0]), [1], sigma=SIGMA, draws=10, verbose=0)
    assert report.radii[0] > 0


def test_a_nan_is_no_vote():
    class Fails(layers.Layer):
        def call(self, x):
            return x + ops.where(x[:, :1] > 0.7, float("nan"), 0.0)

    # The first class of a row of NaN would be 0, the label.
    model = keras.Sequential([keras.Input((2,)), Fails(), two_classes()])
    x = at_distances([-0.1])
    report = certify(model, x, [0], **QUIET)
    are_numbers = stats.norm.cdf((0.7 - float(x[0, 0])) / SIGMA)
    assert report.per_example["hits"][0] < 500 * are_numbers * 1.01
    votes = SmoothedClassifier(model, SIGMA, seed=0).votes(x, draws=2_000)
    assert votes.sum() == pytest.approx(2_000 * are_numbers, rel=0.05)


def test_the_text_and_the_figure_show_the_accuracies(tmp_path):
    pytest.importorskip("matplotlib")
    report = certify(linear_model(), *inputs(10), **QUIET)
    assert report.accuracy(0) == (report.radii > 0).mean()
    assert report.accuracy(0.1) == (report.radii >= 0.1).mean()
    assert f"{report.accuracy():.1%}" in str(report)
    assert f"{report.draws_used:.0%} of all draws" in str(report)
    axes = report.plot(tmp_path / "figure.png", label="one", others={"two": report})
    assert len(axes.lines) == 2
    np.testing.assert_allclose(axes.lines[0].get_ydata()[0], 100 * report.accuracy())


def test_the_page_shows_the_accuracies(tmp_path):
    pytest.importorskip("jinja2")
    report, path = certify(linear_model(), *inputs(10), **QUIET), tmp_path / "page.html"
    report.to_html(path, title="<script>")
    text = path.read_text()
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    middle = report.radii.max() / 2
    assert f"proven right on {100 * (report.radii >= middle).mean():.1f} %" in text
    assert f"at most {middle:.4g} an attacker makes" in text
    for radius in report.radii.max() * np.array([0.25, 0.5, 0.75, 1]):
        assert f'{radius:.4g}</th><td class="num">{100 * (report.radii >= radius).mean():.1f} %' in text
    # The curve falls from the certified accuracy to the share of the largest radius: 234 units are 100 %.
    line = re.search(r'<polyline class="line" points="([^"]*)"', text).group(1).split()
    heights = [(250 - float(point.split(",")[1])) / 234 for point in line]
    np.testing.assert_allclose([heights[0], heights[-1]], [report.accuracy(), 0.1], atol=1e-3)
    with pytest.raises(ValueError, match="overwrite"):
        report.to_html(path, overwrite=False)
    report.per_example["radius"] = [0.0] * 10
    report.to_html(path)
    assert "is proven right on none" in path.read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("settings"), "settings"),
        (lambda content: content["settings"].pop("sigma"), "sigma"),
        (lambda content: content["settings"].pop("norm"), "norm"),
        (lambda content: content.update(format="other"), "format"),
        (lambda content: content["per_example"]["radius"].__setitem__(0, -1.0), "radius"),
        (lambda content: content["per_example"]["radius"].pop(), "one length"),
        (lambda content: content["per_example"]["index"].__setitem__(0, 1), "once"),
        (lambda content: content.update(certified_accuracy=0.123), "certified_accuracy"),
        (lambda content: content["per_example"]["prediction"].__setitem__(0, None), "abstains"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, reason):
    report = certify(two_classes(), at_distances([0.5, 0.6]), [1, 1], **QUIET)
    content = report.to_dict()
    change(content)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        CertificateReport.from_json(path)


def test_noise_has_its_standard_deviation():
    model = keras.Sequential([keras.Input((20_000,)), layers.Identity()])
    smoothed = SmoothedClassifier(model, SIGMA, seed=0)
    first, second = (ops.convert_to_numpy(smoothed(np.zeros((1, 20_000), "float32"))) for _ in range(2))
    assert first.std() == pytest.approx(SIGMA, rel=0.02)
    assert not np.array_equal(first, second)


def test_votes_are_shares_of_the_true_ones():
    distance = 0.5 * SIGMA
    votes = SmoothedClassifier(two_classes(), SIGMA, seed=0).votes(at_distances([distance]), draws=4_000)
    assert votes.sum() == 4_000
    assert votes[0, 1] / 4_000 == pytest.approx(stats.norm.cdf(0.5), abs=0.03)


def test_a_smoothed_classifier_is_saved(tmp_path):
    smoothed = SmoothedClassifier(linear_model(), SIGMA, seed=3)
    x, _ = inputs(4)
    smoothed(x)
    smoothed.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert (again.sigma, again.seed) == (SIGMA, 3)
    np.testing.assert_allclose(again.model.predict(x, verbose=0), smoothed.model.predict(x, verbose=0), rtol=1e-6)


def test_training_is_on_noise():
    x, y = np.zeros((512, 4), "float32"), np.zeros(512, int)
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(momentum=0.0), layers.Dense(3)])
    smoothed = SmoothedClassifier(model, SIGMA, seed=0)
    smoothed.compile("sgd", keras_drsl.DRSLoss(0.1, from_logits=True))
    smoothed.fit(x, y, batch_size=512, verbose=0)
    np.testing.assert_allclose(model.layers[0].moving_variance, SIGMA**2, rtol=0.2)


def test_votes_need_a_unit_for_each_class():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    with pytest.raises(ValueError, match="a unit for each class"):
        SmoothedClassifier(model, SIGMA).votes(np.zeros((1, 4), "float32"))
    with pytest.raises(ValueError, match="`batch_size` must be an integer of 1"):
        SmoothedClassifier(linear_model(), SIGMA).votes(np.zeros((1, 4), "float32"), batch_size=0)


def test_another_reading_of_the_outputs_is_another_run(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, activation="sigmoid")])
    x, y, path = *inputs(2), tmp_path / "state"
    certify(model, x, y % 2, state_path=path, **QUIET)
    with pytest.raises(ValueError, match="Different: settings"):
        certify(model, x, y % 2, from_logits=True, state_path=path, **QUIET)


def test_a_radius_may_be_a_number_of_numpy(tmp_path):
    options = {"radius": np.float32(0.1), "sigma": np.float64(SIGMA)}
    certify(linear_model(), *inputs(2), **QUIET | options).to_json(tmp_path / "report.json")


def test_the_sequence_of_nearly_all_has_limits():
    low, high = confidence_sequence(99_999, 100_000, 1e-6)
    assert 0.999 < low < 0.99999 < high < 1


def test_certified_true_and_attacked_are_in_order():
    """The true radii of a linear model lie between those that are certified and those that an attack finds."""
    distances = np.linspace(0.02, 0.4, 40)
    x, y, eps = at_distances(distances), np.ones(40, int), 0.2
    certified = certify(two_classes(), x, y, sigma=SIGMA, draws=2_000, verbose=0).accuracy(eps)
    smoothed = SmoothedClassifier(two_classes(), SIGMA, seed=0)
    report = keras_drsl.evaluate_robustness(
        smoothed, x, y, eps=eps, norm=2, clip_min=-1, clip_max=2, suite="quick", checks=[], expectation_draws=16,
        keep_examples=True, verbose=0,
    )  # fmt: skip
    attacked = (smoothed.votes(report.x_adv, draws=1_000).argmax(axis=1) == y).mean()
    true = (distances > eps).mean()
    assert true - 0.15 <= certified <= true
    assert true <= attacked <= true + 0.15
