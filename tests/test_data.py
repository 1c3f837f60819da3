"""Which examples of a data set are evaluated."""

import keras
import numpy as np
import pytest

import keras_drsl
from keras_drsl._data import class_ids, content_keys, read_examples
from tests.backends import on_tensorflow, on_torch
from tests.helpers import some_short
from tests.linear import inputs, linear_model

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


# Labels of three classes that name no single class, and the row that the error shows.
NOT_ONE_CLASS = {
    "multi-hot": ([1, 0, 1], r"\[1. 0. 1.\]"),
    "all": ([1, 1, 1], r"\[1. 1. 1.\]"),
    "none": ([0, 0, 0], r"\[0. 0. 0.\]"),
    "halves": ([0.5, 0.5, 0.0], r"\[0.5 0.5 0. \]"),
    "uniform": ([1 / 3, 1 / 3, 1 / 3], "row 1"),
    "negative": ([1.5, -0.5, 0.0], r"-0.5"),
    "twice": ([2, 0, 0], r"\[2. 0. 0.\]"),
    "nan": ([np.nan, 1, 0], "nan"),
}


@pytest.mark.parametrize("name", some_short(NOT_ONE_CLASS, more=set(NOT_ONE_CLASS) - {"multi-hot", "halves", "nan"}))
@pytest.mark.parametrize("user", ["evaluation", "curve", "attack", "training", "monitor", "pool"])
def test_labels_of_several_classes_are_refused(name, user):  # B4
    row, message = NOT_ONE_CLASS[name]
    x, _ = inputs(4)
    y = np.array([[1, 0, 0], row, [0, 1, 0], [0, 0, 1]], "float32")
    model = linear_model()
    calls = {
        "evaluation": lambda: keras_drsl.evaluate_robustness(model, x, y, eps=0.1, verbose=0),
        "curve": lambda: keras_drsl.robustness_curve(model, x, y, eps=[0.1], verbose=0),
        "attack": lambda: keras_drsl.attacks.PGD(0.1)(model, x, y),
        "training": lambda: train(model, x, y),
        "monitor": lambda: train(model, x, y.argmax(1), [keras_drsl.RobustnessMonitor(x, y, eps=0.1)]),
        "pool": lambda: keras_drsl.attacks.Pool(model, x, y),
    }
    if user == "training" and name in ("halves", "uniform"):  # labels of mixed images: only an attack needs one class
        calls[user]()
        return
    with pytest.raises(ValueError, match="`y` must name one class in each row.*" + message):
        calls[user]()


def train(model, x, y, callbacks=()):
    trained = keras_drsl.AdversarialTraining(model, 0.1, steps=1)
    loss = keras.losses.CategoricalCrossentropy if y.ndim == 2 else keras.losses.SparseCategoricalCrossentropy
    trained.compile("sgd", loss(from_logits=True))
    trained.fit(x, y, callbacks=list(callbacks), verbose=0)


@pytest.mark.parametrize(
    "labels", [np.eye(3)[[2, 0, 1]], 0.1 / 3 + 0.9 * np.eye(3)[[2, 0, 1]], np.eye(3, dtype=bool)[[2, 0, 1]]]
)
def test_labels_of_one_class_are_taken(labels):  # B4
    assert class_ids(labels, 3, 3).tolist() == [2, 0, 1]


class Column:
    """A column of a data set as Hugging Face's library gives it: a sequence, but no list."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


@pytest.mark.parametrize("form", ["dictionaries", "label last", "columns", "weights"])
def test_batches_and_columns_are_read_as_arrays_are(sorted_by_class, form):
    x, y = sorted_by_class
    parts = [slice(start, start + 30) for start in range(0, 100, 30)]
    forms = {
        "dictionaries": ([{"label": y[part], "image": x[part]} for part in parts], None),
        "label last": ([{"pixels": x[part], "labels": y[part]} for part in parts], None),
        "columns": (Column(list(x)), Column(list(y))),
        "weights": (iter([(x[part], y[part], np.ones(30)) for part in parts]), None),
    }
    data, labels = forms[form]
    data = iter(data) if isinstance(data, list) else data
    examples = read_examples(data, labels, max_samples=None)
    np.testing.assert_array_equal(examples.x, x)
    np.testing.assert_array_equal(examples.y, y)


@on_torch
@pytest.mark.short
@pytest.mark.parametrize("sized", [True, False])
def test_a_torch_data_loader_is_read(sorted_by_class, sized):
    import torch
    from torch.utils import data

    class Endless(data.IterableDataset):
        def __iter__(self):
            while True:
                yield from zip(*sorted_by_class, strict=True)

    x, y = map(torch.tensor, sorted_by_class)
    loader = data.DataLoader(data.TensorDataset(x, y) if sized else Endless(), batch_size=8)
    expected = read_examples(*sorted_by_class, max_samples=20).ids if sized else np.arange(20)
    np.testing.assert_array_equal(read_examples(loader, None, max_samples=20).ids, expected)


def test_dictionaries_without_one_input_are_named(sorted_by_class):
    x, y = sorted_by_class
    for batch in ({"image": x}, {"image": x, "text": x, "label": y}):
        with pytest.raises(ValueError, match=r'"label" or "labels" and one other .* Received: .*keys \[\'image\''):
            read_examples(iter([batch]), None, max_samples=None)
