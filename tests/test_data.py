"""Which examples of a data set are evaluated."""

import keras
import numpy as np
import pytest

from keras_drsl._data import content_keys, read_examples
from tests.backends import on_tensorflow

SIZES = {0: 60, 1: 30, 2: 10}


@pytest.fixture
def sorted_by_class():
    y = np.repeat(list(SIZES), list(SIZES.values()))
    return np.random.default_rng(0).random((len(y), 4)).astype("float32"), y


def one_hot(y):
    return np.eye(3)[y]


# D1: the first 25 examples of a sorted data set are of one class.
@pytest.mark.parametrize("form", [lambda y: y, lambda y: y[:, None], one_hot])
def test_max_samples_takes_each_class_in_proportion(sorted_by_class, form):
    x, y = sorted_by_class
    examples = read_examples(x, form(y), max_samples=20)
    assert np.bincount(y[examples.ids]).tolist() == [12, 6, 2]
    np.testing.assert_array_equal(examples.x, x[examples.ids])
    np.testing.assert_array_equal(examples.y, form(y)[examples.ids])


@pytest.mark.parametrize("count", [1, 2, 7, 33, 99])
def test_rounding_leaves_no_class_a_whole_example_off(sorted_by_class, count):
    x, y = sorted_by_class
    taken = np.bincount(y[read_examples(x, y, max_samples=count).ids], minlength=3)
    assert taken.sum() == count
    for size, number in zip(SIZES.values(), taken, strict=True):
        assert abs(number - count * size / 100) < 1


def test_the_choice_does_not_depend_on_the_order(sorted_by_class):
    x, y = sorted_by_class
    order = np.random.default_rng(1).permutation(len(x))
    expected = read_examples(x, y, max_samples=30).x
    shuffled = read_examples(x[order], y[order], max_samples=30).x
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(expected, axis=0))


def test_shards_share_the_chosen_examples(sorted_by_class):
    whole = read_examples(*sorted_by_class, max_samples=30)
    parts = [read_examples(*sorted_by_class, max_samples=30, shard=(part, 4)) for part in range(4)]
    np.testing.assert_array_equal(np.sort(np.concatenate([part.ids for part in parts])), whole.ids)
    for number, part in enumerate(parts):
        assert (part.ids % 4 == number).all()
        assert part.digest == whole.digest


class Batches(keras.utils.PyDataset):
    """Batches of ten examples."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    @property
    def num_batches(self):
        return 10

    def __getitem__(self, index):
        part = slice(10 * index, 10 * index + 10)
        return self.x[part], self.y[part]


def test_a_data_set_of_known_length_is_read_whole(sorted_by_class):
    expected = read_examples(*sorted_by_class, max_samples=20)
    examples = read_examples(Batches(*sorted_by_class), None, max_samples=20)
    np.testing.assert_array_equal(examples.ids, expected.ids)
    assert len(examples.whole[0]) == 100


@on_tensorflow
def test_a_tf_data_set_is_read_as_far_as_its_length_is_known(sorted_by_class):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(sorted_by_class).batch(8)
    np.testing.assert_array_equal(
        read_examples(data, None, max_samples=20).ids, read_examples(*sorted_by_class, max_samples=20).ids
    )
    for unknown in (data.repeat(), data.filter(lambda x, y: True)):
        assert read_examples(unknown, None, max_samples=20).ids.tolist() == list(range(20))


def test_a_generator_without_end_is_read_as_far_as_needed(sorted_by_class):
    x, y = sorted_by_class

    def forever():
        while True:
            yield x[:8], y[:8]

    assert len(read_examples(forever(), None, max_samples=20).x) == 20


def test_keys_depend_on_values_only():
    x = np.random.default_rng(2).random((5, 3))
    keys = content_keys(x)
    assert len(set(keys.tolist())) == 5
    np.testing.assert_array_equal(content_keys(x[::-1]), keys[::-1])
    np.testing.assert_array_equal(content_keys(np.array([[0.0]])), content_keys(np.array([[-0.0]])))
