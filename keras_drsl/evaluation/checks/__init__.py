"""Checks: what a careful reader would try before believing a robust accuracy. One theme per file."""

# The order of the imports is the order in which checks run.
from keras_drsl.evaluation.checks import outputs, gradients, search, self_tests, transfer, units  # noqa: I001
from keras_drsl.evaluation.checks.registry import (
    CHECKS,
    Outcome,
    RegisteredCheck,
    applies,
    check,
    choose,
    grade,
    run_check,
)

__all__ = [
    "CHECKS",
    "Outcome",
    "RegisteredCheck",
    "applies",
    "check",
    "choose",
    "grade",
    "gradients",
    "outputs",
    "run_check",
    "search",
    "self_tests",
    "transfer",
    "units",
]
