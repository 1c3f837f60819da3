"""The protocol: which attacks run on which examples, and what counts as robust."""

import math
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_drsl import _arguments, _backend
from keras_drsl.attacks import Attack, Classifier, balls
from keras_drsl.attacks.classifier import class_ids, fingerprint, is_wrong
from keras_drsl.evaluation import checks
from keras_drsl.evaluation.examples import Examples, digest, read_examples
from keras_drsl.evaluation.head import Head, find_logits, unchanged
from keras_drsl.evaluation.report import CLEAN, Check, RobustnessReport
from keras_drsl.evaluation.state import State
from keras_drsl.evaluation.suites import make_attacks


def evaluate_robustness(
    model: keras.Model,
    x_or_dataset: Any,
    y: Any = None,
    *,
    eps: float,
    norm: str | int = "inf",
    suite: str = "standard",
    attacks: Iterable[Any] | None = None,
    from_logits: bool | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    batch_size: int = 256,
    max_samples: int | None = None,
    shard: tuple[int, int] | None = None,
    undefended: keras.Model | None = None,
    seed: int = 0,
    state_path: str | os.PathLike | None = None,
    verbose: int = 1,
) -> RobustnessReport:
    """Find out how robust a classifier is: the worst case of several attacks, and whether to believe it.

    Use `suite="standard"` for a number to publish or to decide by, `"quick"` to watch a model while working on it.

    An example is robust if the model classifies it correctly and no attack found a misclassified input within the
    threat model: `||x_adv - x|| <= eps`, all values in `[clip_min, clip_max]`. An attack works only on what those
    before it left standing; those without gradients come last. Some checks attack too, up to 200 of the images still
    standing, and what they break is broken. The model is not changed.

    Suites:

    - `"quick"`: FGSM on the cross-entropy, PGD with 20 steps on the margin.
    - `"cleverhans"`: the attacks of that library that work on Keras 3 (TensorFlow only): FGM, PGD, BIM, Madry, MIM.
    - `"standard"`: APGD on the cross-entropy, targeted APGD on the difference-of-logits ratio and on the margin (nine
      rivals, 100 steps each), Square with 5,000 queries. Losses that level the rivals, as `DRSLoss` does, blunt the
      first two: the margin sees through them.

    Args:
        model: a classifier, any `keras.Model` with one input and outputs `(batch, C)`, C >= 2: logits or
            probabilities.
        x_or_dataset: inputs `(count, ...)` within the range, an array or tensor; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches `(inputs, labels)`.
        y: true labels of an array of inputs: class ids `(count,)` or `(count, 1)`, or one-hot `(count, C)`.
        eps: the radius of the ball around each input, > 0, in units of the input.
        norm: `"inf"` or 2.
        suite: `"quick"`, `"cleverhans"` or `"standard"`; also sets which checks run.
        attacks: attacks of `keras_drsl.attacks` or their names, in place of the suite's.
        from_logits: whether the outputs are logits; None to look. Logits are looked for behind a softmax. If there is
            one but they cannot be found, log-probabilities stand in and a check warns.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        batch_size: how many examples are attacked together. It changes speed and memory only, up to rounding.
        max_samples: how many examples to evaluate, the first ones; None for all.
        shard: `(i, n)` to evaluate only every n-th of them, from the i-th on (0 <= i < n); see
            `RobustnessReport.merge`.
        undefended: a second model of the same inputs and classes, trained without a defence, for two more checks.
        seed: the seed of all randomness, >= 0. Equal seeds give equal reports.
        state_path: a file to keep progress in. The same call finishes what a killed one has begun.
        verbose: 0 for silence, 1 for a progress bar an attack.

    Returns:
        A `RobustnessReport`.

    Raises:
        ValueError: for arguments out of their range, inputs outside the clip range, labels that don't match, a model
            whose outputs are no logits or probabilities or not finite, a state file of another evaluation.

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
    threat = check_threat(eps, norm, clip_min, clip_max)
    plan = make_plan(suite, attacks, threat, seed=seed, batch_size=batch_size, max_samples=max_samples, shard=shard)
    examples = read_examples(x_or_dataset, y, max_samples=max_samples, shard=shard)
    check_inputs(examples.x, threat)
    with unchanged(model, undefended):
        head = find_logits(model, examples.x[:32], from_logits)
        twin = None if undefended is None else _find_twin(undefended, head, examples.x[:32])
        return evaluate_examples(head, twin, examples, plan, state_path=state_path, verbose=verbose)


class Plan(NamedTuple):
    """What is done to the examples.

    Attributes:
        suite: the suite whose checks run.
        attacks: the attacks by name.
        threat: `eps`, `norm`, `clip_min` and `clip_max`.
        settings: what the report says of all this.
    """

    suite: str
    attacks: dict[str, Attack]
    threat: dict[str, Any]
    settings: dict[str, Any]


def make_plan(
    suite: str,
    attacks: Iterable[Any] | None,
    threat: dict[str, Any],
    *,
    seed: int,
    batch_size: int,
    max_samples: int | None,
    shard: tuple[int, int] | None,
) -> Plan:
    """What the arguments of an evaluation ask for, or `ValueError`."""
    return Plan(
        suite=suite,
        attacks=make_attacks(suite, attacks, threat, _arguments.check_integer("seed", seed, at_least=0)),
        threat=threat,
        settings={
            **threat,
            "suite": suite if attacks is None else "custom",
            "checks": suite,
            "seed": seed,
            "batch_size": _arguments.check_integer("batch_size", batch_size, at_least=1),
            "max_samples": max_samples,
            "shard": None if shard is None else list(_check_shard(shard)),
        },
    )


def evaluate_examples(
    head: Head, twin: Head | None, examples: Examples, plan: Plan, *, state_path: Any, verbose: int
) -> RobustnessReport:
    """The report on a model whose logits are known."""
    settings = plan.settings | {"outputs": head.kind}
    batch_size, seed = settings["batch_size"], settings["seed"]
    logits = in_batches(head.classifier, examples.x, batch_size)
    outputs = logits if head.kind == "logits" else in_batches(head.model, examples.x, batch_size)
    labels = class_ids(examples.y, len(examples.x), logits.shape[1])
    examples = examples._replace(y=labels)
    if not (np.isfinite(logits).all() and np.isfinite(outputs).all()):
        raise ValueError("`model` must return finite outputs for all inputs. Received: NaN or infinite ones")

    # Attacks without gradients come last: what they break, the others could not.
    attacks = dict(sorted(plan.attacks.items(), key=lambda item: isinstance(item[1], checks.BLACK_BOX)))
    provenance = _provenance(head, twin, examples)
    identity = {
        "settings": settings,
        **{key: provenance[key] for key in ("model", "undefended", "data", "backend")},
        "answers": digest(outputs.argmax(axis=1)),
        "attacks": {name: attack.settings for name, attack in attacks.items()},
        "version": provenance["versions"]["keras-drsl"],
    }
    state = State(state_path, identity, len(examples.x))
    wrong = is_wrong(outputs, labels)
    state.broken_by = [CLEAN if wrong[place] else one for place, one in enumerate(state.broken_by)]
    case = checks.Case(
        head=head,
        x=examples.x,
        y=labels,
        ids=examples.ids,
        logits=logits,
        broken_by=state.broken_by,
        threat=plan.threat,
        seed=seed,
        batch_size=batch_size,
        audit=state.audit,
        attacks=attacks,
        twin=twin,
    )
    before, after = checks.choose(plan.suite, case)
    _run_checks(before, case, state, verbose)
    for name, attack in attacks.items():
        _run_attack(name, attack, case, state, verbose)
    _run_checks(after, case, state, verbose)

    found = [Check(**state.checks[check.__name__]) for check in before + after]
    records = [
        {"name": name, "settings": attack.settings, "seconds": state.seconds[name]} for name, attack in attacks.items()
    ]
    for name in (f"check:{check.name}" for check in found):
        if name in state.broken_by:
            # A check stops at a number of images: what it was tried on is not all that stood.
            records.append({"name": name, "settings": {}, "seconds": state.seconds[name], "tried": state.done[name]})
    per_example = {"index": examples.ids.tolist(), "label": labels.tolist(), "broken_by": list(state.broken_by)}
    return RobustnessReport(settings, records, found, per_example, provenance)


def check_model(name: str, model: Any) -> None:
    """`ValueError` unless it is a Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`{name}` must be a keras.Model. Received: {type(model).__name__}")


def _find_twin(undefended: Any, head: Head, x: np.ndarray) -> Head:
    """The logits of the undefended model, or `ValueError` if it does not go with the other."""
    check_model("undefended", undefended)
    try:
        twin = find_logits(undefended, x, None)
        classes = [one.classifier.logits(x[:1]).shape[1] for one in (twin, head)]
    except Exception as error:
        raise ValueError(f"`undefended` must be a classifier of the same inputs as `model`: {error}") from error
    if classes[0] != classes[1]:
        raise ValueError(f"`undefended` must have the {classes[1]} classes of `model`. Received: {classes[0]}")
    return twin


def check_threat(eps: Any, norm: Any, clip_min: Any, clip_max: Any) -> dict[str, Any]:
    """The threat model, or `ValueError`; what does not depend on the inputs."""
    attack = Attack(eps, norm=norm, clip_min=clip_min, clip_max=clip_max)
    span = attack.clip_max - attack.clip_min
    if attack.norm == "inf" and attack.eps > span:
        raise ValueError(f"`eps` must be no larger than the range, clip_max - clip_min = {span:g}. Received: eps={eps}")
    return {name: getattr(attack, name) for name in ("eps", "norm", "clip_min", "clip_max")}


def check_inputs(x: np.ndarray, threat: dict[str, Any]) -> None:
    """`ValueError` for inputs the threat model does not fit."""
    low, high = threat["clip_min"], threat["clip_max"]
    balls.check_range("x_or_dataset", x, low, high)
    largest = (high - low) * math.sqrt(math.prod(x.shape[1:]))
    if threat["norm"] == 2 and threat["eps"] > largest:
        raise ValueError(
            f"`eps` must be no larger than the range * sqrt(features) = {largest:g} in L2. "
            f"Received: eps={threat['eps']:g}"
        )


def _provenance(head: Head, twin: Head | None, examples: Examples) -> dict[str, Any]:
    """Model, data, versions and device, for a reader who wants to run it again."""
    versions = {"python": platform.python_version()}
    for package in ("keras-drsl", "keras", keras.config.backend(), "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a folder that was not installed
            versions[package] = "unknown"
    return {
        "model": fingerprint(head.model.logits_fn),
        "undefended": None if twin is None else fingerprint(twin.model.logits_fn),
        "data": examples.digest,
        "versions": versions,
        "backend": keras.config.backend(),
        "device": _backend.device_name(),
    }


def _check_shard(shard: Any) -> tuple[int, int]:
    is_pair = isinstance(shard, tuple | list) and len(shard) == 2 and all(isinstance(one, int) for one in shard)
    if not is_pair or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` must be (i, n) with 0 <= i < n. Received: shard={shard!r}")
    return shard[0], shard[1]


def in_batches(classifier: Classifier, x: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits of an array of any length, shape `(count, C)`."""
    return np.concatenate([classifier.logits(x[at : at + batch_size]) for at in range(0, len(x), batch_size)])


def _run_attack(name: str, attack: Attack, case: checks.Case, state: State, verbose: int) -> None:
    """Attack what stands, batch by batch, from where the state says."""
    # What stood when the attack began, whatever it has broken since.
    standing = np.array([place for place, one in enumerate(state.broken_by) if one in (None, name)], dtype=int)
    starts = range(0, len(standing), case.batch_size)
    state.done.setdefault(name, 0)
    state.seconds.setdefault(name, 0.0)
    bar = keras.utils.Progbar(len(standing), stateful_metrics=["standing"], verbose=1) if verbose and starts else None
    if bar:
        print(name)
    for place, start in enumerate(starts):
        if place < state.done[name]:
            continue
        began = time.perf_counter()
        at = standing[start : start + case.batch_size]
        x, y = case.x[at], case.y[at]
        x_adv = attack(case.head.classifier, x, y, ids=case.ids[at], batch_size=case.batch_size)
        for one in at[checks.breaks(case.head, x_adv, x, y, case.threat, case.audit)]:
            state.broken_by[one] = name
        state.done[name] = place + 1
        state.seconds[name] += time.perf_counter() - began
        state.save()
        if bar:
            left = state.broken_by.count(None) / len(state.broken_by)
            bar.update(min(start + case.batch_size, len(standing)), values=[("standing", left)])


def _run_checks(chosen: list[checks.Rule], case: checks.Case, state: State, verbose: int) -> None:
    """The checks that the state does not hold yet."""
    bar = keras.utils.Progbar(len(chosen), verbose=1) if verbose and chosen else None
    if bar:
        print("checks")
    for place, check in enumerate(chosen):
        if check.__name__ not in state.checks:
            began = time.perf_counter()
            tried = len(case.standing.x)
            outcome = checks.run(check, case)
            name = f"check:{check.__name__}"
            for one in np.flatnonzero(np.isin(case.ids, outcome.broken)):
                state.broken_by[one] = name
            state.checks[check.__name__] = vars(outcome.check)
            state.done[name], state.seconds[name] = tried, time.perf_counter() - began
            state.save()
        if bar:
            bar.update(place + 1)
