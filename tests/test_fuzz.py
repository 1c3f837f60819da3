"""Mutated reports, states, npz files and command lines end in a sentence, and what is not valid is not accepted."""

import contextlib
import copy
import io
import json
import math
import shlex
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from keras_drsl import RobustnessReport, cli, datasets
from keras_drsl.evaluation import Check
from keras_drsl.evaluation.state import State, read_state
from tests.helpers import set_nested

pytestmark = pytest.mark.slow
BOUNDED = settings(
    max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=False
)


class Tally:
    """Count what became of the cases of one test, and print it."""

    def __init__(self, name):
        self.name, self.cases, self.refused, self.tracebacks, self.false = name, 0, 0, [], []

    def try_reading(self, read, is_valid, case):
        self.cases += 1
        try:
            result = read()
        except ValueError as error:
            self.refused += 1
            if not str(error).isprintable() or " " not in str(error):
                self.tracebacks.append(("no sentence", case))
        except Exception as error:
            self.tracebacks.append((f"{type(error).__name__}: {error}"[-200:], case))
        else:
            if not is_valid(result):
                self.false.append(case)

    def finish(self):
        print(
            f"\n{self.name}: {self.cases} cases, {self.refused} refused, {len(self.tracebacks)} tracebacks, "
            f"{len(self.false)} false acceptances"
        )
        assert self.refused > self.cases / 2
        assert not self.tracebacks, self.tracebacks[:3]
        assert not self.false, self.false[:3]


def report():
    broken_by = [None, "clean", "first", None, "second", "first", "check:noise", None]
    calls = {"gradients": 40, "queries": 9}
    attacks = [{"name": name, "settings": {"steps": 3}, "seconds": 1.5} | calls for name in ("first", "second")]
    attacks.append({"name": "check:noise", "settings": {}, "seconds": 0.25, "tried": 4})
    threat = {"eps": 0.1, "norm": "inf", "clip_min": 0.0, "clip_max": 1.0}
    others = {"suite": "standard", "checks": "standard", "seed": 0, "batch_size": 4, "max_samples": None}
    checks = [Check("noise", "warn", 0.25, "fell"), Check("outputs", "pass", math.nan, "fine")]
    per_example = {"index": list(range(1, 17, 2)), "label": [0] * 8, "broken_by": broken_by}
    provenance = {"model": "a", "undefended": None, "data": "b", "versions": {"keras": "3"}}
    settings = threat | others | {"shard": [1, 2], "outputs": "logits"}
    return RobustnessReport(settings, attacks, checks, per_example, provenance)


def is_natural(value, least=0):
    return type(value) is int and value >= least


def obeys(content):
    """Return whether the content of a report is valid, by loops that share nothing with the package."""
    names = ["None", "clean"]
    counts = dict.fromkeys(names, 0)
    for attack in content["attacks"]:
        if attack["name"] in counts or not attack["name"]:
            return False
        counts[attack["name"]] = 0
    rows = content["per_example"]
    if not rows["index"] or any(len(values) != len(rows["index"]) for values in rows.values()):
        return False
    for index, label, by in zip(rows["index"], rows["label"], rows["broken_by"], strict=True):
        if not is_natural(index) or not is_natural(label) or str(by) not in counts or by == "None":
            return False
        counts[str(by)] += 1
    place = content["settings"]["shard"]
    if place is not None:
        if len(place) != 2 or not is_natural(place[0]) or not is_natural(place[1]) or place[0] >= place[1]:
            return False
        if any(i % place[1] != place[0] for i in rows["index"]):
            return False
    total = len(rows["index"])
    near = lambda a, b: type(a) in (int, float) and abs(a - b) < 1e-8
    left = total - counts["clean"]
    if not near(content["clean_accuracy"], left / total) or not near(
        content["robust_accuracy"], counts["None"] / total
    ):
        return False
    for attack in content["attacks"]:
        before, left = left, left - counts[attack["name"]]
        if not near(attack["cumulative"], left / total) or not (0 <= attack["seconds"] < math.inf):
            return False
        if not attack["name"].startswith("check:") and attack["tried"] != before:
            return False
        if not all(is_natural(attack[key]) for key in ("gradients", "queries") if key in attack):
            return False
        if not is_natural(attack["tried"], counts[attack["name"]]):
            return False
    statuses = [check["status"] for check in content["checks"]]
    return (
        len(set(rows["index"])) == total
        and set(statuses) <= {"pass", "warn", "fail", "skipped"}
        and content["trustworthy"] is ("fail" not in statuses)
        and content["num_examples"] == total
        and content["settings"]["norm"] in ("inf", 2, 1)
        and 0 < content["settings"]["eps"] < math.inf
        and len({check["name"] for check in content["checks"]}) == len(statuses)
    )


def paths(content, path=()):
    """Return the paths of all values in nested dictionaries and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [(*path, key) for key, _ in items] + [found for key, part in items for found in paths(part, (*path, key))]


CONTENT = report().to_dict()
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "clean", "first", "second", "check:noise", "fail", "pass", "inf", "\x1b[2J", "|", 10**400])
    | st.text(max_size=5)
)
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part))
CHANGES = st.lists(st.tuples(st.sampled_from(paths(CONTENT)), VALUES | st.just(...)), min_size=1, max_size=3)


def test_mutated_reports(tmp_path):
    tally, path = Tally("reports"), tmp_path / "r.json"

    @seed(0)
    @BOUNDED
    @given(CHANGES)
    def run(changes):
        content = copy.deepcopy(CONTENT)
        for keys, value in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
                set_nested(content, keys, value)
        path.write_text(json.dumps(content))

        def show():
            read = RobustnessReport.from_json(path)
            text = f"{read}{read.to_text(verbose=True)}{read.to_markdown()}".replace("\n", "")
            assert text.isprintable()
            assert max(map(len, str(read).split("\n"))) <= 80
            return RobustnessReport.merge([read]).num_examples

        tally.try_reading(show, lambda count: content == CONTENT or obeys(content), changes)

    run()
    tally.finish()


def damage(raw, changes):
    """Return bytes with some of them changed, and perhaps the end cut off."""
    damaged = bytearray(raw)
    for place, change, cut in changes:
        damaged[place % len(damaged)] ^= change
        damaged = damaged[: len(damaged) - cut] or bytearray(b"\0")
    return bytes(damaged)


DAMAGE = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(1, 255), st.sampled_from([0, 0, 0, 1, 7, 100])), min_size=1, max_size=3
)


def test_damaged_bytes_of_reports(tmp_path):
    tally, path = Tally("bytes of reports"), tmp_path / "r.json"
    report().to_json(path)
    raw = path.read_bytes()

    @seed(1)
    @BOUNDED
    @given(DAMAGE)
    def run(changes):
        path.write_bytes(damage(raw, changes))
        tally.try_reading(lambda: RobustnessReport.from_json(path).to_dict(), obeys, changes)

    run()
    tally.finish()


def test_damaged_states(tmp_path):
    tally, path = Tally("states"), tmp_path / "e.state"
    state = State(path, {"settings": {"eps": 0.1}, "attacks": {"first": {}}}, 20)
    state.done, state.seconds, state.broken_by[3] = {"first": 1}, {"first": 0.5}, "first"
    state.save()
    raw = path.read_bytes()

    @seed(2)
    @BOUNDED
    @given(DAMAGE)
    def run(changes):
        damaged = damage(raw, changes)
        path.write_bytes(damaged)
        tally.try_reading(lambda: read_state(path), lambda content: damaged == raw, changes)

    run()
    tally.finish()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files(tmp_path, save):
    tally, path = Tally(save.__name__), tmp_path / "data.npz"
    x, y = np.random.default_rng(0).random((12, 4)).astype("float32"), np.arange(12) % 3
    save(path, x=x, y=y)
    raw = path.read_bytes()

    def is_same(arrays):
        return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(arrays, (x, y), strict=True))

    @seed(3)
    @BOUNDED
    @given(DAMAGE)
    def run(changes):
        path.write_bytes(damage(raw, changes))
        # Times and permissions in the archive mean nothing.
        tally.try_reading(lambda: datasets.load_npz(path), is_same, changes)

    run()
    tally.finish()


def test_arrays_of_any_kind(tmp_path):
    tally, path = Tally("arrays"), tmp_path / "data.npz"
    kinds = ["f2", "f4", "f8", "i1", "u8", "?", "c8", "m8[s]", "M8[s]", "U3", "S3", "V4", "O", "f8,i4"]
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    arrays = st.builds(lambda kind, shape: np.zeros(shape, kind), st.sampled_from(kinds), shapes)
    names = st.sampled_from(["x", "y", "x_test", "y_test", "z", "x.npy", "\x1b"])

    def is_valid(found):
        a, b = found
        return a.dtype.kind in "fiub" and b.dtype.kind in "fiub" and a.ndim and b.ndim and len(a) == len(b) > 0

    @seed(4)
    @BOUNDED
    @given(st.dictionaries(names, arrays, max_size=4))
    def run(content):
        np.savez(path, **content)
        tally.try_reading(lambda: datasets.load_npz(path), is_valid, content)

    run()
    tally.finish()


def test_random_command_lines(tmp_path, monkeypatch):
    files = {name: tmp_path / name for name in ("model.keras", "data.npz", "r.json", "out.json", "p.png", "e.state")}
    np.savez(files["data.npz"], x=np.zeros((16, 4)), y=np.zeros(16))
    files["model.keras"].write_bytes(b"model")
    report().to_json(files["r.json"])
    before = {name: files[name].read_bytes() for name in ("model.keras", "data.npz", "r.json")}
    monkeypatch.setattr(cli, "_load", lambda path: None)
    monkeypatch.setattr(cli, "evaluate_robustness", lambda *args, **options: report())
    monkeypatch.setattr(cli, "robustness_curve", lambda *args, **options: Mock())
    numbers = [
        "0.1",
        "8/255",
        "1/0",
        "nan",
        "inf",
        "-1",
        "1e400",
        "0",
        "9" * 5000,
        "1/" + "9" * 500,
        "x",
        "",
        "\0",
        "1 2",
    ]
    options = ["--eps", "--norm", "--suite", "--clip-min", "--clip-max", "--max-samples", "--batch-size", "--seed"]
    options += ["--shard", "--state", "--out", "--plot", "--undefended", "--dataset", "--data-dir"]
    flags = ["--overwrite", "--strict", "--verbose", "--markdown", "--quiet", "--help", "--version", "--no"]
    words = [
        "L2",
        "linf",
        "3",
        "quick",
        "AutoAttack",
        "0/2",
        "2/2",
        "1/" + "9" * 30,
        "digits.npz",
        "\x1b[2J",
        "é\udcff",
    ]
    values = st.sampled_from([*map(str, files.values()), *numbers, *words]) | st.text(max_size=4)
    start = ["evaluate", str(files["model.keras"]), "--dataset", str(files["data.npz"]), "--eps", "0.1"]
    starts = [start, start, ["merge", str(files["r.json"])], ["show", str(files["r.json"])], []]
    part = st.tuples(st.sampled_from(options), values) | st.tuples(st.sampled_from(flags)) | st.tuples(values)
    tally = Tally("command lines")

    @seed(5)
    @BOUNDED
    @given(st.sampled_from(starts), st.lists(part, max_size=4))
    def run(start, parts):
        arguments = [*start, *(word for part in parts for word in part)]
        for name in ("out.json", "p.png", "e.state"):
            files[name].unlink(missing_ok=True)
        printed = io.StringIO()

        def call():
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
                try:
                    status = cli.main(arguments)
                except SystemExit as stop:
                    status = stop.code
            error = printed.getvalue()
            internal = ("TypeError", "KeyError", "AttributeError", "IndexError", "NameError", "Traceback")
            if status == 2:
                assert not any(name in error for name in internal), error
                assert "keras-drsl" in error
                raise ValueError("refused as it should be")
            assert all(files[name].read_bytes() == raw for name, raw in before.items())
            return status

        tally.try_reading(call, lambda status: status in (0, 3), shlex.join(map(ascii, arguments)))
        assert not list(tmp_path.glob(".*.tmp"))

    monkeypatch.chdir(tmp_path)
    run()
    tally.finish()
