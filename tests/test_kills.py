"""An evaluation that is killed again and again ends with the report of one that was not."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_drsl import cli
from tests.backends import on_tensorflow
from tests.linear import inputs, linear_model

# A write takes long enough to be killed within it.
SLOW = """
import os, sys, time
sync = os.fsync
os.fsync = lambda file: (time.sleep(0.2), sync(file))
from keras_drsl import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def without_times(path):
    content = json.loads(path.read_text())
    for attack in content["attacks"]:
        del attack["seconds"], attack["compile_seconds"]
    return content


def leftovers(folder, name=""):
    return [path for path in folder.iterdir() if path.name.startswith(f".{name}")]


def wait_for_write(process, folder, name, count):
    """Wait until a process begins to write a file for the n-th time, or ends."""
    known = set(leftovers(folder))
    while process.poll() is None and count:
        new = set(leftovers(folder, name)) - known
        known |= new
        count -= len(new)
        time.sleep(0.005)


@on_tensorflow
@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.more), pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_evaluation_ends_with_the_same_report(kills, tmp_path):  # C10
    linear_model().save(tmp_path / "model.keras")
    x, y = inputs(40)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    command = ["evaluate", tmp_path / "model.keras", "--dataset", tmp_path / "data.npz", "--eps", "0.1"]
    command = [str(part) for part in [*command, "--suite", "quick", "--batch-size", "8", "--quiet", "--overwrite"]]
    assert cli.main([*command, "--out", str(tmp_path / "whole.json")]) == 0
    expected = without_times(tmp_path / "whole.json")
    assert 0 < expected["robust_accuracy"] < 1

    folder = tmp_path / "killed"
    folder.mkdir()
    state, out = folder / "e.state", folder / "r.json"
    command += ["--state", str(state), "--out", str(out)]
    rng = np.random.default_rng(kills)
    within, done = 0, 0
    while done < kills:
        known = set(leftovers(folder))
        process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stdout=subprocess.DEVNULL)
        if done % 3 == 2:
            wait_for_write(process, folder, out.name, 1)
        elif done % 3 == 1 and kills > 3:
            time.sleep(rng.uniform(0, 12))
        else:
            wait_for_write(process, folder, state.name, 1 + rng.integers(1, 5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        within += bool(set(leftovers(folder)) - known)
        if process.returncode == 0:
            # It was not killed in time: begin again from nothing.
            assert without_times(out) == expected
            state.unlink()
            out.unlink()
    assert within >= (5 if kills > 3 else 2)
    print(f"{done} kills, {within} of them within a write")
    assert cli.main(command) == 0
    assert without_times(out) == expected
    assert sorted(path.name for path in folder.iterdir()) == ["e.state", "r.json"]
