"""Each check warns of what it is there for, and is silent about a model without fault."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import ThreatModel, evaluate_robustness
from keras_drsl.attacks import Attack
from keras_drsl.evaluation import Outcome, check
from keras_drsl.evaluation.checks import CHECKS
from keras_drsl.evaluation.checks.search import attack_robust_images
from keras_drsl.evaluation.checks.self_tests import breakable_model
from keras_drsl.evaluation.context import Audit, EvaluationContext
from keras_drsl.models.classifier import Classifier
from keras_drsl.models.logits import LogitsModel
from tests.helpers import some_short
from tests.layers import Quantised, Random
from tests.linear import WEIGHTS, distance, inputs, linear_model


def checks_of(model, *, eps=0.15, attacks=("apgd_t_margin",), classes=3, **options):
    x, y = inputs(60, WEIGHTS[:, :classes])
    report = evaluate_robustness(model, x, y, eps=eps, attacks=attacks, verbose=0, **options)
    return {check.name: check for check in report.checks}, report


@pytest.fixture
def new_check():
    """Return the decorator `check`; its checks leave the registry after the test."""
    before = dict(CHECKS)
    yield check
    CHECKS.clear()
    CHECKS.update(before)


@pytest.mark.short
def test_a_sound_model_passes_all_checks():
    # Of two classes: with more, the cross-entropy's attacks are not exact on a linear model, which a check says.
    checks, report = checks_of(linear_model(WEIGHTS[:, :2]), attacks=("apgd_t_margin", "noise"), classes=2)
    assert {name for name, check in checks.items() if check.status != "pass"} == set()
    assert report.trustworthy


def test_wrong_labels_are_seen():
    x, y = inputs(60)
    report = evaluate_robustness(linear_model(), x, (y + 1) % 3, eps=0.1, suite="quick", verbose=0)
    assert next(check for check in report.checks if check.name == "clean_accuracy").status == "warn"


def test_a_hidden_gradient_is_seen():
    checks, report = checks_of(keras.Sequential([keras.Input((4,)), Quantised(), linear_model()]))
    for name in ("gradients", "unbounded", "noise"):
        assert checks[name].status in ("warn", "fail"), name
    assert checks["gradients"].value == 1
    assert not report.trustworthy


def test_images_that_only_square_breaks_are_seen():
    model = keras.Sequential([keras.Input((4,)), Quantised(), linear_model()])
    checks, _ = checks_of(model, attacks=("apgd_t_margin", "square"), suite="quick")
    assert checks["black_box"].status == "fail"


def test_square_listed_first_still_runs_last():
    checks, _ = checks_of(linear_model(), attacks=("square", "apgd_t_margin"), suite="quick")
    assert checks["black_box"].status == "pass"


def test_a_check_that_raises_an_error_has_failed(new_check):
    @new_check()
    def breaks_down(context):
        raise RuntimeError("no")

    checks, report = checks_of(linear_model(), suite="quick", checks=[breaks_down])
    assert checks["breaks_down"].status == "fail"
    assert "RuntimeError: no" in checks["breaks_down"].message
    assert report.num_examples == 60

    def fails(context):
        raise RuntimeError("cannot tell")

    @new_check(suites=["quick"], applies=fails)
    def cannot_tell(context):
        raise AssertionError

    checks, _ = checks_of(linear_model(), suite="quick")
    assert "RuntimeError: cannot tell" in checks["cannot_tell"].message


def test_a_random_model_is_seen():
    checks, report = checks_of(keras.Sequential([keras.Input((4,)), Random(), linear_model()]), suite="quick")
    assert checks["deterministic"].status == "fail"
    assert not report.trustworthy


class Nothing(Attack):
    """An attack that changes nothing, for tests of checks."""

    def run(self, classifier, batch):
        return batch.x


class Dependent(keras.Model):
    """A linear model with a fault: its answer for a row depends on the batch, or on the calls before."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.normalize = keras.layers.BatchNormalization()
        self.attention = keras.layers.MultiHeadAttention(1, 2)
        self.dense = keras.layers.Dense(3)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.last = self.add_weight(shape=(4,), initializer="zeros", trainable=False)
        self.number = 0

    def call(self, x):
        return FAULTS[self.fault](self, x)


def remember(model, x):
    """Add the mean of the last batch."""
    z = model.dense(x) + model.dense(model.last[None])
    model.last.assign(ops.mean(x, axis=0))
    return z


def count(model, x):
    model.calls.assign_add(1.0)
    return model.dense(x) + model.calls * ops.convert_to_tensor([0.0, 0.1, 0.2])


def alternate(model, x):
    model.calls.assign_add(1.0)
    return model.dense(x) * (1 - 2 * (model.calls % 2))


def count_in_python(model, x):
    model.number += 1
    return model.dense(x) + model.number * ops.convert_to_tensor([0.0, 0.1, 0.2])


FAULTS = {
    "statistics": lambda model, x: model.dense(model.normalize(x, training=True)),
    "mean": lambda model, x: model.dense(x - ops.mean(x, axis=0)),
    "largest": lambda model, x: model.dense(x / ops.max(x)),
    "logits": lambda model, x: (lambda z: z / ops.std(z))(model.dense(x)),
    "first row": lambda model, x: model.dense(x) + 0.1 * model.dense(x[:1]),
    "order": lambda model, x: model.dense(x + 0.1 * ops.roll(x, 1, axis=0)),
    "attention": lambda model, x: model.dense(x + model.attention(x[None], x[None])[0]),
    "softmax over rows": lambda model, x: ops.softmax(model.dense(x), axis=0),
    "softmax of a mean": lambda model, x: ops.softmax(model.dense(x - ops.mean(x, axis=0))),
    "counter": count,
    "counter that alternates": alternate,
    "counter behind softmax": lambda model, x: ops.softmax(count(model, x)),
    "python counter": count_in_python,
    "python counter behind softmax": lambda model, x: ops.softmax(count_in_python(model, x)),
    "last batch": remember,
}


SHORT_FAULTS = ("statistics", "softmax of a mean", "counter behind softmax")
OTHER_FAULTS = set(FAULTS) - {*SHORT_FAULTS, "attention", "last batch"}


@pytest.mark.parametrize("num_examples", [1, 60])
@pytest.mark.parametrize("fault", some_short(FAULTS, *SHORT_FAULTS, more=OTHER_FAULTS))
def test_rows_that_depend_on_others_are_seen(fault, num_examples):  # B1
    x, y = inputs(60)
    x, y = x[:num_examples], y[:num_examples]
    model = Dependent(fault)
    model(x)
    options = {"attacks": [Nothing(0.1)], "checks": ["deterministic", "independent_rows"], "verbose": 0}
    for batch_size in (1, 256):
        report = evaluate_robustness(model, x, y, eps=0.1, batch_size=batch_size, **options)
        statuses = {check.name: check.status for check in report.checks}
        failed = "deterministic" if "counter" in fault or fault == "last batch" else "independent_rows"
        assert statuses[failed] == "fail", batch_size
        assert not report.trustworthy


@pytest.mark.short
def test_a_state_that_depends_on_inputs_stops_no_attack():
    class Counting(keras.Model):
        """A model with the statistics of the batch, which counts the positive sums of its inputs."""

        def __init__(self):
            super().__init__()
            self.normalization = keras.layers.BatchNormalization()
            self.linear = linear_model()
            self.counter = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

        def call(self, x, training=None):
            self.counter.assign(self.counter + ops.cast(ops.sum(x) > 0, "int32"))
            return self.linear(self.normalization(x, training=True))

    x, y = inputs(20)
    report = evaluate_robustness(
        Counting(), x, y, eps=0.1, attacks=["pgd_margin"], checks=["independent_rows"], verbose=0
    )
    assert report.checks[0].status == "fail"


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_hides_no_dependence(policy):  # B1
    x, y = inputs(60)
    dense = keras.layers.Dense(3, dtype=policy)
    z = dense(image := keras.Input((4,)))
    model = keras.Model(image, z + 0.3 * ops.mean(z, axis=0))
    dense.set_weights([10 * WEIGHTS, np.zeros(3)])
    options = {"attacks": [Nothing(0.1)], "checks": ["independent_rows"], "verbose": 0}
    (check,) = evaluate_robustness(model, x, y, eps=0.1, **options).checks
    assert check.status == "fail"


def test_equal_inputs_hide_no_dependence():  # B1
    x, y = np.ones((20, 4), "float32"), np.zeros(20, int)
    model = Dependent("largest")
    model(x)
    options = {"attacks": [Nothing(0.1)], "checks": ["independent_rows"], "verbose": 0}
    report = evaluate_robustness(model, x, y, eps=0.1, **options)
    assert report.checks[0].status == "fail"


@pytest.mark.parametrize("policy", some_short(["float32", "mixed_float16", "mixed_bfloat16"], more=["mixed_float16"]))
@pytest.mark.parametrize("scale", some_short([0.01, 300], more=[0.01]))
def test_rounding_is_no_dependence_on_rows(policy, scale):  # B1
    layers = keras.layers
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters in (16, 32, 32):
        model.add(layers.Conv2D(filters, 3, padding="same", dtype=policy))
        model.add(layers.BatchNormalization(dtype=policy))
        model.add(layers.Activation("relu", dtype=policy))
    model.add(layers.Flatten())
    model.add(layers.Dense(10, dtype=policy))
    model.add(layers.Rescaling(scale, dtype=policy))
    generator = np.random.default_rng(0)
    x, y = generator.random((64, 8, 8, 1), "float32"), generator.integers(0, 10, 64)
    for head in ([], [layers.Softmax()]):
        options = {"attacks": [Nothing(0.1)], "checks": ["deterministic", "independent_rows"], "verbose": 0}
        report = evaluate_robustness(keras.Sequential([model, *head]), x, y, eps=0.1, **options)
        assert [check.status for check in report.checks] == ["pass"] * 2


def test_huge_logits_are_seen():
    checks, _ = checks_of(linear_model(WEIGHTS * 1e4))
    assert checks["logit_scale"].status == "warn"
    assert checks["gradients"].status == "warn"
    assert checks["losses_agree"].status == "warn"
    assert "Rescaling" not in checks["logit_scale"].message


def test_images_of_8_bits_for_a_model_of_0_to_1_are_seen():
    x, y = inputs(60)
    options = {"eps": 8, "clip_max": 255, "attacks": ["pgd_margin"], "verbose": 0}
    for labels, name in ((0 * y, "clean_accuracy"), (y, "logit_scale")):
        model = linear_model(WEIGHTS * 1e4)
        (found,) = evaluate_robustness(model, np.rint(255 * x), labels, checks=[name], **options).checks
        assert found.status == "warn"
        assert "in [0, 1] needs preprocessing=keras.layers.Rescaling(1 / 255)" in found.message


def test_probabilities_without_logits_are_seen():
    class Spoiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = linear_model()

        def call(self, x):
            return ops.maximum(ops.softmax(self.inner(x)), 0.0)

    checks, _ = checks_of(Spoiled(), suite="quick")
    assert checks["outputs"].status == "warn"
    checks, _ = checks_of(linear_model(WEIGHTS, keras.layers.Activation("sigmoid")), suite="quick")
    assert checks["outputs"].status == "warn"
    assert 'task="multilabel"' in checks["outputs"].message


class Hidden(keras.Model):
    """A linear model that ends in an operation behind which no logits are found."""

    def __init__(self, scale, end):
        super().__init__()
        self.inner = linear_model(scale * WEIGHTS)
        self.end = end

    def call(self, x):
        return self.end(self.inner(x))


ENDS = {
    "maximum": lambda z: ops.maximum(ops.softmax(z), 0.0),
    "clip": lambda z: ops.clip(ops.softmax(z), 1e-7, 1 - 1e-7),
    "average": lambda z: ops.maximum((ops.softmax(z) + ops.softmax(2 * z)) / 2, 0.0),
    "half": lambda z: ops.cast(ops.maximum(ops.softmax(ops.cast(z, "float16")), 0.0), "float32"),
}


@pytest.mark.parametrize("end", some_short(ENDS, "average", more=[end for end in ENDS if end != "average"]))
def test_rounding_noise_is_no_gradient(end):  # B2
    x, y = inputs(40)
    options = {"attacks": ["apgd_t_margin"], "checks": ["outputs", "gradients"], "verbose": 0}
    for scale in (3, 3000):
        report = evaluate_robustness(Hidden(scale, ENDS[end]), x, y, eps=0.08, **options)
        statuses = [check.status for check in report.checks]
        # At scale 3, the gradient is exact, and so is the accuracy.
        assert statuses == (["warn", "pass"] if scale == 3 else ["warn", "fail"]), scale
        if scale == 3:
            assert report.robust_accuracy == (distance(x, y, "inf") > 0.08).mean()
        else:
            assert "give a model that returns logits" in report.checks[1].message


def test_an_undefended_model_is_checked():
    hidden = keras.Sequential([keras.Input((4,)), Quantised(), linear_model()])
    checks, _ = checks_of(hidden, undefended=linear_model(), suite="quick", eps=0.2)
    assert checks["transfer"].status == "fail"
    assert checks["undefended"].status == "warn"
    checks, _ = checks_of(linear_model(), undefended=linear_model(), suite="quick", eps=0.9)
    assert checks["undefended"].status == "pass"
    checks, _ = checks_of(linear_model(), undefended=linear_model(WEIGHTS * 0), suite="quick")
    assert checks["undefended"].status == "warn"


@pytest.mark.parametrize("norm", ["inf", 2, 1])
def test_the_linear_model_breaks_at_90_percent(norm):
    threat = keras_drsl.ThreatModel(0.1, norm, clip_min=-1.0, clip_max=1.0)
    weights, x, y = breakable_model((3, 3), threat, seed=0)
    slopes = weights.T[y][:, None] - weights.T[None]
    margin = (x.reshape(len(x), 1, 9) * slopes).sum(-1)
    dual = {"inf": np.abs(slopes).sum(-1), 2: np.sqrt((slopes**2).sum(-1)), 1: np.abs(slopes).max(-1)}[norm]
    nearest = np.sort(np.where(dual > 0, margin / np.where(dual > 0, dual, 1), np.inf), axis=1)[:, 0]
    assert np.all(nearest <= 0.0901)
    assert np.mean(np.abs(nearest - 0.09) < 1e-4) > 0.4
    assert np.abs(x).max() <= 0.9


def test_a_registered_check_runs_with_its_suites(new_check):
    @new_check(suites=["quick"], stage="before")
    def counts(context):
        return Outcome("warn", len(context.x), "number of examples")

    checks, report = checks_of(linear_model(), suite="quick")
    assert (checks["counts"].status, checks["counts"].value) == ("warn", 60)
    assert report.trustworthy
    checks, _ = checks_of(linear_model(), suite="quick", checks="cleverhans")
    assert "counts" not in checks


def test_examples_that_a_check_names_are_broken(new_check):
    @new_check()
    def breaks_the_first(context):
        assert context.broken_by.count(None) == len(context.robust.x)
        return Outcome("fail", 1.0, "breaks one example", broken=[context.robust.ids[0]])

    _, plain = checks_of(linear_model(), suite="quick", checks=[])
    _, report = checks_of(linear_model(), suite="quick", checks=[breaks_the_first])
    assert report.per_example["broken_by"].count("check:breaks_the_first") == 1
    assert report.robust_accuracy == pytest.approx(plain.robust_accuracy - 1 / 60)


def test_checks_are_chosen_apart_from_the_suite():
    checks, report = checks_of(linear_model(), suite="quick", checks=["deterministic", "transfer"])
    assert {name: entry.status for name, entry in checks.items()} == {"deterministic": "pass", "transfer": "skipped"}
    assert report.settings["checks"] == ["deterministic", "transfer"]
    assert report.settings["suite"] == "custom"
    with pytest.raises(ValueError, match=r"`checks` must be a suite .* or hold checks or names of .* Received: 'best'"):
        checks_of(linear_model(), checks=["best"])


def test_a_check_without_anything_to_test_is_skipped():
    x, y = inputs(60)
    report = evaluate_robustness(linear_model(), x, (y + 1) % 3, eps=0.1, attacks=["fgsm_ce"], verbose=0)
    statuses = {entry.name: entry.status for entry in report.checks}
    for name in ("gradients", "logit_scale", "many_steps_beat_one", "losses_agree", "larger_eps", "unbounded", "noise"):
        assert statuses[name] == "skipped", name
    assert report.trustworthy
    assert statuses["units"] == "skipped"
    assert f"{list(statuses.values()).count('skipped')} skipped" in str(report)


def test_a_context_cannot_be_changed(new_check):
    @new_check()
    def changes(context):
        context.broken_by = ()

    checks, _ = checks_of(linear_model(), suite="quick", checks=[changes])
    assert "FrozenInstanceError" in checks["changes"].message


def test_a_check_has_a_stage_and_a_name_of_its_own(new_check):
    with pytest.raises(ValueError, match="`stage` must be one of 'before', 'after'. Received: stage='during'"):
        new_check(stage="during")
    with pytest.raises(ValueError, match="`check` must have a name that no other check has. Received: noise"):

        @new_check()
        def noise(context):
            raise AssertionError


def test_an_unknown_status_is_a_failed_check(new_check):
    @new_check()
    def odd_status(context):
        return Outcome("excellent", 1.0, "a status that reports do not know")

    checks, report = checks_of(linear_model(), suite="quick", checks=[odd_status])
    assert checks["odd_status"].status == "fail"
    assert "`status` must be" in checks["odd_status"].message
    assert not report.trustworthy


def test_a_check_leaves_what_was_broken_before_to_its_attack(new_check):
    @new_check()
    def breaks_all(context):
        return Outcome("pass", 1.0, "all examples broken", context.ids)

    before = checks_of(linear_model(), suite="quick", checks=[])[1]
    after = checks_of(linear_model(), suite="quick", checks=[breaks_all])[1]
    for old, new in zip(before.per_example["broken_by"], after.per_example["broken_by"], strict=True):
        assert new == (old or "check:breaks_all")


class TestUnits:
    """D, B: eps in other units than the inputs makes any model look robust."""

    def evaluate(self, eps, **options):
        x, y = inputs(60)
        pixels = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), linear_model()])
        options = {"clip_max": 255, "attacks": ["pgd_margin"], "checks": ["units"], "verbose": 0} | options
        (units,) = evaluate_robustness(pixels, 255 * x, y, eps=eps, **options).checks
        return units

    def test_eps_of_another_range_is_seen(self):
        units = self.evaluate(8 / 255)
        assert units.status == "warn"
        assert units.value == pytest.approx(8 / 255)
        assert "eps 0.03137 of 0..255 is below half a grey level" in units.message

    @pytest.mark.parametrize(("share", "status"), [(1 / 255, "warn"), (0.019, "warn"), (0.021, "pass")])
    def test_a_range_far_wider_than_the_inputs_is_seen(self, share, status):
        # Inputs in [0, 1] with eps and clip_max of [0, 255], where any model falls.
        x, y = inputs(60)
        x = (x - x.min()) / np.ptp(x)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Lambda(lambda x: x[:, :4]), linear_model()])
        fixed = np.full((60, 1), 200.0)  # what may not change does not count
        options = {"clip_max": 1 / share, "mask": [False] * 4 + [True], "attacks": ["pgd_margin"], "verbose": 0}
        (units,) = evaluate_robustness(model, np.hstack([x, fixed]), y, eps=0.9, checks=["units"], **options).checks
        assert units.status == status
        if status == "warn":
            expected = f"the inputs take up {share:.1%} of the valid range: eps 0.9 of 0..{1 / share:g} must be"
            assert expected in units.message

    def test_eps_that_breaks_nothing_at_twice_is_seen(self):
        x, y = inputs(60)
        model = linear_model()
        far = distance(x, y, "inf") > 0.05
        options = {"attacks": ["pgd_margin"], "checks": ["units"], "verbose": 0}
        (units,) = evaluate_robustness(model, x[far], y[far], eps=0.01, **options).checks
        assert units.status == "warn"
        assert "no image falls at eps 0.01 of 0..1 or at twice that: either all of them withstand" in units.message
        between = np.flatnonzero(distance(x, y, "inf") > 0.03)
        assert (distance(x[between], y[between], "inf") < 0.058).any()
        (units,) = evaluate_robustness(model, x[between], y[between], eps=0.03, **options).checks
        assert units.status == "pass"
        assert "some images fall at twice that" in units.message

    def test_eps_that_breaks_images_passes(self):
        units = self.evaluate(0.15 * 255)
        assert units.status == "pass"
        assert units.value == pytest.approx(0.15 * 255)


class TestUnbounded:
    """The strongest of two losses decides, and the classes that it leaves are named."""

    def test_classes_that_are_left_are_named(self):
        checks, report = checks_of(keras.Sequential([keras.Input((4,)), Quantised(), linear_model()]))
        y = inputs(60)[1][[by != "clean" for by in report.per_example["broken_by"]]]
        named = re.findall(r"(\d) \((\d+) of (\d+)\)", checks["unbounded"].message)
        assert named
        assert all(int(count) == np.sum(y == int(class_id)) for class_id, _, count in named)
        left = sum(int(number) for _, number, _ in named)
        assert checks["unbounded"].value == pytest.approx(left / len(y))

    def test_a_flat_margin_is_no_failure_where_dlr_leads_out(self):
        def logits(x):
            level = ops.mean(x, axis=-1)
            rival = 3 * ops.cast(level < 0.02, "float32")
            # The ratio rises as the last logits fall. The difference of the first two is flat except for a jump.
            return ops.stack([ops.ones_like(level), rival, level - 1, level - 1], axis=-1)

        x = np.random.default_rng(0).uniform(0.4, 0.6, (10, 8)).astype("float32")
        data = keras.Input((8,))
        model = keras.Model(data, keras.layers.Lambda(logits)(data))
        report = evaluate_robustness(
            model, x, np.zeros(10, int), eps=0.1, attacks=["noise"], checks=["unbounded"], verbose=0
        )
        assert report.checks[0].status == "pass"
        assert report.checks[0].value == 0


def context_of(model, x, y, classifier=None, batch_size=256):
    classifier = classifier or model
    return EvaluationContext(
        model=LogitsModel(classifier, model, "logits" if classifier is model else "softmax"),
        x=x,
        y=y,
        ids=np.arange(len(x)),
        logits=classifier.logits(x),
        broken_by=(None,) * len(x),
        threat=ThreatModel(0.1),
        seed=0,
        batch_size=batch_size,
        attacks={},
        undefended=None,
        audit=Audit(),
    )


def test_logits_of_another_model_are_no_logits_of_a_softmax():
    x, y = inputs(20)
    own, other = Classifier(linear_model()), Classifier(linear_model(WEIGHTS[:, [1, 0, 2]]))
    softmax = Classifier(keras.Sequential([keras.Input((4,)), linear_model(), keras.layers.Softmax()]))
    assert CHECKS["outputs"].function(context_of(softmax, x, y, own)).status == "pass"
    found = CHECKS["outputs"].function(context_of(softmax, x, y, other))
    assert found.status == "fail"
    assert "do not always give the same prediction" in found.message


def test_the_check_of_rows_looks_at_a_limited_number():
    class Recorder(Classifier):
        largest = 0

        def logits(self, x):
            type(self).largest = max(self.largest, len(x))
            return super().logits(x)

    x, y = inputs(300)
    context = context_of(Recorder(linear_model()), x, y, batch_size=1000)
    Recorder.largest = 0
    assert CHECKS["independent_rows"].function(context).status == "pass"
    assert Recorder.largest == 200


# A hundredth of the robust images may fall by chance, and a twentieth is no failure yet.
@pytest.mark.parametrize(
    ("fallen", "count", "status"),
    [(0, 20, "pass"), (1, 100, "pass"), (2, 100, "warn"), (1, 20, "warn"), (2, 20, "fail"), (6, 100, "fail")],
)
def test_images_that_fall_to_more_effort_are_graded(fallen, count, status):
    x, y = inputs(count)
    context = context_of(Classifier(linear_model()), x, y)
    falling = {row.tobytes() for row in x[np.argsort(distance(x, y, "inf"))[:fallen]]}

    class Some(Attack):
        """Move some images to one with another label."""

        def run(self, classifier, batch):
            found = [
                x[y != label][0] if row.tobytes() in falling else row
                for row, label in zip(batch.x, batch.y, strict=True)
            ]
            return np.array(found)

    outcome = attack_robust_images(context, Some(1.0), "an attack")
    assert (outcome.status, outcome.value) == (status, pytest.approx(fallen / count))
    assert len(outcome.broken) == fallen
