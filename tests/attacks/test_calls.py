"""The number of gradients and queries that attacks count is the number that they need."""

import numpy as np
import pytest
from keras import ops

from keras_drsl import evaluate_robustness
from keras_drsl.attacks import APGD, FGSM, PGD, Noise, Square, Transfer, cleverhans
from keras_drsl.models import Classifier
from keras_drsl.models.calls import count_calls
from tests.backends import BACKEND, on_tensorflow
from tests.linear import inputs, linear_model

COUNT = 6
# One query for the clean inputs and, after each search, one for what it found. A search of n steps needs n + 1
# gradients: the first is that of the start.
EXPECTED = {
    "fgsm": (lambda: FGSM(1e-6), 2, 2),
    "pgd": (lambda: PGD(1e-6, steps=7, restarts=3), 3 * 8, 1 + 3),
    "apgd": (lambda: APGD(1e-6, steps=7), 8, 2),
    # The model has three classes, so two targets.
    "targeted": (lambda: APGD(1e-6, steps=4, loss="margin", targeted=True), 2 * 5, 1 + 2),
    "square": (lambda: Square(1e-6, queries=30), 0, 2 + 30),
    "noise": (lambda: Noise(1e-6, points=9), 0, 2 + 9),
    "transfer": (lambda: Transfer(linear_model(), PGD(1e-6, steps=7)), 8, 2),
}
CLEVERHANS = {
    "fgm": (lambda: cleverhans.FastGradientMethod(1e-6), 1, 2),
    "pgd": (lambda: cleverhans.ProjectedGradientDescent(1e-6, steps=3, restarts=2), 6, 1 + 2),
}


def check(make, gradients, queries, logits_fn):
    x, y = inputs(COUNT)
    with count_calls() as calls:
        make()(logits_fn, x, y)
    assert (calls.gradients, calls.queries) == (gradients * COUNT, queries * COUNT)


@pytest.mark.parametrize(("make", "gradients", "queries"), EXPECTED.values(), ids=EXPECTED.keys())
@pytest.mark.short
def test_calls_are_counted(make, gradients, queries):
    check(make, gradients, queries, linear_model())


@on_tensorflow
@pytest.mark.parametrize(("make", "gradients", "queries"), CLEVERHANS.values(), ids=CLEVERHANS.keys())
def test_calls_of_cleverhans_are_counted(make, gradients, queries):
    check(make, gradients, queries, linear_model())


# One step breaks as many as it can; `Transfer` also calls another model.
@pytest.mark.skipif(BACKEND == "jax", reason="JAX pads batches")
@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("fgsm", "transfer")])
def test_as_many_calls_reach_a_model_as_are_counted(name):
    model, rows = linear_model(), []

    def logits(x):
        if BACKEND == "torch":
            rows.append(len(x))
            return model(x)
        import tensorflow as tf

        with tf.control_dependencies([tf.py_function(lambda x: rows.append(len(x)), [x], [])]):
            return tf.identity(model(x))

    x, y = inputs(60)
    classifier = Classifier(logits)
    classifier.check(x)
    rows.clear()
    attack = EXPECTED[name][0]()
    attack = type(attack)(**attack.settings | {"eps": 0.1})  # breaks some of the inputs, which leave
    with count_calls() as calls:
        x_adv = attack(classifier, x, y)
    broken = ops.convert_to_numpy(model(x_adv)).argmax(1) != y
    assert 0 < broken.sum() < 60
    assert sum(rows) == calls.gradients + calls.queries


@pytest.mark.short
def test_rows_that_only_fill_a_batch_do_not_count(monkeypatch):
    x, y = inputs(40)
    numbers = []
    for size in (lambda count: count, lambda count: max(32, count)):
        monkeypatch.setattr("keras_drsl._backend.bucket_size", size)
        with count_calls() as calls:
            APGD(0.1, steps=39)(linear_model(), x, y)
        numbers.append((calls.gradients, calls.queries))
    assert numbers[0] == numbers[1]
    assert numbers[0][0] < 40 * 40  # some have left


def test_a_number_of_numpy_is_counted_as_one_of_python():
    with count_calls() as calls:
        Classifier(linear_model()).count_gradients(np.int64(3))
        Classifier(linear_model()).count_queries(np.int64(4))
    assert (type(calls.gradients), type(calls.queries)) == (int, int)
    assert (calls.gradients, calls.queries) == (3, 4)


def test_calls_outside_of_a_block_and_inside_an_inner_one_are_not_counted():
    x, y = inputs(COUNT)
    with count_calls() as calls:
        with count_calls() as inner:
            FGSM(1e-6)(linear_model(), x, y)
        assert inner.gradients == 2 * COUNT
    FGSM(1e-6)(linear_model(), x, y)
    assert (calls.gradients, calls.queries) == (0, 0)


def test_a_report_has_the_calls_of_its_attacks(tmp_path):
    x, y = inputs(COUNT)
    options = {"attacks": [PGD(1e-6, steps=3), Square(1e-6, queries=8)], "checks": [], "verbose": 0}
    path = tmp_path / "state"
    for _ in range(2):  # the second time from the state
        report = evaluate_robustness(linear_model(), x, y, eps=1e-6, state_path=path, **options)
        assert [(attack["gradients"], attack["queries"]) for attack in report.attacks] == [
            (4 * COUNT, 2 * COUNT),
            (0, 10 * COUNT),
        ]
        assert (report.num_gradients, report.num_queries) == (4 * COUNT, 12 * COUNT)
    assert f"{4 * COUNT} gradients and {12 * COUNT} further queries" in report.to_text(verbose=True)
    assert f"{4 * COUNT} gradients and {12 * COUNT} further queries" in report.to_markdown()


def test_a_report_has_the_time_of_compilation():
    x, y = inputs(COUNT)
    options = {"attacks": [PGD(1e-6, steps=3), Square(1e-6, queries=8)], "checks": [], "verbose": 0}
    model = linear_model()
    report = evaluate_robustness(model, x, y, eps=1e-6, **options)
    parts = [(attack["compile_seconds"], attack["seconds"]) for attack in report.attacks]
    if BACKEND == "torch":
        assert [seconds for seconds, _ in parts] == [0.0, 0.0]
    else:
        assert all(0 < compiling < seconds for compiling, seconds in parts)
    assert report.compile_seconds == sum(seconds for seconds, _ in parts)
    assert f"{report.compile_seconds:.1f} seconds to compile attacks" in report.to_text(verbose=True)
    # A model keeps its programs.
    assert evaluate_robustness(model, x, y, eps=1e-6, **options).compile_seconds == 0.0


def test_programs_are_compiled_once():
    x, y = inputs(COUNT)
    classifier = Classifier(linear_model())
    for attack in (PGD(1e-6, steps=3), PGD(1e-7, steps=9, restarts=3)):
        with count_calls() as calls:
            attack(classifier, x, y)
        assert (calls.compile_seconds > 0) == (attack.eps == 1e-6 and BACKEND != "torch")


def test_each_averaged_answer_of_a_random_model_counts():
    x, y = inputs(COUNT)
    options = {"attacks": PGD(1e-6, steps=3), "checks": [], "verbose": 0, "expectation_draws": 5}
    report = evaluate_robustness(linear_model(), x, y, eps=1e-6, **options)
    assert report.num_gradients == 5 * 4 * COUNT
