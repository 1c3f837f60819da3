"""`evaluate_robustness`: one call from a model and a data set to a report."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_drsl._typing import Norm, Numbers, Tensor
from keras_drsl.evaluation.evaluator import Evaluator
from keras_drsl.evaluation.kept import check_argument
from keras_drsl.evaluation.report import RobustnessReport
from keras_drsl.evaluation.stopping import stopping_rule
from keras_drsl.evaluation.workers import check_workers
from keras_drsl.models.heads import View
from keras_drsl.models.state import check_model, preserve_state
from keras_drsl.threat import ThreatModel


def evaluate_robustness(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    eps: Numbers | None = None,
    norm: Norm | None = None,
    clip_min: Numbers | None = None,
    clip_max: Numbers | None = None,
    mask: Any = None,
    threat: ThreatModel | None = None,
    suite: str = "standard",
    attacks: Iterable[Any] | None = None,
    checks: str | Iterable[Any] | None = None,
    from_logits: bool | None = None,
    output: str | int | None = None,
    preprocessing: Callable[[Tensor], Tensor] | None = None,
    expectation_draws: int = 1,
    attack_input: str | int | None = None,
    task: str = "multiclass",
    which: int | None = None,
    ignore_class: int | None = None,
    batch_size: int = 256,
    max_samples: int | None = None,
    shard: tuple[int, int] | None = None,
    x_pool: Any = None,
    undefended: keras.Model | None = None,
    seed: int = 0,
    state_path: str | os.PathLike[str] | None = None,
    keep_examples: bool | str | os.PathLike[str] = False,
    workers: str | None = None,
    precision: float | None = None,
    at_least: float | None = None,
    verbose: int = 1,
) -> RobustnessReport:
    """Measure how robust a classifier is: the worst case of several attacks, with checks that test the result.

    Use `suite="standard"` for a number to publish or to decide by, and `"quick"` to watch a model during development.

    An example is robust if the model classifies it correctly and no attack finds a misclassified input within the
    threat model: `||x_adv - x|| <= eps`, and all values in `[clip_min, clip_max]`. Each attack works on the examples
    that withstood those before it. Attacks without gradients come last.

    Suites:

    - `"quick"`: FGSM on the cross-entropy, and PGD with 20 steps on the margin.
    - `"cleverhans"`: the attacks of that library that work on Keras 3 (TensorFlow only): FGM, PGD, BIM, Madry, MIM.
    - `"fast"`: `FastAPGD` and `FastSquare` of `keras_drsl.attacks`: short searches on all examples, and longer ones
      where the margin came near 0. The checks are those of `"standard"`.
    - `"standard"`: APGD on the cross-entropy; targeted APGD on the difference-of-logits ratio and on the margin (nine
      target classes, 100 steps each); Square with 5,000 queries. Losses like `DRSLoss` make the first two attacks look
      weaker than they are. The attack on the margin is not fooled. It starts twice for each target class: at a random
      point, and at the nearest image of that class.

    Note:

    - Some checks attack up to 200 of the images that are still robust. An image that they break counts as broken.
    - The model is not changed. The counters of its random numbers are restored at the end.
    - Logits are found behind a softmax. Where they are not found, the logarithms of the probabilities replace them, and
      a check warns.

    Args:
        model: A classifier: any `keras.Model` with one input and outputs `(batch, C)`, logits or probabilities. A
            single unit (C = 1) is read as two classes, with the logits `[0, z]`.
        x_or_dataset: Inputs `(count, ...)` within the valid range: an array, a tensor, or a column of a data set. Or an
            iterable of batches, such as a `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch `DataLoader`. A batch
            is a pair `(inputs, labels)`, or a dictionary with a key `"label"` or `"labels"` and one other. Or the path
            of a folder of images with one sub-folder per class. Its images have values in [0, 255], and the report
            names classes and files.
        y: The true labels of an array of inputs: class ids `(count,)` or `(count, 1)`, or one-hot `(count, C)`.
        eps: The radius of the ball around each input, > 0, in units of the input.
        norm: `"inf"` (the default), 2 or 1.
        clip_min: The smallest valid input value, 0 by default; or one per channel or feature.
        clip_max: The largest valid input value, 1 by default; or one per channel or feature.
        mask: True for each channel or feature that may not change; see `keras_drsl.ThreatModel`.
        threat: A `keras_drsl.ThreatModel` in place of `eps`, `norm`, `clip_min`, `clip_max` and `mask`.
        suite: `"quick"`, `"cleverhans"`, `"fast"` or `"standard"`: which attacks and which checks run.
            `"autoattack"` is another name of `"standard"`, which has targeted APGD on the margin in place of FAB.
        attacks: Attacks of `keras_drsl.attacks` or their names, in place of those of the suite.
        checks: Another suite, whose checks run; or checks of `keras_drsl.evaluation.check` or their names, in place of
            those of the suite.
        from_logits: Whether the outputs are logits; None to find out.
        output: The name or position of the output that holds the classes; None for a model with one output.
        preprocessing: A Keras layer or a function in front of the model, or None. It maps inputs within the valid range
            to what the model takes. Attacks change what it is given.
        expectation_draws: Over how many calls the probabilities of a random model are averaged, >= 1. Attacks follow
            the gradient of the average, and the average decides what is misclassified.
        attack_input: For a model with several inputs, the name or position of the one that is attacked; the others stay
            as they are. Or `"embeddings"`, or the name of an embedding layer: then what the layer gives is attacked.
        task: `"multiclass"`, or `"multilabel"` for a model with a unit for each of several labels, and `y` of 0 and 1
            of shape `(count, labels)`. An example is then robust if all labels stay right. Or `"positions"` for a model
            that classifies each position, with outputs `(batch, ..., C)`: pixels of an image, tokens of a text. All
            accuracies are then shares of positions, under one perturbation of the whole input. Negative labels do not
            count, nor labels whose sample weight is 0 in a data set.
        which: For `"multilabel"`, the only label that counts, or None for all.
        ignore_class: For `"positions"`, the class id of those that do not count, beside negative ids; or None.
        batch_size: How many examples are attacked together. It changes speed and memory only, up to rounding.
        max_samples: How many examples to evaluate; None for all. Each class has its share, and the choice does not
            depend on the order of the data set. Of a data set that does not know its length, the first ones are taken.
        shard: `(i, n)` to evaluate only those at the positions i, i + n, i + 2 n, ... of the data set (0 <= i < n); see
            `RobustnessReport.merge`.
        x_pool: Where the attacks look for images of a target class to start at: inputs, a pair `(inputs, labels)`, or a
            data set of batches of such pairs. By default the whole data set, also with `max_samples` and `shard`.
        undefended: A second model of the same inputs and classes, trained without a defense, for two more checks.
        seed: The seed of all randomness, >= 0. Equal seeds give equal reports.
        state_path: A file to keep progress in. After a kill, the same call continues from it.
        keep_examples: True to keep the worst point of each example in the report, as `report.x_adv`. A path keeps the
            points in a file, which takes no memory and outlives a kill. `RobustnessReport.from_npz` reads it. A file
            that exists is replaced at the end.
        workers: `"processes:N"` to attack batches of examples in N processes of this machine, or `"ray"` as tasks of
            Ray: on the cluster that `ray.init(address=...)` connected, or else on this machine. The report is that of
            one process. Choose a `batch_size` that gives each worker several batches. None for this process.
        precision: End as soon as the 95 % interval of the robust accuracy reaches at most this far to each side, in
            (0, 0.5). Examples are then attacked in a random order, 64 at a time by all attacks, and the report is on
            those that were. The interval is that of a confidence sequence: it is valid wherever the evaluation ends,
            and wider than that of a full one. Such reports do not merge.
        at_least: End as soon as this interval lies wholly above or wholly below a share in (0, 1]. With `precision`,
            both rules must be met.
        verbose: 0 for no output, 1 to show progress on `sys.stderr`: a bar on a terminal, elsewhere a line per minute.

    Returns:
        A `RobustnessReport`.

    Raises:
        ValueError: If an argument is out of its range, inputs lie outside the valid range, labels do not match, the
            outputs of the model are neither logits nor probabilities or not finite, the state file belongs to another
            evaluation, the model cannot be sent to workers, or the examples are too few for the precision.
        ImportError: For workers without joblib or Ray.
        RuntimeError: If workers die again and again.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    >>> x, y = np.random.default_rng(0).random((20, 8)), np.arange(20) % 3
    >>> report = keras_drsl.evaluate_robustness(model, x, y, eps=0.1, suite="quick", verbose=0)
    >>> 0 <= report.robust_accuracy <= report.clean_accuracy <= 1
    True

    Reference: Croce and Hein, arXiv:2003.01690 (the ensemble); Carlini et al., "On Evaluating Adversarial Robustness",
    arXiv:1902.06705 (the checks).
    """
    check_model("model", model)
    keep = check_argument(keep_examples, state_path)
    started = check_workers(workers)
    stopping = stopping_rule(precision, at_least, shard=shard, workers=workers, task=task)
    evaluator = Evaluator(
        ThreatModel.from_arguments(eps, norm, clip_min, clip_max, threat, mask),
        suite=suite,
        attacks=attacks,
        checks=checks,
        seed=seed,
        batch_size=batch_size,
        max_samples=max_samples,
        shard=shard,
        view=View(output, preprocessing, expectation_draws, attack_input, task, which, ignore_class),
        stopping=stopping,
    )
    examples = evaluator.read_examples(model, x_or_dataset, y)
    with preserve_state(model, undefended, preprocessing, inputs=examples.x):
        found = evaluator.find_logits(model, examples, from_logits)
        second = None if undefended is None else evaluator.find_undefended(undefended, found, examples)
        pool = evaluator.make_pool(found, examples, x_pool)
        return evaluator.evaluate(
            found,
            examples,
            pool=pool,
            undefended=second,
            state_path=state_path,
            keep_examples=keep,
            workers=started,
            from_logits=from_logits,
            verbose=verbose,
        )
