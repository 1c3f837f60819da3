"""Change the package in small ways, one at a time, and count how many changes the tests notice.

For each group of modules, cosmic-ray lists all changes that its operators can make to the source. A number of them is
drawn. For each one, a copy of the repository is changed, and the tests that run the changed line are run on it until
one fails, quick ones first. Where the line runs when its module is imported, these are all that run any line of the
module. A change that no test notices within `LIMIT` seconds counts as not noticed.

The outcome of each change is written to `results/mutants.jsonl` as it comes, so a run that was stopped goes on. An
outcome is used again as long as the module has the same text. A table, and each change that no test noticed, go to
`docs/results/mutants.md`.

    python tests/mutants.py
    python tests/mutants.py --retry    # once more for the changes that no test noticed, after a test was added
"""

import argparse
import difflib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "results" / "mutants.jsonl", ROOT / "docs" / "results" / "mutants.md"
SIGNATURES = "tests/test_signatures.py"
# The tests of models and inputs of other kinds than one output per class and one array.
VIEWS = [
    f"tests/test_{name}.py" for name in ("features", "heads", "inputs", "multilabel", "positions", "random_models")
]
# The modules of each group, and the tests that run on them.
GROUPS = {
    "losses": (["keras_drsl/losses", "keras_drsl/spread.py"], [SIGNATURES, "tests/losses", "tests/test_spread.py"]),
    "metrics": (["keras_drsl/metrics.py"], [SIGNATURES, "tests/test_metrics.py"]),
    "attacks": (["keras_drsl/attacks"], [SIGNATURES, "tests/attacks", "tests/test_threat.py", *VIEWS]),
    "evaluation": (
        ["keras_drsl/evaluation"],
        [SIGNATURES, "tests/evaluation", "tests/test_cli.py", "tests/test_folder.py", *VIEWS],
    ),
}
SILENCE = 240  # seconds after which a run without a finished test counts as hanging
LIMIT = 240  # seconds for the tests of one change
IMPORTED = ("keras", "hypothesis", "pytest", "sklearn.datasets", "rich.progress", "matplotlib.figure")


class Mutant(NamedTuple):
    """One change: the occurrence of an operator of cosmic-ray in a file."""

    group: str
    path: str
    operator: str
    occurrence: int


def enumerate_mutants(group):
    """Return all changes of a group, by all operators that need no arguments."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    mutants = []
    for path in [path for path in files(GROUPS[group][0]) if path.endswith(".py")]:
        nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
        for name in sorted(plugins.operator_names()):
            operator = plugins.get_operator(name)
            count = 0 if operator.arguments() else sum(len(list(operator().mutation_positions(node))) for node in nodes)
            mutants += [Mutant(group, path, name, occurrence) for occurrence in range(count)]
    return mutants


def draw(mutants, count, seed):
    """Return `count` of the changes. A change of one file leaves the draw from the others as it is."""
    return sorted(mutants, key=lambda mutant: hashlib.sha256(repr((seed, *mutant)).encode()).digest())[:count]


def mutate(mutant):
    """Return the text of the file before and after."""
    from cosmic_ray import mutating, plugins

    before = (ROOT / mutant.path).read_text()
    return before, mutating.mutate_code(before, plugins.get_operator(mutant.operator)(), mutant.occurrence)


def files(folders):
    """Return the Python files of the repository in some folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(path for path in listed.splitlines() if (ROOT / path).exists())


def files_of_tests(group):
    return [path for path in files(GROUPS[group][1]) if Path(path).name.startswith("test_")]


def select_tests(mutant, line, contexts, seconds):
    """Return the tests of a change: first that of signatures, then quick ones, of the module's own file before others.

    Args:
        mutant: The change.
        line: Where it begins.
        contexts: By file and line, what ran the line: "" for an import, or a test and its phase, "file::test|run".
        seconds: How long each test takes.
    """
    of_module = contexts.get(mutant.path, {})
    of_line = of_module.get(line, [])
    if not of_line or "" in of_line:
        of_line = [SIGNATURES, *(context for some in of_module.values() for context in some)]
    tests = {context.rpartition("|")[0] or context for context in of_line} - {""}
    if tests <= {SIGNATURES}:  # no test runs the module in its own process
        return files_of_tests(mutant.group)
    stem, of_file = Path(mutant.path).stem, Counter()
    for test in tests:
        of_file[test.partition("::")[0]] += seconds.get(test, 0)

    def order(test):
        path = test.partition("::")[0]
        is_named = Path(path).stem.removeprefix("test_") in (stem, f"{stem}s")
        return path != SIGNATURES, seconds.get(test, 0) >= 2, not is_named, of_file[path], path, seconds.get(test, 0)

    return sorted(tests, key=order)


class Recorder:
    """A plugin of pytest that notes the first test that fails, when a test last finished, and how long each took."""

    def __init__(self, folder):
        self.failed, self.seconds = None, Counter()
        self._beat = folder / "beat"

    def pytest_runtest_logreport(self, report):
        self._beat.touch()
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report):
        self._beat.touch()
        if report.failed:
            self.failed = self.failed or f"import of {report.nodeid}"


class Slot:
    """A copy of the repository in which one change after another is tested."""

    def __init__(self, folder):
        self.folder = folder
        for path in files(["."]):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
        self.mutant = None

    def start(self, mutant, text, tests, options=()):
        """Run the tests on a changed file in a process that is forked from this one, with all libraries imported."""
        self.mutant, self._began = mutant, time.time()
        (self.folder / "outcome").unlink(missing_ok=True)
        (self.folder / "beat").touch()
        self._original = (self.folder / mutant.path).read_text()
        (self.folder / mutant.path).write_text(text)
        self._process = os.fork()
        if self._process == 0:
            run_tests(self.folder, [*options, *tests])

    def poll(self):
        """Return the outcome, or None while the tests run."""
        silent = time.time() - (self.folder / "beat").stat().st_mtime
        is_late = bool(self.mutant.operator) and time.time() - self._began > LIMIT + silent
        ended, status = os.waitpid(self._process, os.WNOHANG)
        if not ended and silent < SILENCE and not is_late:
            return None
        if not ended:
            os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            outcome, by = ("survived", "") if is_late else ("killed", "a run that does not end")
        elif not (self.folder / "outcome").exists():
            outcome, by = "killed", f"a process that ends with status {status}"
        else:
            by = (self.folder / "outcome").read_text()
            outcome = "killed" if by else "survived"
        (self.folder / self.mutant.path).write_text(self._original)
        return {"outcome": outcome, "by": by, "seconds": round(time.time() - self._began, 1)}


def run_tests(folder, arguments):
    """Run tests in a folder until one fails, write which one, and end the process."""
    try:
        os.setsid()
        os.chdir(folder)
        sys.path[0] = str(folder)
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        for stream in (1, 2):
            os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        import pytest

        recorder = Recorder(folder)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments], plugins=[recorder])
        (folder / "seconds").write_text(json.dumps(recorder.seconds))
        (folder / "outcome").write_text(recorder.failed or ("" if code == 0 else "import of conftest.py"))
    finally:
        os._exit(0)


def run(jobs, slots, note):
    """Test changes, one per slot at a time.

    Args:
        jobs: For each change the arguments of `Slot.start`.
        slots: The slots.
        note: Takes a change, its outcome, and the folder it was tested in.
    """
    waiting = list(jobs)
    while waiting or any(slot.mutant for slot in slots):
        for slot in slots:
            if slot.mutant and (outcome := slot.poll()):
                note(slot.mutant, outcome, slot.folder)
                slot.mutant = None
            if not slot.mutant and waiting:
                slot.start(*waiting.pop(0))
        time.sleep(0.05)


def find_contexts(groups, slots):
    """Run the tests of each group on the package as it is. Return what ran each line, and how long each test took."""
    from coverage import CoverageData

    contexts, seconds = {}, {}

    def read(mutant, outcome, folder):
        if outcome["outcome"] == "killed":
            sys.exit(f"The tests of {mutant.group} fail without a change: {outcome['by']}")
        seconds.update(json.loads((folder / "seconds").read_text()))
        data = CoverageData(folder / ".coverage")
        data.read()
        for path in files(GROUPS[mutant.group][0]):
            contexts[path] = data.contexts_by_lineno(str(folder / path))

    unchanged = [Mutant(group, files(GROUPS[group][0])[0], "", 0) for group in groups]
    options = ["--cov=keras_drsl", "--cov-context=test", "--cov-report="]
    run([(some, text_of(some.path), files_of_tests(some.group), options) for some in unchanged], slots, read)
    return contexts, seconds


def text_of(path):
    return (ROOT / path).read_text()


def digest(paths):
    return hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in paths)).hexdigest()[:16]


def describe(mutant):
    """Return the line of a change, and its text before and after."""
    before, after = (text.splitlines() for text in mutate(mutant))
    changes = [
        change
        for change in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes()
        if change[0] != "equal"
    ]
    _, low, high, new_low, new_high = changes[0]
    return {
        "line": low + 1,
        "before": " ".join(line.strip() for line in before[low:high]),
        "after": " ".join(line.strip() for line in after[new_low:new_high]),
    }


def table(records, args):
    """Return the page: how many changes were noticed, and those that were not."""
    lines = [
        "# How many changes do the tests notice?",
        "",
        "A test that cannot fail is worth nothing. So we changed the source in small ways, such as another number,",
        "another operator or a loop left out, one change at a time, and ran the tests of the changed module. A change",
        "counts as noticed if a test fails. Changes that make no difference count as not noticed.",
        "",
        f"The changes were drawn from each group (seed {args.seed}), among all that the operators of",
        "[cosmic-ray](https://cosmic-ray.readthedocs.io) can make.",
        "",
        "| group | possible | drawn | noticed | share | of these when a module is imported |",
        "|---|---|---|---|---|---|",
    ]
    groups = {group: [record for record in records if record["group"] == group] for group in GROUPS}
    for group, some in [*groups.items(), ("all", records)]:
        killed = [record for record in some if record["outcome"] == "killed"]
        early = sum(record["by"].startswith("import of") for record in killed)
        possible = sum({record["group"]: record["possible"] for record in some}.values())
        lines.append(
            f"| {group} | {possible} | {len(some)} | {len(killed)} | {len(killed) / max(len(some), 1):.1%} | {early} |"
        )
    lines += [
        "",
        "From `results/mutants.jsonl`. Written by `python tests/mutants.py`, or `make mutants`.",
        "",
        "## Changes that no test noticed",
        "",
        "| module | line | before | after |",
        "|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda record: (record["path"], record["line"])):
        if record["outcome"] == "survived":
            cells = [record["before"], record["after"]]
            before, after = (f"``{cell}``".replace("|", "\\|") if cell else "(nothing)" for cell in cells)
            lines.append(f"| {record['path'].removeprefix('keras_drsl/')} | {record['line']} | {before} | {after} |")
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="how many changes to draw from each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="how many to test at a time")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--retry", action="store_true", help="test those again that no test noticed")
    args = parser.parse_args(arguments)
    known = {}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            record = json.loads(line)
            known[Mutant(*(record[field] for field in Mutant._fields)), record["source"]] = record
    possible, drawn = {}, []
    for group in args.groups:
        mutants = enumerate_mutants(group)
        possible[group] = len(mutants)
        drawn += draw(mutants, args.count, args.seed)

    def key(mutant):
        return mutant, digest([mutant.path])

    def note(mutant, outcome, folder):
        record = mutant._asdict() | {"source": key(mutant)[1], "possible": possible[mutant.group]}
        record |= describe(mutant) | outcome
        known[key(mutant)] = record
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{len([1 for some in drawn if key(some) in known])}/{len(drawn)}", *record.values(), flush=True)

    todo = [
        mutant
        for mutant in drawn
        if key(mutant) not in known or (args.retry and known[key(mutant)]["outcome"] == "survived")
    ]
    for module in IMPORTED:
        __import__(module)
    with tempfile.TemporaryDirectory() as folder:
        slots = [Slot(Path(folder) / str(number)) for number in range(args.jobs)]
        ran = find_contexts(dict.fromkeys(mutant.group for mutant in todo), slots)
        jobs = [(some, mutate(some)[1], select_tests(some, describe(some)["line"], *ran)) for some in todo]
        run(jobs, slots, note)
    # Those of groups that were not asked for stay.
    records = [record for (mutant, _), record in known.items() if mutant.group not in args.groups]
    records += [known[key(mutant)] for mutant in drawn]
    RESULTS.write_text("".join(json.dumps(record) + "\n" for record in records))
    TABLE.write_text(table(records, args))


if __name__ == "__main__":
    main()
