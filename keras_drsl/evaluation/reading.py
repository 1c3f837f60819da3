"""The examples of an evaluation, from arrays, data sets and folders of images."""

import os
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_drsl import datasets
from keras_drsl._data import Examples, binary_labels, read_examples, read_pool
from keras_drsl._typing import Array
from keras_drsl.models.heads import View
from keras_drsl.models.inputs import Inputs, Layout, check_only_input, layout_of
from keras_drsl.threat import ThreatModel


class Reader:
    """Read examples for one threat model and one way to look at a model.

    Args:
        threat: The threat model, which inputs must fit.
        view: How the model is looked at.

    Attributes:
        inputs: What makes one array of several inputs, once such examples were read; None before, and for one input.
    """

    def __init__(self, threat: ThreatModel, view: View) -> None:
        self._threat = threat
        self._view = view
        self.inputs: Inputs | None = None

    def needs_model(self, x: Any) -> bool:
        """Return whether the model says how inputs are read: the sizes of images, or names of inputs."""
        return self._view.attack_input is not None or isinstance(x, str | os.PathLike | datasets.Folder)

    def read(
        self, model: keras.Model | None, x: Any, y: Any, *, max_samples: int | None, shard: tuple[int, int] | None
    ) -> Examples:
        """Return examples of the form that `evaluate_robustness` takes, or raise `ValueError`."""
        chosen: dict[str, Any] = {"max_samples": max_samples, "shard": shard}
        chosen["weights_mask"] = self._view.task == "positions"
        if self._view.attack_input is None and self._view.preprocessing is None:
            check_only_input(model)
        if isinstance(x, str | os.PathLike | datasets.Folder):
            examples = self._read_folder(model, x, y, chosen)
        elif self._view.attack_input is None:
            examples = read_examples(x, y, **chosen)
        else:
            assert model is not None
            self.inputs = Inputs(model, self._view.attack_input, self._view.preprocessing)
            examples = read_examples(x, y, **chosen, pack=self.inputs.pack)
            examples = examples._replace(layout=self.inputs.layout, are_8bit=self.inputs.are_8bit)
        self.check_inputs("x_or_dataset", examples.whole[0], examples.layout)
        return self._split_labels(examples) if self._view.task == "multilabel" else examples

    def _read_folder(self, model: Any, x: Any, y: Any, chosen: dict[str, Any]) -> Examples:
        task, attack_input = self._view.task, self._view.attack_input
        if task != "multiclass" or attack_input is not None:
            raise ValueError(
                "`task` and `attack_input` must be left out for a folder of images, which holds one image and one "
                f"class per example. Received: task={task!r}, attack_input={attack_input!r}"
            )
        if y is not None:
            raise ValueError(
                f"`y` must be None for a folder of images, which names their classes. Received: {type(y).__name__}"
            )
        first = self._view.preprocessing if isinstance(self._view.preprocessing, keras.Model) else model
        folder = x if isinstance(x, datasets.Folder) else datasets.load_folder(x, image_shape(first))
        # Images that were not resized have the values of their files.
        are_integers = np.array_equal(folder.x, np.rint(folder.x))
        examples = read_examples(folder.x.astype("uint8") if are_integers else folder.x, folder.y, **chosen)
        return examples.with_names(folder.files, folder.class_names)

    def whole_pool(self, examples: Examples) -> tuple[Array, Array]:
        """Return the inputs and labels of the whole data set of examples, as a pool."""
        if self._view.task != "multilabel":
            return examples.whole
        layout = None if self.inputs is None else self.inputs.layout
        x, y, _ = self._rows(*examples.whole, layout)
        return x, y

    def read_pool(self, x_pool: Any, examples: Examples) -> tuple[Array, Array | None]:
        """Return the inputs and labels of a pool, or raise `ValueError` if they do not fit the examples."""
        pack = None if self.inputs is None else partial(self.inputs.pack, name="x_pool")
        layout = None if self.inputs is None else self.inputs.layout
        x, y = read_pool(x_pool, pack)
        expected = examples.x if examples.layout is None else examples.layout.attacked_part(examples.x)
        received = x if layout is None else layout.attacked_part(x)
        if received.shape[1:] != expected.shape[1:]:
            raise ValueError(
                f"`x_pool` must hold inputs of shape {expected.shape[1:]}. Received: shape {received.shape[1:]}"
            )
        self.check_inputs("x_pool", x, layout)
        if self._view.task != "multilabel":
            return x, y
        if y is None:
            raise ValueError("`x_pool` must hold labels for a model of several. Received: inputs alone")
        rows, labels, _ = self._rows(x, y, layout)
        return rows, labels

    def check_inputs(self, name: str, x: Array, layout: Layout | None) -> None:
        """Raise `ValueError` unless what is attacked fits the threat model."""
        if layout is not None:
            name, x = layout.name_in(name), layout.attacked_part(x)
        self._threat.validate(name, x)

    def _split_labels(self, examples: Examples) -> Examples:
        """Return examples with the labels 0 and 1: one row per label of each, or one row for the only label."""
        x, y, layout = self._rows(examples.x, examples.y, examples.layout)
        num_labels = len(x) // len(examples.x)
        ids = (examples.ids[:, None] * num_labels + np.arange(num_labels)).reshape(-1)
        return examples._replace(x=x, y=y, ids=ids, layout=layout, num_labels=num_labels)

    def _rows(self, x: Array, y: Any, layout: Layout | None) -> tuple[Array, Array, Layout | None]:
        """Return inputs and labels with one row per label that counts, and the layout of such rows."""
        labels, which = binary_labels(y), self._view.which
        if which is None:
            layout, x = (layout or layout_of(x)).repeat_for_labels(x, labels.shape[1])
            return x, labels.reshape(-1), layout
        if which >= labels.shape[1]:
            raise ValueError(f"`which` must be one of the {labels.shape[1]} labels in `y`. Received: which={which}")
        return x, labels[:, which], layout

    def view_of(self, examples: Examples) -> View:
        """Return how a model is looked at to attack these examples."""
        embedding = None if self.inputs is None else self.inputs.embedding
        return self._view.replace(layout=examples.layout, embedding=embedding)

    def refresh(self, examples: Examples) -> Examples:
        """Return examples whose embeddings are attacked with what the layer gives now, and any others as they are."""
        if self.inputs is None or self.inputs.embedding is None:
            return examples
        assert self.inputs.layout is not None
        x = self.inputs.refresh(examples.x, examples.layout)
        whole = self.inputs.refresh(examples.whole[0], self.inputs.layout)
        return examples._replace(x=x, whole=(whole, examples.whole[1]))


def image_shape(model: Any) -> tuple[int | None, ...]:
    """Return the height, width and channels that a model takes, None for each that is not known."""
    inputs = getattr(model, "inputs", None) or []
    shape = tuple(inputs[0].shape[1:]) if len(inputs) == 1 else ()
    if len(shape) != 3:
        return (None, None, None)
    return (*shape[1:], shape[0]) if keras.config.image_data_format() == "channels_first" else shape
