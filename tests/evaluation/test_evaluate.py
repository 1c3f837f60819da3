import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl import ThreatModel, evaluate_robustness
from keras_drsl.attacks import APGD, FGSM, PGD, Attack, Square, Transfer
from keras_drsl.evaluation.evaluator import Evaluator
from keras_drsl.evaluation.suites import SUITES, make_attacks
from tests.backends import BACKEND, on_tensorflow
from tests.helpers import some_short
from tests.layers import Random
from tests.linear import WEIGHTS, distance, exact_robust, inputs, linear_model

QUIET = {"verbose": 0}
# One attack and no checks, for tests that are about neither.
FAST = {"eps": 0.1, "attacks": ["fgsm_ce"], "suite": "quick", "checks": [], "verbose": 0}


@pytest.fixture(scope="module")
def linear():
    return linear_model()


@pytest.mark.parametrize("name", ["autoattack", "AutoAttack", "standard"])
def test_autoattack_is_another_name_of_the_standard_suite(name):  # D7
    evaluator = Evaluator(keras_drsl.ThreatModel(0.1), suite=name)
    assert evaluator.settings["suite"] == "standard"
    assert list(evaluator.attacks) == ["apgd_ce", "apgd_t_dlr", "apgd_t_margin", "square"]


class TestAccuracy:
    @pytest.mark.parametrize("norm", some_short(["inf", 2, 1], more=[2, 1]))
    def test_standard_is_exact_on_a_linear_model(self, linear, norm):
        x, y = inputs(60)
        clear = np.abs(distance(x, y, norm) - 0.15) > 1e-3
        x, y = x[clear], y[clear]
        attacks = [
            APGD(0.15, norm=norm),
            *(APGD(0.15, loss=loss, targeted=True, norm=norm) for loss in ("dlr", "margin")),
            Square(0.15, queries=200, norm=norm),
        ]
        report = evaluate_robustness(linear, x, y, eps=0.15, norm=norm, attacks=attacks, **QUIET)
        expected = exact_robust(x, y, 0.15, norm)
        assert 0.2 < expected.mean() < 0.8
        np.testing.assert_array_equal([name is None for name in report.per_example["broken_by"]], expected)
        assert report.robust_accuracy == pytest.approx(expected.mean())
        assert report.trustworthy

    @pytest.mark.more
    @on_tensorflow
    def test_logit_squeezing_falls_to_standard(self):
        pytest.importorskip("sklearn")
        (x_train, y_train), (x, y) = keras_drsl.datasets.load("digits")
        x, y = x[:120], y[:120]
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.GaussianNoise(0.3),
                keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(2),
                keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(2),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        squeezed = lambda y, z: cross_entropy(y, z) + 2.0 * ops.mean(ops.square(z))
        model.compile("adam", squeezed)
        model.fit(x_train, y_train, epochs=15, batch_size=64, verbose=0)
        options = {"eps": 0.2, "suite": "quick", **QUIET}
        own = evaluate_robustness(model, x, y, attacks=["pgd_ce"], **options)
        standard = [*SUITES["standard"][:3], Square(0.2, queries=300)]
        report = evaluate_robustness(model, x, y, attacks=standard, **options)
        assert own.clean_accuracy > 0.9
        assert own.accuracy["pgd_ce"]["cumulative"] > report.robust_accuracy + 0.08
        assert report.robust_accuracy <= 0.05

    @on_tensorflow
    @pytest.mark.parametrize("norm", some_short(["inf", 2], more=[2]))
    def test_the_cleverhans_suite_runs(self, norm):
        pytest.importorskip("cleverhans")
        weights = WEIGHTS[:, :2]
        x, y = inputs(40, weights)
        report = evaluate_robustness(linear_model(weights), x, y, eps=0.15, norm=norm, suite="cleverhans", **QUIET)
        assert report.robust_accuracy == exact_robust(x, y, 0.15, norm, weights).mean()
        assert list(report.accuracy) == [f"cleverhans_{name}" for name in ("fgm", "pgd", "bim", "madry", "mim")]

    @pytest.mark.short
    def test_a_clean_error_is_not_robust(self, linear):
        x, y = inputs(40)
        wrong = np.arange(40) < 10
        y = np.where(wrong, (y + 1) % 3, y)
        report = evaluate_robustness(linear, x, y, eps=1e-4, suite="quick", **QUIET)
        assert report.clean_accuracy == 0.75
        assert report.robust_accuracy <= 0.75
        assert report.per_example["broken_by"][:10] == ["clean"] * 10

    def test_examples_that_a_check_breaks_are_broken(self, linear):
        x, y = inputs(60)
        # One small step breaks next to nothing: the checks have to.
        weak = PGD(0.15, steps=1, step_size=1e-6, random_start=False)
        report = evaluate_robustness(linear, x, y, eps=0.15, attacks=[weak], **QUIET)
        assert report.robust_accuracy == pytest.approx(exact_robust(x, y, 0.15, "inf").mean(), abs=0.02)
        assert not report.trustworthy
        (failed,) = [check for check in report.checks if check.name == "converged"]
        assert failed.status == "fail"
        assert any(name and name.startswith("check:") for name in report.per_example["broken_by"])
        assert list(report.accuracy)[-1].startswith("check:")

    def test_an_attack_outside_the_ball_does_not_count(self, linear):
        class Cheat(Attack):
            def run(self, classifier, batch):
                return 1 - batch.x

        class Mixed(PGD):
            def run(self, classifier, batch):
                found = np.array(super().run(classifier, batch))
                found[0], found[1] = 1 - batch.x[0], np.nan
                return found

        x, y = inputs(40)
        honest = evaluate_robustness(linear, x, y, eps=0.1, attacks=["pgd_ce"], suite="quick", **QUIET)
        mixed = evaluate_robustness(linear, x, y, eps=0.1, attacks=[Mixed(0.1)], suite="quick", **QUIET)
        assert not mixed.trustworthy
        expected, found = (report.per_example["broken_by"] for report in (honest, mixed))
        assert found[2:] == expected[2:]

        robust = exact_robust(x, y, 0.02, "inf")
        x, y = x[robust], y[robust]
        report = evaluate_robustness(linear, x, y, eps=0.01, attacks=[Cheat(0.01)], suite="quick", **QUIET)
        assert report.robust_accuracy == 1
        assert not report.trustworthy
        assert next(check for check in report.checks if check.name == "perturbations").status == "fail"


class TestInputs:
    def test_all_forms_of_data_give_the_same_report(self, linear):
        x, y = inputs(30)
        expected = evaluate_robustness(linear, x, y, **FAST)

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, place):
                rows = slice(10 * place, 10 * place + 10)
                return x[rows], y[rows]

        forms = [
            (x, y[:, None]),
            (x, np.eye(3)[y]),
            (ops.convert_to_tensor(x), ops.convert_to_tensor(y)),
            (Batches(), None),
        ]
        if BACKEND == "tensorflow":
            import tensorflow as tf

            data = tf.data.Dataset.from_tensor_slices((x, y, np.ones(30)))
            forms += [(data.batch(7), None)]
            report = evaluate_robustness(linear, data.batch(10).repeat(), max_samples=30, **FAST)
            assert report.per_example == expected.per_example
        for form in forms:
            assert evaluate_robustness(linear, *form, **FAST).per_example == expected.per_example

    def test_batch_size_and_shards_change_nothing(self, linear):
        x, y = inputs(30)
        options = {"eps": 0.1, "attacks": [APGD(0.1, steps=10), Square(0.1, queries=20)], "checks": ["noise"], **QUIET}
        whole = evaluate_robustness(linear, x, y, suite="quick", **options)
        small = evaluate_robustness(linear, x, y, suite="quick", batch_size=7, **options)
        assert small.per_example == whole.per_example
        parts = [evaluate_robustness(linear, x, y, suite="quick", shard=(part, 3), **options) for part in range(3)]
        merged = type(whole).merge(parts[::-1])
        assert merged.per_example == whole.per_example
        for name, accuracy in merged.accuracy.items():
            assert accuracy == pytest.approx(whole.accuracy[name])

    def test_a_model_may_need_static_shapes(self):
        class Flat(keras.layers.Layer):
            def call(self, x):
                return ops.reshape(x, (-1, x.shape[1] * x.shape[2] * x.shape[3]))

        model = keras.Sequential([keras.Input((2, 2, 1)), Flat(), linear_model()])
        x, y = inputs(20)
        attacks = ["fgsm_ce", PGD(0.1), Square(0.1, queries=5)]
        options = {"eps": 0.1, "attacks": attacks, "suite": "quick"}
        report = evaluate_robustness(model, x.reshape(-1, 2, 2, 1), y, **options, **QUIET)
        assert 0 < report.robust_accuracy < 1

    def test_infinite_gradients_are_followed(self):
        class Root(keras.layers.Layer):
            def call(self, x):
                return ops.sqrt(x)

        weights = WEIGHTS - WEIGHTS.mean(1, keepdims=True)
        model = keras.Sequential([keras.Input((4,)), Root(), linear_model(weights)])
        x = np.where(np.arange(4) == 1, 0.0, inputs(40)[0]).astype("float32")
        y = (np.sqrt(x) @ weights).argmax(1)
        for norm in ("inf", 2):
            options = {"eps": 0.2, "norm": norm, "suite": "quick", "checks": ["perturbations"]}
            report = evaluate_robustness(model, x, y, attacks=["apgd_t_margin"], **options, **QUIET)
            attacks = [Square(0.2, norm=norm, queries=500)]
            square = evaluate_robustness(model, x, y, attacks=attacks, **options | {"checks": []}, **QUIET)
            assert next(check for check in report.checks if check.name == "perturbations").status == "pass"
            # In L2 an infinite gradient towards the outside of the range still hides the others.
            assert norm == 2 or report.robust_accuracy <= square.robust_accuracy + 0.05

    def test_inputs_may_have_another_range(self, linear):
        x, y = inputs(30)
        shifted = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), linear])
        unit = evaluate_robustness(linear, x, y, eps=0.1, suite="quick", **QUIET)
        bytes_ = evaluate_robustness(shifted, 255 * x, y, eps=25.5, clip_max=255, suite="quick", **QUIET)
        assert bytes_.robust_accuracy == unit.robust_accuracy


class TestTheModelIsLeftAsItWas:
    def build(self):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.GaussianNoise(0.5),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )
        model.layers[1].trainable = False
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
        x, y = inputs(20)
        model.fit(x, y, verbose=0)
        return model, x, y

    def state(self, model):
        return {
            "weights": [ops.convert_to_numpy(weight).tolist() for weight in model.variables],
            "trainable": [layer.trainable for layer in model.layers],
            "compiled": (model.compiled, model.loss),
            "activation": model.layers[-1].activation,
            "optimizer": [ops.convert_to_numpy(variable).tolist() for variable in model.optimizer.variables],
        }

    def test_after_an_evaluation(self):
        model, x, y = self.build()
        before, outputs = self.state(model), model.predict(x, verbose=0)
        evaluate_robustness(model, x, y, eps=0.05, suite="quick", **QUIET)
        assert self.state(model) == before
        np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)

    def test_random_counters_are_restored(self):
        model = keras.Sequential([keras.Input((4,)), Random(0.1), linear_model()])
        x, y = inputs(10)
        before = [ops.convert_to_numpy(variable).tolist() for variable in model.variables]
        evaluate_robustness(model, x, y, eps=0.05, suite="quick", **QUIET)
        assert [ops.convert_to_numpy(variable).tolist() for variable in model.variables] == before

    def test_after_an_exception(self):
        model, x, y = self.build()
        before = self.state(model)

        class Failing(Attack):
            def run(self, classifier, batch):
                classifier(ops.convert_to_tensor(batch.x))
                raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            evaluate_robustness(model, x, y, eps=0.05, attacks=[Failing(0.05)], **QUIET)
        assert self.state(model) == before


class TestState:
    def test_a_finished_state_gives_the_same_report(self, linear, tmp_path):
        x, y = inputs(30)
        options = FAST | {"state_path": tmp_path / "state.json"}
        first = evaluate_robustness(linear, x, y, **options).to_dict()
        assert evaluate_robustness(linear, x, y, **options).to_dict() == first

    def test_a_state_of_another_evaluation_is_refused(self, linear, tmp_path):
        x, y = inputs(30)
        path = tmp_path / "state.json"
        options = {key: value for key, value in FAST.items() if key != "eps"} | {"state_path": path}
        evaluate_robustness(linear, x, y, eps=0.1, **options)
        before = path.read_text()
        for other, what in (
            ((linear, x, y, 0.2), "settings"),
            ((linear_model(WEIGHTS * 2), x, y, 0.1), "model"),
            ((linear_model(WEIGHTS, keras.layers.Rescaling(1.0)), x, y, 0.1), "model"),  # of the same weights
            ((linear, x[::-1].copy(), y[::-1].copy(), 0.1), "data"),
        ):
            with pytest.raises(ValueError, match=f"`state_path` must hold the state of this evaluation.*{what}"):
                evaluate_robustness(*other[:3], eps=other[3], **options)
        for text in ("", "{}", '{"format": 3}', "[1]"):
            path.write_text(text)
            with pytest.raises(ValueError, match="`state_path` must hold the state of an evaluation"):
                evaluate_robustness(linear, x, y, eps=0.1, **options)
            assert path.read_text() == text
        path.write_text(before)
        evaluate_robustness(linear, x, y, eps=0.1, **options)

    def test_transfer_from_another_model_is_another_one(self, linear, tmp_path):
        x, y = inputs(10)
        for scale, fails in ((2, False), (3, True)):
            attacks = [Transfer(linear_model(WEIGHTS[:, ::-1] * scale), PGD(0.1, steps=2))]
            options = {"eps": 0.1, "attacks": attacks, "state_path": tmp_path / "state", "suite": "quick"}
            if fails:
                with pytest.raises(ValueError, match="Different: attacks"):
                    evaluate_robustness(linear, x, y, **options, **QUIET)
            else:
                evaluate_robustness(linear, x, y, **options, **QUIET)

    def test_an_interrupted_evaluation_continues(self, linear, tmp_path):
        class Interrupted(PGD):
            """PGD that stops the program in the third batch."""

            batches = 0

            def run(self, classifier, batch):
                type(self).batches += 1
                if type(self).batches == 3:
                    raise KeyboardInterrupt
                return super().run(classifier, batch)

        x, y = inputs(60)
        options = {"eps": 0.1, "suite": "quick", "checks": ["noise"], "batch_size": 16, **QUIET}
        expected = evaluate_robustness(linear, x, y, attacks=["pgd_ce"], **options)
        assert 0 < expected.robust_accuracy < 1
        options |= {"attacks": [Interrupted(0.1)], "state_path": tmp_path / "state"}
        with pytest.raises(KeyboardInterrupt):
            evaluate_robustness(linear, x, y, **options)
        report = evaluate_robustness(linear, x, y, **options)
        assert report.per_example["broken_by"] == expected.per_example["broken_by"]
        # The two batches before the interruption are not attacked again.
        assert Interrupted.batches == 3 + 2

    @on_tensorflow
    @pytest.mark.slow
    def test_a_killed_evaluation_ends_with_the_same_report(self, tmp_path):
        code = """
        import sys, keras, numpy as np
        from keras_drsl import evaluate_robustness
        from keras_drsl.attacks import APGD, Square
        rng = np.random.default_rng(0)
        x = rng.random((120, 8, 8, 1)).astype("float32")
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(8, 3, activation="tanh"),
                                  keras.layers.Flatten(), keras.layers.Dense(5)])
        y = model.predict(x, verbose=0).argmax(1)
        attacks = [APGD(0.02), APGD(0.02, loss="margin", targeted=True), Square(0.02, queries=400)]
        report = evaluate_robustness(model, x, y, eps=0.02, attacks=attacks, batch_size=16, verbose=0,
                                     state_path=sys.argv[1])
        report.to_json(sys.argv[2])
        """

        def start(state, report):
            command = [sys.executable, "-c", textwrap.dedent(code), str(state), str(report)]
            return subprocess.Popen(command, stderr=subprocess.DEVNULL)

        state, kills = tmp_path / "killed.state", 0
        rng = np.random.default_rng()
        while kills < 3:
            process = start(state, tmp_path / "killed.json")
            before = state.read_text() if state.exists() else ""
            while process.poll() is None and (state.read_text() if state.exists() else "") == before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.0))
            assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        for name in ("killed", "whole"):
            assert start(tmp_path / f"{name}.state", tmp_path / f"{name}.json").wait() == 0
        reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole")]
        for report in reports:
            for attack in report["attacks"]:
                del attack["seconds"], attack["compile_seconds"]
        assert 0 < reports[0]["robust_accuracy"] < 1
        assert reports[0] == reports[1]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "rule"),
        [
            ({"eps": 0}, "`eps` must be a positive number. Received: eps=0"),
            ({"eps": 1.5}, "`eps` must be no larger than the range, clip_max - clip_min = 1. Received: eps=1.5"),
            ({"eps": 3, "norm": 2}, r"`eps` must be no larger than the distance of two valid inputs, 2 in L2"),
            ({"eps": 0.1, "norm": 3}, "`norm` must be one of 'inf', 2, 1. Received: norm=3"),
            (
                {"eps": 0.1, "suite": "best"},
                "`suite` must be one of 'quick', 'cleverhans', 'fast', 'standard'. Received",
            ),
            ({"eps": 0.1, "attacks": ["best"]}, "`attacks` must hold attacks or names of .*. Received: 'best'"),
            ({"eps": 0.1, "attacks": ["spsa"]}, "`attacks` cannot hold 'spsa' of cleverhans: it stops with an error"),
            ({"eps": 0.1, "attacks": []}, "`attacks` must hold at least one attack. Received: none"),
            ({"eps": 0.1, "attacks": [3]}, "`attacks` must hold attacks or their names. Received: 3"),
            (
                {"eps": 0.1, "attacks": [FGSM(0.2)]},
                "`attacks` must be made for .*eps=0.1.*Received: fgsm_ce for .*eps=0.2",
            ),
            ({"eps": 0.1, "batch_size": 0}, "`batch_size` must be an integer of 1 or more. Received: batch_size=0"),
            ({"eps": 0.1, "max_samples": 0}, "`max_samples` must be an integer of 1 or more. Received: max_samples=0"),
            ({"eps": 0.1, "seed": -1}, "`seed` must be an integer of 0 or more. Received: seed=-1"),
            ({"eps": 0.1, "shard": (2, 2)}, r"`shard` must be \(i, n\) with 0 <= i < n. Received: shard=\(2, 2\)"),
            ({"eps": 0.1, "shard": (50, 60)}, "`shard` must leave at least one example. Received: shard"),
            ({"eps": 0.1, "state_path": "/nowhere/x"}, "`state_path` must lie in a folder that can be written to"),
        ],
    )
    def test_arguments_are_named(self, linear, options, rule):
        x, y = inputs(5)
        with pytest.raises(ValueError, match=rule):
            evaluate_robustness(linear, x, y, **options, **QUIET)

    @pytest.mark.parametrize(
        ("data", "rule"),
        [
            (
                lambda x, y: (x * 255, y),
                r"`x_or_dataset` must lie in \[clip_min, clip_max\] = \[0, 1\]. Received: values",
            ),
            (lambda x, y: (np.where(x > 0.5, np.nan, x), y), "`x_or_dataset` must lie in .* Received: values from nan"),
            (lambda x, y: (x[:0], y[:0]), "`x_or_dataset` must hold at least one example. Received: none"),
            (
                lambda x, y: (x, y[:3]),
                r"`y` must hold one label for each input. Received: inputs of shape \(5, 4\), labels of shape \(3,\)",
            ),
            (lambda x, y: (x, np.array(["cat"] * 5)), "`y` must hold numbers: class ids 0, 1, 2, .* Received: .'cat'"),
            (lambda x, y: (iter([(x, ["cat"] * 5)]), None), "`y` must hold numbers: class ids 0, 1, 2, .*cat"),
            (lambda x, y: (x, np.ones((5, 2))), r"`y` must have shape \(5,\) or \(5, 1\) with class ids, or \(5, 3\)"),
            (lambda x, y: (x, y + 5), r"`y` must hold class ids in \[0, 3\). Received"),
            (lambda x, y: (x, None), "`y` must hold the true labels where `x_or_dataset` is an array"),
            (lambda x, y: (iter([]), None), "`x_or_dataset` must hold at least one example. Received: none"),
            (lambda x, y: (iter([x]), None), r"`x_or_dataset` must give batches \(inputs, labels\)"),
            (lambda x, y: (iter([(x, y)]), y), "`y` must be None where `x_or_dataset` is a data set"),
            (lambda x, y: (3, None), "`x_or_dataset` must be an array, a tensor, or an iterable of batches"),
            (lambda x, y: (y, y), r"`x_or_dataset` must hold inputs of shape \(count, ...\)"),
        ],
    )
    def test_data_are_named(self, linear, data, rule):
        with pytest.raises(ValueError, match=rule):
            evaluate_robustness(linear, *data(*inputs(5)), eps=0.1, **QUIET)

    def test_models_that_do_not_fit_are_named(self, linear, tmp_path):
        x, y = inputs(5)
        cases = [
            (lambda x: x, "`model` must be a keras.Model. Received: function"),
            (
                linear_model(WEIGHTS, keras.layers.Reshape((1, 3))),
                r"`model` must return outputs of shape \(batch, classes >= 2\)",
            ),
            (
                linear_model(WEIGHTS * np.nan),
                "`model` must return finite outputs.*Weights that are not finite: .*kernel",
            ),
        ]
        state = tmp_path / "state"
        for model, rule in cases:
            with pytest.raises(ValueError, match=rule):
                evaluate_robustness(model, x, y, eps=0.1, state_path=state, **QUIET)
        with pytest.raises(ValueError, match="`from_logits=True`, but the outputs of `model` look like probabilities"):
            evaluate_robustness(linear_model(WEIGHTS, keras.layers.Softmax()), x, y, eps=0.1, from_logits=True, **QUIET)
        with pytest.raises(ValueError, match="`from_logits=False`, but the outputs of `model` are no probabilities"):
            evaluate_robustness(linear, x, y, eps=0.1, from_logits=False, **QUIET)
        other = linear_model(WEIGHTS[:, :2])
        with pytest.raises(ValueError, match="`undefended` must have the 3 classes of `model`. Received: 2"):
            evaluate_robustness(linear, x, y, eps=0.1, undefended=other, state_path=state, **QUIET)
        other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        with pytest.raises(ValueError, match="`undefended` must be a classifier of the same inputs as `model`"):
            evaluate_robustness(linear, x, y, eps=0.1, undefended=other, state_path=state, **QUIET)
        assert not os.path.exists(state)


def test_attacks_of_one_name_are_numbered():
    made = make_attacks("quick", ["fgsm_ce", "fgsm_ce", "noise", "fgsm_ce"], ThreatModel(0.1), 0)
    assert list(made) == ["fgsm_ce", "fgsm_ce_2", "noise", "fgsm_ce_3"]
