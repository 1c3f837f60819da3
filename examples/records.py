"""What the examples share: how to run them again, in words, and runs that are kept until all are done."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

ELSEWHERE = ("out", "data_dir", "overwrite")  # arguments that change no figure


def command(script, args, *, unsaid=()):
    """What to run to get the same again."""
    words = ["python", script]
    for name, value in vars(args).items():
        if name not in (*ELSEWHERE, *unsaid) and value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def versions(more_packages=()):
    """What is installed of the packages the figures depend on, and the commit of a checkout."""
    found = {"python": platform.python_version()}
    for package in ("keras-drsl", "keras", "tensorflow", "jax", "torch", "numpy", *more_packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def commit():
    """That of this checkout, and whether the code was changed since; empty where there is none."""
    changed = _git("status", "--porcelain", "--", "keras_drsl", "examples", "benchmarks")
    return _git("rev-parse", "HEAD") + (" and changes" if changed else "")


def _git(*arguments):
    """What git says of this checkout, or nothing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def spread(values, digits=1):
    """The mean and, of several values, their standard deviation, as a table's cell."""
    values = np.array(values)
    return f"{values.mean():.{digits}f}" + (f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


class Begun:
    """The runs of a command that may be stopped: each is kept in a file until all are done.

    Args:
        path: the file, one JSON line a run.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.kept = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.asked = []

    def run(self, key, make):
        """What `make` returned for a key, a dict of all that the run depends on; now, or when it was kept."""
        self.asked.append(key)
        for one in self.kept:
            if one["key"] == key:
                return one["run"]
        one = {"key": key, "run": make()}
        self.kept.append(one)
        self._write()
        return one["run"]

    def end(self):
        """Forget the runs that were asked for: what came of them is written elsewhere."""
        self.kept = [one for one in self.kept if one["key"] not in self.asked]
        self._write()
        if not self.kept:
            self.path.unlink()

    def _write(self):
        from keras_drsl.evaluation import files  # not before a script has chosen its backend

        files.write(self.path, "".join(json.dumps(one) + "\n" for one in self.kept))
