"""What the studies share: their records, how workers divide the runs, means and differences over seeds."""

import json
import time

import numpy as np
import records


def add_worker(parser):
    parser.add_argument("--worker", default="0/1", help="which of how many processes that share the work")


def is_first(args):
    return args.worker.startswith("0/")


def share(args, jobs, read, run):
    """Do this worker's part of the jobs that are not done, and wait for the others'.

    Args:
        args: the command's arguments.
        jobs: what is to be done, as dicts.
        read: gives the records so far.
        run: does one job and appends its record.

    Raises:
        RuntimeError: a run has left no record that is found by its job. All would wait for it, for ever.
    """
    turn, workers = map(int, args.worker.split("/"))
    for job in jobs[turn::workers]:
        if find(job, read()) is None:
            run(job)
            if find(job, read()) is None:
                raise RuntimeError(f"The run has left no record of its job {job}.")
    while missing := sum(find(job, read()) is None for job in jobs):
        print(f"waiting for the other workers: {missing} to do", flush=True)
        time.sleep(30)


def find(job, done):
    """The record of a job, or None."""
    return next((one for one in done if all(one[name] == value for name, value in job.items())), None)


def read(path):
    """The records of a file of one JSON line each."""
    done = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            done.append(json.loads(line))
        except json.JSONDecodeError:
            # What was being written when the process was killed.
            continue
    return done


def append(path, record):
    with path.open("a") as file:
        # On a line of its own, even if the last one was never finished.
        whole = file.tell() == 0 or path.read_bytes().endswith(b"\n")
        file.write(("" if whole else "\n") + json.dumps(record) + "\n")


def spread(values):
    """The mean of shares and, of several, their standard deviation, in %."""
    return records.spread(100 * np.array(values))


def verdicts(report):
    """Which images withstood, as a string of 0 and 1."""
    return "".join("1" if one is None else "0" for one in report.per_example["broken_by"])


def over_images(runs, base, verdicts=lambda one: one["withstood"]):
    """The half-width of the 95 % interval of the difference to runs of the same seeds, had the images been others."""
    others = {one["seed"]: verdicts(one) for one in base}
    pairs = [(verdicts(one), others[one["seed"]]) for one in runs if one["seed"] in others]
    if not pairs:
        return ""
    values = np.mean([np.array([*mine], int) - np.array([*other], int) for mine, other in pairs], axis=0)
    return f"+- {100 * 1.96 * values.std(ddof=1) / np.sqrt(len(values)):.1f}"


def difference(runs, base, value=lambda one: one["robust"]):
    """By how much the runs are better than those of the same seeds, with the 95 % interval over seeds."""
    from scipy import stats

    others = {one["seed"]: value(one) for one in base}
    values = 100 * np.array([value(one) - others[one["seed"]] for one in runs if one["seed"] in others])
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.1f} ({values.mean() - half:+.1f} to {values.mean() + half:+.1f})"
