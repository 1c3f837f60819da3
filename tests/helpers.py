"""Run programs in processes of their own, and mark cases of tests."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run_python(code, *args, env=None, check=True, cwd=None, timeout=300):
    """Run a program in a fresh Python process.

    Args:
        code: The program, or the `Path` of a script.
        *args: Its arguments.
        env: Environment variables to set beside those of this process.
        check: Whether a program that fails is an error, which then shows the end of its `stderr`.
        cwd: The folder it runs in.
        timeout: The longest it may take, in seconds.

    Returns:
        The completed process, with `stdout` and `stderr` as text.
    """
    program = [code] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
    done = subprocess.run(
        [sys.executable, *map(str, program), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=os.environ | (env or {}),
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def run_module(name, *args, check=True, timeout=600):
    """Run a module as `python -m name` in a fresh process, from the root of the checkout.

    Args:
        name: The module, such as `benchmarks.loss_speed`.
        *args: Its arguments.
        check: Whether a failure is an error.
        timeout: The longest it may take, in seconds.

    Returns:
        The completed process, with `stdout` and `stderr` as text.
    """
    command = [sys.executable, "-m", name, *map(str, args)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=root, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def set_nested(content, path, value):
    """Set one value of nested dictionaries and lists; a value `...` deletes it.

    Args:
        content: The dictionary.
        path: The keys and positions that lead to the value.
        value: The new value.
    """
    for key in path[:-1]:
        content = content[key]
    if value is ...:
        del content[path[-1]]
    else:
        content[path[-1]] = value


def some_short(names, *short, more=()):
    """Return the cases of a test by name.

    Args:
        names: The names.
        *short: Those that run on all backends in each run of the tests.
        more: Those that only `make test-backends` and `make test-slow` run.
    """
    assert set(short) <= set(names) >= set(more)
    assert not set(short) & set(more)
    marks = dict.fromkeys(short, pytest.mark.short) | dict.fromkeys(more, pytest.mark.more)
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in names]


def few_of(*values, keep):
    """Return the cases of a test of several arguments, which `make test` runs with few combinations of their values.

    Args:
        *values: The values of each argument.
        keep: The combinations that `make test` runs; only `make test-backends` and `make test-slow` run the others.
    """
    cases = list(itertools.product(*values))
    assert all(case in cases for case in keep)
    return [case if case in keep else pytest.param(*case, marks=pytest.mark.more) for case in cases]
