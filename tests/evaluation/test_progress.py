"""What an evaluation shows while it runs (D2)."""

import io
import re
import time

import pytest

import keras_drsl
from keras_drsl import _progress as module
from keras_drsl._progress import Progress, duration
from keras_drsl.attacks import PGD, Noise
from tests.linear import inputs, linear_model


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (120, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_a_line_says_what_is_done_and_what_is_left():
    with Progress(enabled=False) as progress:
        progress._began = time.monotonic() - 300
        progress.update("apgd_ce: 20 of 80 images", done=25, total=100)
        assert progress.line() == "after 5 min: apgd_ce: 20 of 80 images, 25% of the work, about 15 min left"


def test_lines_are_printed_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(enabled=True, stream=stream, interval=0.05) as progress:
        progress.update("square", done=1, total=2)
        deadline = time.monotonic() + 30
        while stream.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    assert all("square, 50% of the work" in line for line in lines)


def test_a_bar_moves_on_a_terminal_while_nothing_is_reported():
    stream = Terminal()
    with Progress(enabled=True, stream=stream) as progress:
        progress.update("square", done=1, total=2)
        before = len(stream.getvalue())
        deadline = time.monotonic() + 30
        while len(stream.getvalue()) < before + 200 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(stream.getvalue()) >= before + 200
    assert "square" in stream.getvalue()


def test_nothing_is_shown_unless_asked_for(capsys):
    x, y = inputs(10)
    options = {"eps": 0.1, "attacks": ["noise"], "checks": []}
    keras_drsl.evaluate_robustness(linear_model(), x, y, verbose=0, **options)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("function", [keras_drsl.evaluate_robustness, keras_drsl.robustness_curve])
def test_the_work_rises_to_its_total(function, monkeypatch):
    seen = []
    monkeypatch.setattr(module.Progress, "update", lambda self, title, **work: seen.append((title, work)))
    x, y = inputs(20)
    curve = function is keras_drsl.robustness_curve
    eps = [0.1] if curve else 0.1
    function(linear_model(), x, y, eps=eps, attacks=["pgd_margin", "noise"], suite="quick", batch_size=8, verbose=1)
    names = [re.sub(r"^eps 0.1, ", "", title).split(":")[0] for title, _ in seen]
    assert [name for name in dict.fromkeys(names) if not name.startswith("check")] == ["pgd_margin", "noise"]
    assert "check clean_accuracy" in names
    done = [work["done"] for _, work in seen]
    assert done == sorted(done)
    assert done[0] == 0 < done[-1]
    assert all(work["done"] <= work["total"] for _, work in seen)


def test_the_total_is_the_work_of_all_that_is_left(monkeypatch):
    totals = []
    monkeypatch.setattr(module.Progress, "update", lambda self, title, **work: totals.append(work["total"]))
    x, y = inputs(20)
    attacks, checks = [PGD(1e-5, loss="margin", steps=9), "noise"], ["logit_scale", "restarts"]
    # The margins of all images are larger than so small an eps, so all are left to the end.
    keras_drsl.evaluate_robustness(linear_model(), x, y, eps=1e-5, attacks=attacks, checks=checks, batch_size=8)
    # Per image: a check of the outputs counts 1, one that attacks 100, a gradient 3, and a start is evaluated too.
    noise = Noise(1e-5).num_evaluations
    assert set(totals) == {20 * (1 + 100 + 3 * (9 + 1) + noise)}
