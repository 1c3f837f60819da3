"""What a record needs for a reader who repeats the run: the command, the versions, the commit."""

import argparse
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

NO_FIGURE = ("out", "data_dir", "overwrite", "redraw")  # arguments that change no figure


def command(module: str, args: argparse.Namespace, *, leave_out: Sequence[str] = ()) -> str:
    """Return the command that repeats a run."""
    words = ["python", "-m", module]
    for name, value in vars(args).items():
        if name not in (*NO_FIGURE, *leave_out) and value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def versions(more_packages: Sequence[str] = ()) -> dict[str, str]:
    """Return the installed versions of the packages that figures depend on, and the commit of the checkout."""
    found = {"python": platform.python_version()}
    for package in ("keras-drsl", "keras", "tensorflow", "jax", "torch", "numpy", *more_packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def commit() -> str:
    """Return the commit of the checkout, and whether its code has changed since; empty without a checkout."""
    changed = _git("status", "--porcelain", "--", "keras_drsl", "studies", "benchmarks")
    return _git("rev-parse", "HEAD") + (" and changes" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and, of several values, their standard deviation, as a cell of a table."""
    array = np.array(values)
    return f"{array.mean():.{digits}f}" + (f" +- {array.std(ddof=1):.{digits}f}" if len(array) > 1 else "")
