"""The runner of the studies: jobs that workers share, records that are appended, statistics over seeds and images.

A study is a list of jobs. Each job leaves one record, a line of a JSON Lines file. A study that was stopped continues
with the jobs that have no record yet.
"""

import argparse
import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from studies import records

if TYPE_CHECKING:
    from keras_drsl import RobustnessReport

Record = dict[str, Any]


def add_worker_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that divides a study between processes."""
    parser.add_argument("--worker", default="0/1", help="I/N: this process is number I of N that share the work")


def add_arguments_of(studies: Collection[str]) -> Callable[[argparse.ArgumentParser], None]:
    """Return a function that adds the arguments of a study that has several data sets."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dataset", choices=studies, default="digits")
        add_worker_argument(parser)

    return add


def open_study(args: argparse.Namespace, name: str) -> tuple[Path, Any]:
    """Return the file of the records of a study, and its data; few images with `--quick`."""
    from keras_drsl import datasets  # not before a script has chosen its backend

    path = Path(args.out) / f"{name}_{args.dataset}{'_quick' if args.quick else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.load(args.dataset, args.data_dir)
    return path, tuple((x[:256], y[:256]) for x, y in data) if args.quick else data


def is_first_worker(args: argparse.Namespace) -> bool:
    """Return whether this process writes the table."""
    return args.worker.startswith("0/")


def run_jobs(
    args: argparse.Namespace, jobs: Sequence[Record], read: Callable[[], list[Record]], run: Callable[[Record], None]
) -> int:
    """Run this worker's part of the jobs that have no record, and wait for the other workers.

    Args:
        args: The arguments of the command.
        jobs: The jobs, as dictionaries that their records contain.
        read: Returns the records so far.
        run: Runs one job and appends its record.

    Returns:
        How many jobs this worker has run.

    Raises:
        RuntimeError: If a run has left no record that is found by its job. All workers would wait for it forever.
    """
    index, workers = map(int, args.worker.split("/"))
    done, count = read(), 0
    for job in jobs[index::workers]:
        if find(job, done) is None:
            run(job)
            count += 1
            done = read()
            if find(job, done) is None:
                raise RuntimeError(f"The run has left no record of its job {job}.")
    while missing := sum(find(job, done) is None for job in jobs):
        print(f"waiting for the other workers: {missing} jobs left", flush=True)
        time.sleep(30)
        done = read()
    return count


def find(job: Record, done: Sequence[Record]) -> Record | None:
    """Return the record of a job, or None."""
    return next((record for record in done if all(record[name] == value for name, value in job.items())), None)


def read_records(path: Path) -> list[Record]:
    """Read the records of a file, with the present names of checks."""
    done = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            done.append(_rename(json.loads(line)))
        except json.JSONDecodeError:
            # The process was killed while it wrote this line.
            continue
    return done


def _rename(record: Record) -> Record:
    """Replace the names that a record of an earlier version uses."""
    from keras_drsl._renamed import new_name  # not before a script has chosen its backend

    def new(warning: str) -> str:
        name, _, status = warning.partition(" ")
        return f"{new_name('check', name)} {status}"

    warnings = record.get("warnings")
    if isinstance(warnings, list):
        record["warnings"] = [new(warning) for warning in warnings]
    elif isinstance(warnings, dict):
        record["warnings"] = {eps: [new(warning) for warning in found] for eps, found in warnings.items()}
    return record


def append_record(path: Path, record: Record) -> None:
    """Append a record as one line, also after a line that was never finished."""
    with path.open("a") as file:
        whole = file.tell() == 0 or path.read_bytes().endswith(b"\n")
        file.write(("" if whole else "\n") + json.dumps(record) + "\n")


class PartialRuns:
    """Keep each run of a command in a file until all runs are done, so that a stopped command continues.

    Args:
        path: The file, one JSON line per run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._kept = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self._asked: list[Record] = []

    def run(self, key: Record, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for a key, now or when it was kept. The key holds all that the run depends on."""
        self._asked.append(key)
        for kept in self._kept:
            if kept["key"] == key:
                return kept["run"]
        kept = {"key": key, "run": make()}
        self._kept.append(kept)
        self._write()
        return kept["run"]

    def end(self) -> None:
        """Forget the runs that were asked for: their results are written elsewhere."""
        self._kept = [kept for kept in self._kept if kept["key"] not in self._asked]
        self._write()
        if not self._kept:
            self.path.unlink()

    def _write(self) -> None:
        from keras_drsl import _files  # not before a script has chosen its backend

        _files.write(self.path, "".join(json.dumps(kept) + "\n" for kept in self._kept))


def spread_percent(shares: Sequence[float]) -> str:
    """Return the mean of shares and, of several, their standard deviation, in %."""
    return records.spread(100 * np.array(shares))


def doubts(report: "RobustnessReport") -> list[str]:
    """Return the checks of a report that warn or fail, as "name (status)"."""
    return [f"{check.name} ({check.status})" for check in report.checks if check.status in ("warn", "fail")]


def withstood(report: "RobustnessReport") -> str:
    """Return which images withstood the evaluation, as a string of 0 and 1."""
    return "".join("1" if name is None else "0" for name in report.per_example["broken_by"])


def half_width_over_images(
    runs: Sequence[Record],
    base: Sequence[Record],
    verdicts: Callable[[Record], Sequence[Any]] = lambda run: run["withstood"],
) -> str:
    """Return the half-width of the 95 % interval over images of the difference to runs of the same seeds."""
    others = {run["seed"]: verdicts(run) for run in base}
    pairs = [(verdicts(run), others[run["seed"]]) for run in runs if run["seed"] in others]
    if not pairs:
        return ""
    values = np.mean([np.array([*mine], float) - np.array([*other], float) for mine, other in pairs], axis=0)
    return f"+- {100 * 1.96 * values.std(ddof=1) / np.sqrt(len(values)):.1f}"


def difference(
    runs: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float] = lambda run: run["robust"]
) -> str:
    """Return by how many points runs are better than those of the same seeds, with the 95 % interval over seeds."""
    from scipy import stats

    others = {run["seed"]: value(run) for run in base}
    values = 100 * np.array([value(run) - others[run["seed"]] for run in runs if run["seed"] in others])
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.1f} ({values.mean() - half:+.1f} to {values.mean() + half:+.1f})"
