import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_drsl.spread import MEASURES, SPACES, SPREADS, class_values, diversity, spread
from tests import reference
from tests.backends import gradient, on_tensorflow, values

logits = hnp.arrays("float64", st.tuples(st.integers(1, 3), st.integers(3, 6)), elements=st.floats(-20, 20, width=32))


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x), dtype="float32")


def spread_of(z, y, space="log_softmax", kind="sum_of_squares"):
    return values(spread(class_values(tensor(z), from_logits=True, space=space), tensor(y), kind=kind))


def diversity_of(v, y, measure):
    return values(diversity(tensor(v), tensor(y), measure=measure))


def labels_for(z):
    """Return one-hot labels: the first class for the first sample, the second for the second, and so on."""
    return reference.one_hot(np.arange(len(z)), z.shape[-1])


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("space", SPACES)
def test_spread_equals_the_formula(space, kind):
    rng = np.random.default_rng(1)
    z = rng.normal(0, 3, (7, 5))
    for y in (reference.one_hot(rng.integers(0, 5, 7), 5), rng.dirichlet(np.ones(5), 7)):
        expected = reference.each(reference.spread, y, z, space=space, kind=kind)
        np.testing.assert_allclose(spread_of(z, y, space, kind), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("measure", MEASURES)
def test_diversity_equals_the_formula(measure, space):
    rng = np.random.default_rng(2)
    z = rng.normal(0, 3, (7, 5))
    for y in (reference.one_hot(rng.integers(0, 5, 7), 5), rng.dirichlet(np.ones(5), 7)):
        expected = reference.each(reference.diversity, y, z, measure=measure, space=space)
        v = class_values(tensor(z), from_logits=True, space="log_softmax" if measure == "entropy" else space)
        got = values(diversity(v, tensor(y), measure=measure))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_entropy_is_1_for_equal_classes_and_0_for_one():
    v = np.array([[9, 1, 1, 1], [9, 1, -1e4, -1e4]])
    np.testing.assert_allclose(diversity_of(v, reference.one_hot([0, 0], 4), "entropy"), [1.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(diversity_of(v[:, :2], reference.one_hot([0, 1], 2), "entropy"), [1.0, 1.0])


def test_entropy_is_finite_for_a_large_true_logit():
    shares = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    expected = -np.sum(shares * np.log(shares)) / np.log(3)
    got = diversity_of([[1e4, 0.0, 1.0, 2.0]], reference.one_hot([0], 4), "entropy")
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(logits, st.floats(-50, 50, width=32))
def test_log_space_ignores_a_constant_added_to_logits(z, constant):
    y = labels_for(z)
    np.testing.assert_allclose(spread_of(z + constant, y), spread_of(z, y), rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(logits, st.randoms(use_true_random=False), st.sampled_from(SPACES), st.sampled_from(SPREADS))
def test_spread_ignores_the_order_of_non_true_classes(z, random, space, kind):
    order = list(range(1, z.shape[-1]))
    random.shuffle(order)
    y = reference.one_hot([0] * len(z), z.shape[-1])
    shuffled = spread_of(z[:, [0, *order]], y, space, kind)
    np.testing.assert_allclose(shuffled, spread_of(z, y, space, kind), rtol=1e-3, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(logits, st.sampled_from(SPACES), st.sampled_from(SPREADS))
def test_spread_is_never_negative(z, space, kind):
    assert np.all(spread_of(z, labels_for(z), space, kind) >= 0)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), st.integers(2, 12), st.sampled_from(SPREADS))
def test_spread_and_gradient_of_equal_values_are_0(true, other, classes, kind):
    z = np.full((1, classes), other, "float32")
    z[0, 0] = true
    y = tensor(reference.one_hot([0], classes))
    assert spread_of(z, y, kind=kind)[0] == 0
    np.testing.assert_array_equal(gradient(lambda z: spread(z, y, kind=kind), z), np.zeros((1, classes)))


def test_two_classes_have_no_spread():
    z = np.random.default_rng(0).normal(0, 50, (20, 2))
    y = reference.one_hot([0, 1] * 10, 2)
    for space in SPACES:
        for kind in SPREADS:
            np.testing.assert_array_equal(spread_of(z, y, space, kind), np.zeros(20))


def test_sum_of_squares_is_variance_times_n():
    z = np.random.default_rng(0).normal(0, 2, (6, 9))
    y = labels_for(z)
    np.testing.assert_allclose(spread_of(z, y), 8 * spread_of(z, y, kind="variance"), rtol=1e-5)


@on_tensorflow
@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("space", SPACES)
def test_gradient_of_spread_equals_differences(space, kind):
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2, (4, 5))
    for y in (reference.one_hot([0, 3, 4, 1], 5), rng.dirichlet(np.ones(5), 4)):
        got = gradient(lambda z: spread(class_values(z, from_logits=True, space=space), y, kind=kind), z, "float64")
        expected = reference.gradient(lambda z: reference.each(reference.spread, y, z, space=space, kind=kind), z)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def test_probabilities_and_logits_have_equal_spread():
    z = np.random.default_rng(4).normal(0, 5, (6, 7))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = labels_for(z)
    for space in SPACES:
        v = class_values(tensor(p), from_logits=False, space=space)
        got = values(spread(v, tensor(y)))
        np.testing.assert_allclose(got, spread_of(z, y, space), rtol=1e-4, atol=1e-7)
