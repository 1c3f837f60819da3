"""Each check warns of what it is there for, and is silent about a model without fault."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_drsl import evaluate_robustness
from keras_drsl.evaluation.checks import breakable
from tests.layers import Quantised, Random
from tests.linear import WEIGHTS, inputs, linear_model


def checks_of(model, *, eps=0.15, attacks=("apgd_t_margin",), classes=3, **knobs):
    x, y = inputs(60, WEIGHTS[:, :classes])
    report = evaluate_robustness(model, x, y, eps=eps, attacks=attacks, verbose=0, **knobs)
    return {check.name: check for check in report.checks}, report


def test_a_model_without_fault_passes_them_all():
    # Of two classes: with more, the cross-entropy's attacks are not exact on a linear model, which a check says.
    checks, report = checks_of(linear_model(WEIGHTS[:, :2]), attacks=("apgd_t_margin", "noise"), classes=2)
    assert {name for name, check in checks.items() if check.status != "pass"} == set()
    assert len(checks) == 15
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


def test_what_only_square_breaks_is_seen():
    model = keras.Sequential([keras.Input((4,)), Quantised(), linear_model()])
    checks, _ = checks_of(model, attacks=("apgd_t_margin", "square"), suite="quick")
    assert checks["black_box"].status == "fail"


def test_square_before_the_others_is_no_black_box_that_only_succeeds():
    checks, _ = checks_of(linear_model(), attacks=("square", "apgd_t_margin"), suite="quick")
    assert checks["black_box"].status == "pass"


def test_a_check_that_ends_in_an_error_has_failed_and_loses_nothing(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setattr("keras_drsl.evaluation.checks.objective", broken)
    checks, report = checks_of(linear_model(), suite="quick")
    assert checks["gradients"].status == "fail"
    assert "RuntimeError: no" in checks["gradients"].meaning
    assert report.images == 60


def test_a_random_model_is_seen():
    checks, report = checks_of(keras.Sequential([keras.Input((4,)), Random(), linear_model()]), suite="quick")
    assert checks["deterministic"].status == "fail"
    assert not report.trustworthy


def test_huge_logits_are_seen():
    checks, _ = checks_of(linear_model(WEIGHTS * 1e4))
    assert checks["logit_scale"].status == "warn"
    assert checks["gradients"].status == "warn"
    assert checks["losses_agree"].status == "warn"


def test_probabilities_without_logits_are_seen():
    class Spoiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = linear_model()

        def call(self, x):
            return ops.softmax(self.inner(x)) * 1.0 + 0.0

    checks, _ = checks_of(Spoiled(), suite="quick")
    assert checks["outputs"].status == "warn"
    checks, _ = checks_of(linear_model(WEIGHTS, keras.layers.Activation("sigmoid")), suite="quick")
    assert checks["outputs"].status == "warn"


def test_with_an_undefended_model_its_fall_and_the_transfer_are_checked():
    hidden = keras.Sequential([keras.Input((4,)), Quantised(), linear_model()])
    checks, _ = checks_of(hidden, undefended=linear_model(), suite="quick", eps=0.2)
    assert checks["transfer"].status == "fail"
    assert checks["twin"].status == "warn"
    checks, _ = checks_of(linear_model(), undefended=linear_model(), suite="quick", eps=0.9)
    assert checks["twin"].status == "pass"
    checks, _ = checks_of(linear_model(), undefended=linear_model(WEIGHTS * 0), suite="quick")
    assert checks["twin"].status == "warn"


@pytest.mark.parametrize("norm", ["inf", 2])
def test_the_control_is_as_breakable_as_it_says(norm):
    threat = {"eps": 0.1, "norm": norm, "clip_min": -1.0, "clip_max": 1.0}
    weights, x, y = breakable((3, 3), threat, seed=0)
    slopes = weights.T[y][:, None] - weights.T[None]
    margin = (x.reshape(len(x), 1, 9) * slopes).sum(-1)
    dual = np.abs(slopes).sum(-1) if norm == "inf" else np.sqrt((slopes**2).sum(-1))
    nearest = np.sort(np.where(dual > 0, margin / np.where(dual > 0, dual, 1), np.inf), axis=1)[:, 0]
    assert np.all(nearest <= 0.0901)
    assert np.mean(np.abs(nearest - 0.09) < 1e-4) > 0.4
    assert np.abs(x).max() <= 0.9
