"""Certificates by randomized smoothing: the radius within which no attack can change a vote under random noise."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_drsl import _validation
from keras_drsl._data import Examples, class_ids, read_examples
from keras_drsl._progress import Progress
from keras_drsl._typing import Array, Tensor
from keras_drsl.certificates import bounds
from keras_drsl.certificates.report import CertificateReport
from keras_drsl.certificates.state import State
from keras_drsl.models.fingerprint import provenance
from keras_drsl.models.heads import View
from keras_drsl.models.logits import NUM_TRIED, LogitsModel, find_logits_of
from keras_drsl.models.state import check_model, preserve_state


def certify(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    sigma: float,
    draws: int = 10_000,
    alpha: float = 0.001,
    radius: float | None = None,
    selection_draws: int = 100,
    from_logits: bool | None = None,
    output: str | int | None = None,
    preprocessing: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    max_samples: int | None = None,
    shard: tuple[int, int] | None = None,
    state_path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    verbose: int = 1,
) -> CertificateReport:
    """Prove within which L2 radius the vote of a model under random noise stays right, for each example.

    Use it where an upper bound from attacks is not enough: no attack of any kind can do better, up to the rounding of
    numbers and the quality of the random numbers. It needs no gradient, so nothing can hide one. What is certified is
    not the model itself but its vote, the class that it returns most often for an input with normal noise. Train the
    model on inputs with noise of the same `sigma`.

    Formula: `radius = sigma * Phi^-1(p)`, with

    - `p`: a lower bound of the share of draws for which the model returns the class of the vote, from the counts of
      `draws` draws, by Clopper and Pearson. With a probability of at least `1 - alpha` it is right.
    - `Phi^-1`: the inverse of the distribution function of the standard normal distribution.

    The class of the vote is found on `selection_draws` other draws. Where it is not the true one, or `p` is not above
    1/2, the radius is 0.

    Note:

    - An example whose class is wrong after the selection gets no more draws.
    - Draws end early where the share is below 1/2 with a probability of error of `alpha`, by a confidence sequence:
      such an example abstains. This makes no radius wrong. `report.draws_used` says what was saved.
    - With `radius=`, draws also end as soon as it is clear whether that radius can be certified. Of the result, only
      `accuracy(radius)` has a meaning then: other radii are smaller than those without it, as the bounds are those of
      the confidence sequence, which are valid at any end.
    - Each certificate is wrong with a probability of at most `alpha`, so of 1,000 of them one may be.
    - Noise is not clipped to a valid range. NumPy draws it for each example on its own, so that shards, batch sizes and
      backends share it.
    - A radius is at most `sigma * Phi^-1(alpha^(1 / draws))`: for 10,000 draws and 0.001, 3.2 times `sigma`.

    Args:
        model: A classifier of one input, as in `evaluate_robustness`.
        x_or_dataset: Inputs, shape `(count, ...)`; or a data set of batches `(inputs, labels)`.
        y: The labels of an array of inputs: class ids or one-hot.
        sigma: The standard deviation of the noise, a number > 0, in the units of the inputs.
        draws: How many draws estimate the share.
        alpha: The probability that a certificate is wrong, in (0, 1/2).
        radius: A radius to decide about, a number > 0 that `draws` can certify; or None for the largest ones.
        selection_draws: How many draws choose the class, >= 1.
        from_logits: As in `evaluate_robustness`; only of meaning for a single unit.
        output: As in `evaluate_robustness`.
        preprocessing: As in `evaluate_robustness`; the noise is added to its inputs.
        batch_size: How many inputs the model is called on together.
        max_samples: As in `evaluate_robustness`.
        shard: As in `evaluate_robustness`; `CertificateReport.merge` joins the shards.
        state_path: A file that keeps the progress, so that a killed run goes on where it was; or None.
        seed: The seed of the noise, >= 0.
        verbose: 0 for no output, 1 to show progress on `sys.stderr`.

    Returns:
        A `CertificateReport`.

    Raises:
        ValueError: If an argument is out of its range, `draws` are too few for any certificate at this `alpha`, labels
            do not match, or the state belongs to another run.
        ImportError: Without SciPy.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> x, y = np.random.default_rng(0).random((10, 8)), np.arange(10) % 3
    >>> report = keras_drsl.certify(model, x, y, sigma=0.25, draws=200, verbose=0)
    >>> report.radii.shape
    (10,)

    Reference: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing",
    arXiv:1902.02918. Voracek, "Treatment of Statistical Estimation Problems in Randomized Smoothing for Adversarial
    Robustness", arXiv:2406.17830, for the early end.
    """
    check_model("model", model)
    plan = _Plan.checked(sigma, draws, alpha, radius, selection_draws, seed)
    batch_size = _validation.check_integer("batch_size", batch_size, at_least=1)
    max_samples = _validation.check_max_samples(max_samples)
    view = View(output, preprocessing).check()
    examples = read_examples(x_or_dataset, y, max_samples=max_samples, shard=_validation.check_shard(shard))
    settings = plan._asdict() | {"batch_size": batch_size, "max_samples": max_samples, "shard": shard and [*shard]}
    settings = {"method": "smoothing", "norm": 2} | settings | {"from_logits": from_logits} | view.settings
    with preserve_state(model, preprocessing, inputs=examples.x):
        found = find_logits_of(model, examples.x[:NUM_TRIED], from_logits, view)
        classes = found.model.logits(examples.x[:1]).shape[-1]
        labels = class_ids(examples.y, len(examples.x), classes)
        facts = provenance(model, examples.digest)
        # A run that stopped for want of memory may continue with smaller batches.
        same = {name: value for name, value in settings.items() if name != "batch_size"}
        state = State(state_path, {"settings": same, "model": facts["model"], "data": facts["data"]})
        with Progress(enabled=bool(verbose)) as progress:
            _certify_all(found, examples, labels, plan, batch_size, state, progress)
    rows = [state.rows[str(index)] for index in examples.ids]
    per_example = {"index": examples.ids.tolist(), "label": labels.tolist()}
    per_example |= {name: [row[name] for row in rows] for name in ("prediction", "radius", "hits", "draws")}
    return CertificateReport(settings, per_example, facts)


class _Plan(NamedTuple):
    """Hold the arguments of the statistics, which `certify` explains."""

    sigma: float
    draws: int
    alpha: float
    radius: float | None
    selection_draws: int
    seed: int

    @classmethod
    def checked(cls, sigma: Any, draws: Any, alpha: Any, radius: Any, selection_draws: Any, seed: Any) -> "_Plan":
        """Return the arguments, or raise `ValueError` for one that is out of its range."""
        sigma = _validation.check_positive("sigma", sigma)
        draws = _validation.check_integer("draws", draws, at_least=1)
        alpha = _validation.check_number("alpha", alpha, "a number in (0, 0.5)", lambda value: 0 < value < 0.5)
        radius = None if radius is None else _validation.check_positive("radius", radius)
        bounds.check_draws(draws, alpha, sigma, radius)
        return cls(
            sigma,
            draws,
            alpha,
            radius,
            _validation.check_integer("selection_draws", selection_draws, at_least=1),
            _validation.check_integer("seed", seed, at_least=0),
        )


def _certify_all(
    model: LogitsModel,
    examples: Examples,
    labels: Array,
    plan: _Plan,
    batch_size: int,
    state: State,
    progress: Progress,
) -> None:
    for done, (index, x, label) in enumerate(zip(examples.ids, examples.x, labels, strict=True)):
        if str(index) not in state.rows:
            progress.update(f"certificates, {done} of {len(labels)} examples", done=done, total=len(labels))
            noise = _Noise(model, x, plan, int(index), batch_size)
            state.add(int(index), _certify_one(noise, int(label), plan))
    state.save()


class _Noise:
    """Random copies of an example, as the model classifies them."""

    def __init__(self, model: LogitsModel, x: Array, plan: _Plan, index: int, batch_size: int) -> None:
        self._model = model
        self._x = x
        self._sigma = np.float32(plan.sigma)
        self._random = np.random.default_rng([plan.seed, index])
        self._batch_size = batch_size

    def predictions(self, count: int) -> Array:
        """Return the classes of the next copies, at most a batch of them; -1 where an output is NaN."""
        count = min(count, self._batch_size)
        noise = self._random.standard_normal((count, *self._x.shape), dtype="float32")
        logits = self._model.model.logits(self._x + self._sigma * noise)
        return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def _certify_one(noise: _Noise, label: int, plan: _Plan) -> dict[str, Any]:
    """Return the row of an example."""
    votes: list[Array] = []
    while (left := plan.selection_draws - sum(map(len, votes))) > 0:
        votes.append(noise.predictions(left))
    seen = np.concatenate(votes)
    chosen = int(np.bincount(seen[seen >= 0], minlength=1).argmax()) if (seen >= 0).any() else -1
    if chosen != label:
        return {"prediction": chosen, "radius": 0.0, "hits": 0, "draws": plan.selection_draws}
    rule = bounds.Rule(plan.draws, plan.alpha, plan.sigma, plan.radius)
    while not rule.has_ended:
        rule.add(noise.predictions(plan.draws - rule.count) == label)
    return {
        "prediction": None if rule.abstains else chosen,
        "radius": rule.radius,
        "hits": rule.hits,
        "draws": plan.selection_draws + rule.count,
    }
