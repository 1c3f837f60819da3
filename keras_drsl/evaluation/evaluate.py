"""The protocol: which attacks run on which examples, and what counts as robust."""

import hashlib
import math
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keras
import numpy as np

from keras_drsl import _arguments, _backend
from keras_drsl.attacks import Attack, Classifier, Noise, Square, Transfer, balls
from keras_drsl.attacks.classifier import class_ids, is_wrong
from keras_drsl.evaluation import checks
from keras_drsl.evaluation.examples import Examples, read_examples
from keras_drsl.evaluation.head import Head, find_logits, fingerprint
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
    before it left standing. The model is not changed.

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
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: {type(model).__name__}")
    threat = check_threat(eps, norm, clip_min, clip_max)
    _arguments.check_integer("batch_size", batch_size, at_least=1)
    _arguments.check_integer("seed", seed, at_least=0)
    if max_samples is not None:
        _arguments.check_integer("max_samples", max_samples, at_least=1)
    if shard is not None:
        shard = _check_shard(shard)
    chosen = make_attacks(suite, attacks, threat, seed)
    examples = read_examples(x_or_dataset, y, max_samples=max_samples, shard=shard)
    check_inputs(examples.x, threat)
    head = find_logits(model, examples.x[:32], from_logits)
    logits = _in_batches(head.classifier, examples.x, batch_size)
    examples = examples._replace(y=class_ids(examples.y, len(examples.x), logits.shape[1]))
    if not np.isfinite(logits).all():
        raise ValueError("`model` must return finite outputs for all inputs. Received: NaN or infinite ones")
    twin = None if undefended is None else find_logits(undefended, examples.x[:32], None).classifier

    settings = {
        **threat,
        "suite": suite if attacks is None else "custom",
        "seed": seed,
        "batch_size": batch_size,
        "max_samples": max_samples,
        "shard": None if shard is None else list(shard),
        "outputs": head.kind,
    }
    identity = {
        "settings": settings | {"checks": suite},
        "model": fingerprint(model),
        "undefended": None if undefended is None else fingerprint(undefended),
        "data": _digest(examples.x, examples.y, logits.argmax(axis=1)),
        "attacks": {name: attack.settings for name, attack in chosen.items()},
        "backend": keras.config.backend(),
    }
    state = State(state_path, identity, len(examples.x))
    wrong = is_wrong(logits, examples.y)
    state.broken_by = [CLEAN if wrong[place] else one for place, one in enumerate(state.broken_by)]

    for name, attack in chosen.items():
        _run_attack(name, attack, head.classifier, examples, threat, batch_size, state, verbose)
    done = _run_checks(suite, chosen, head, twin, examples, logits, threat, seed, state, verbose)

    records = [
        {"name": name, "settings": attack.settings, "seconds": state.seconds[name]} for name, attack in chosen.items()
    ]
    breakers = {one for one in state.broken_by if one is not None and one.startswith("check:")}
    for name in sorted(breakers, key=[f"check:{check.name}" for check in done].index):
        # A check stopped at a number of images: what it was tried on is not all that stood.
        records.append({"name": name, "settings": {}, "seconds": state.seconds[name], "tried": state.done[name]})
    per_example = {
        "index": examples.ids.tolist(),
        "label": examples.y.tolist(),
        "broken_by": list(state.broken_by),
    }
    return RobustnessReport(settings, records, done, per_example, {"model": identity["model"], **provenance()})


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
    if not (x.min() >= low and x.max() <= high):
        raise ValueError(
            f"`x_or_dataset` must lie in [clip_min, clip_max] = [{low:g}, {high:g}]. "
            f"Received: values from {x.min():g} to {x.max():g}"
        )
    largest = (high - low) * math.sqrt(math.prod(x.shape[1:]))
    if threat["norm"] == 2 and threat["eps"] > largest:
        raise ValueError(
            f"`eps` must be no larger than the range * sqrt(features) = {largest:g} in L2. "
            f"Received: eps={threat['eps']:g}"
        )


def provenance() -> dict[str, Any]:
    """Versions and device, for a reader who wants to run it again."""
    versions = {"python": platform.python_version()}
    for package in ("keras-drsl", "keras", keras.config.backend(), "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a folder that was not installed
            versions[package] = "unknown"
    return {"versions": versions, "backend": keras.config.backend(), "device": _backend.device_name()}


def _check_shard(shard: Any) -> tuple[int, int]:
    is_pair = isinstance(shard, tuple | list) and len(shard) == 2 and all(isinstance(one, int) for one in shard)
    if not is_pair or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` must be (i, n) with 0 <= i < n. Received: shard={shard!r}")
    return shard[0], shard[1]


def _in_batches(classifier: Classifier, x: np.ndarray, batch_size: int) -> np.ndarray:
    return np.concatenate([classifier.logits(x[at : at + batch_size]) for at in range(0, len(x), batch_size)])


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _run_attack(
    name: str,
    attack: Attack,
    classifier: Classifier,
    examples: Examples,
    threat: dict[str, Any],
    batch_size: int,
    state: State,
    verbose: int,
) -> None:
    """Attack what stands, batch by batch, from where the state says."""
    # What stood when the attack began, whatever it has broken since.
    standing = np.array([place for place, one in enumerate(state.broken_by) if one in (None, name)], dtype=int)
    starts = range(0, len(standing), batch_size)
    state.done.setdefault(name, 0)
    state.seconds.setdefault(name, 0.0)
    bar = keras.utils.Progbar(len(standing), stateful_metrics=["standing"], verbose=1) if verbose and starts else None
    if bar:
        print(name)
    for place, start in enumerate(starts):
        if place < state.done[name]:
            continue
        began = time.perf_counter()
        at = standing[start : start + batch_size]
        x, y = examples.x[at], examples.y[at]
        x_adv = attack(classifier, x, y, ids=examples.ids[at], batch_size=batch_size)
        seen = checks.size_of(x_adv, x, threat["norm"])
        broken = is_wrong(classifier.logits(x_adv), y)
        if not checks.is_within(seen, threat):
            delta = balls.size(x_adv.astype("float64") - x, threat["norm"])
            broken &= delta <= threat["eps"]
        for one in at[broken]:
            state.broken_by[one] = name
        _note(state.audit, seen)
        state.done[name] = place + 1
        state.seconds[name] += time.perf_counter() - began
        state.save()
        if bar:
            left = state.broken_by.count(None) / len(state.broken_by)
            bar.update(min(start + batch_size, len(standing)), values=[("standing", left)])


def _note(audit: dict[str, float], seen: dict[str, float]) -> None:
    for key, value in seen.items():
        audit[key] = min(audit.get(key, value), value) if key == "lowest" else max(audit.get(key, value), value)


def _run_checks(
    suite: str,
    attacks: dict[str, Attack],
    head: Head,
    twin: Classifier | None,
    examples: Examples,
    logits: np.ndarray,
    threat: dict[str, Any],
    seed: int,
    state: State,
    verbose: int,
) -> list[Check]:
    """The checks that the state does not hold yet."""
    black_box = [name for name, attack in attacks.items() if isinstance(attack, Square | Noise | Transfer)]
    chosen = checks.choose(
        suite,
        dlr_on_few=logits.shape[1] < 4 and any(getattr(attack, "loss", None) == "dlr" for attack in attacks.values()),
        black_box_ran=bool(black_box),
        undefended=twin is not None,
    )
    bar = keras.utils.Progbar(len(chosen), verbose=1) if verbose else None
    if bar:
        print("checks")
    for place, check in enumerate(chosen):
        if check.__name__ not in state.checks:
            began = time.perf_counter()
            case = checks.Case(
                classifier=head.classifier,
                x=examples.x,
                y=examples.y,
                ids=examples.ids,
                logits=logits,
                broken_by=state.broken_by,
                threat=threat,
                seed=seed,
                head=head.kind,
                audit=state.audit,
                black_box=black_box,
                undefended=twin,
            )
            tried = len(case.standing.x)
            outcome = check(case)
            name = f"check:{check.__name__}"
            for one in np.flatnonzero(np.isin(examples.ids, outcome.broken)):
                state.broken_by[one] = name
            state.checks[check.__name__] = vars(outcome.check)
            state.done[name], state.seconds[name] = tried, time.perf_counter() - began
            state.save()
        if bar:
            bar.update(place + 1)
    return [Check(**state.checks[check.__name__]) for check in chosen]
