"""The registry of checks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from keras_drsl import _validation
from keras_drsl._typing import Array, Status
from keras_drsl.evaluation.context import EvaluationContext
from keras_drsl.evaluation.suites import SUITES


class Outcome(NamedTuple):
    """Hold the result of a check.

    Attributes:
        status: `"pass"`, `"warn"`, `"fail"`, or `"skipped"` if there was nothing to test.
        value: The figure that the status was decided by, NaN if there is none.
        message: One sentence that says what the figure means.
        broken: The `ids` of examples that the check misclassified within the threat model. Those that nothing had
            broken before count as broken by the check.
        wrong: For a model of positions, how many are wrong at the point that was found, by those `ids`.
        x_adv: The points that were found, by those `ids`, for an evaluation that keeps its examples.
    """

    status: Status
    value: float
    message: str
    broken: Sequence[int] = ()
    wrong: Mapping[int, int] = {}
    x_adv: Mapping[int, Array] = {}


def grade(value: float, *, warn_above: float, fail_above: float) -> Status:
    """Return the status of a figure that should be small."""
    if value > fail_above:
        return "fail"
    return "warn" if value > warn_above else "pass"


CheckFunction = Callable[[EvaluationContext], Outcome]


class RegisteredCheck(NamedTuple):
    """Hold a check with the conditions under which it runs.

    Attributes:
        name: Its name in reports.
        function: Maps the context of an evaluation to an `Outcome`.
        suites: The suites that it belongs to; None for all.
        stage: Whether it runs before or after the attacks.
        applies: Maps the context to whether there is something to test.
    """

    name: str
    function: CheckFunction
    suites: tuple[str, ...] | None
    stage: Literal["before", "after"]
    applies: Callable[[EvaluationContext], bool]


CHECKS: dict[str, RegisteredCheck] = {}


def check(
    *,
    suites: Sequence[str] | None = (),
    stage: Literal["before", "after"] = "after",
    applies: Callable[[EvaluationContext], bool] = lambda context: True,
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function as a check of evaluations, under its own name.

    Use it to add a check: decorate a function of an `EvaluationContext` that returns an `Outcome`, and name it in
    `evaluate_robustness(..., checks=[...])`.

    Args:
        suites: The suites that the check always runs with, such as `["standard"]`; None for all suites; by default it
            runs only where it is asked for.
        stage: `"before"` the attacks, or `"after"` them.
        applies: Maps the context to whether there is something to test; by default always.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: If `stage` is neither, or a check of that name exists.

    Example:

    >>> from keras_drsl.evaluation import Outcome, check, evaluate_robustness
    >>> @check(stage="before")
    ... def enough_examples(context):
    ...     enough = len(context.x) >= 100
    ...     return Outcome("pass" if enough else "warn", len(context.x), "number of examples; 100 is the least")
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    >>> x, y = np.random.default_rng(0).random((20, 8)), np.arange(20) % 3
    >>> report = evaluate_robustness(model, x, y, eps=0.1, suite="quick", checks=["enough_examples"], verbose=0)
    >>> [(check.name, check.status) for check in report.checks]
    [('enough_examples', 'warn')]
    """
    _validation.check_choice("stage", stage, ("before", "after"))

    def register(function: CheckFunction) -> CheckFunction:
        name = function.__name__
        if name in CHECKS:
            raise ValueError(f"`check` must have a name that no other check has. Received: {name}")
        CHECKS[name] = RegisteredCheck(name, function, None if suites is None else tuple(suites), stage, applies)
        return function

    return register


def choose(checks: str | Iterable[Any] | None, suite: str) -> tuple[list[str], bool]:
    """Return the names of the checks that the arguments ask for, and whether they were listed one by one.

    Args:
        checks: A suite, whose checks run; names of checks or checks themselves; None for those of `suite`.
        suite: The suite of the evaluation.

    Raises:
        ValueError: If a check is unknown.
    """
    if checks is None or (isinstance(checks, str) and checks in SUITES):
        wanted = checks or suite
        return [name for name, entry in CHECKS.items() if entry.suites is None or wanted in entry.suites], False
    names = []
    for item in [checks] if isinstance(checks, str) or callable(checks) else checks:
        name = getattr(item, "__name__", item)
        if name not in CHECKS or (callable(item) and CHECKS[name].function is not item):
            raise ValueError(
                f"`checks` must be a suite ({', '.join(SUITES)}) or hold checks or names of {', '.join(CHECKS)}. "
                f"Received: {item!r}"
            )
        names.append(name)
    return [name for name in CHECKS if name in names], True


def _checked(outcome: Outcome, shape: tuple[int, ...]) -> Outcome:
    """Return an outcome with plain Python values, as reports and states store it, or raise `ValueError`."""
    _validation.check_choice("status", outcome.status, get_args(Status))
    broken = [int(example) for example in outcome.broken]
    wrong = {int(example): int(count) for example, count in outcome.wrong.items()}
    x_adv = {int(example): np.asarray(point, "float32") for example, point in outcome.x_adv.items()}
    for point in x_adv.values():
        if point.shape != shape:
            raise ValueError(f"`x_adv` must hold points of shape {shape}. Received: one of shape {point.shape}")
    return Outcome(outcome.status, float(outcome.value), str(outcome.message), broken, wrong, x_adv)


def applies(name: str, context: EvaluationContext) -> bool:
    """Return whether a check has something to test. An error counts as yes: `run_check` then reports it."""
    try:
        return CHECKS[name].applies(context)
    except Exception:
        return True


def run_check(name: str, context: EvaluationContext) -> Outcome:
    """Return the outcome of a check. A check that raises an error has failed, and the evaluation continues."""
    entry = CHECKS[name]
    try:
        if not entry.applies(context):
            return Outcome("skipped", math.nan, "the check does not apply to this evaluation")
        return _checked(Outcome(*entry.function(context)), context.x.shape[1:])
    except Exception as error:
        return Outcome("fail", math.nan, f"the check itself failed: {type(error).__name__}: {error}")
