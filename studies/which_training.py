"""Train the eight models of the README's table, five seeds each, and evaluate them by the standard suite.

Each loss has the settings that were best for it on validation images in `studies.compare_losses` and
`studies.robust_accuracy`. Nothing is chosen here. Each run appends a line to `OUT/which_training.jsonl`. Runs with a
line there are not run again. When none is left, the table is written beside it, with the means of these earlier
studies, which are kept in `results/`.

    python -m studies.which_training --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`. On two cores: forty minutes.
"""

import time
from pathlib import Path

from benchmarks import measure
from studies import compare_losses, robust_accuracy, runner
from studies.records import versions

RESULTS = Path(__file__).parents[1] / "results"
# The rows of the table: the training, and for each loss the job of the earlier study.
TRAININGS = {
    "usual": {
        "DRSLoss": {"loss": "DRSLoss", "setting": {"lam": 3.0}, "noise": 0.0},
        "cross-entropy": {"loss": "cross_entropy", "setting": {}, "noise": 0.0},
    },
    "noise": {
        "DRSLoss": {"loss": "DRSLoss", "setting": {"lam": 0.03}, "noise": 0.3},
        "cross-entropy": {"loss": "cross_entropy", "setting": {}, "noise": 0.4},
    },
    "consistency": {
        "DRSLoss": {"loss": "copies", "setting": {"lam": 1.0, "beta": 0.3}, "noise": 0.2},
        "cross-entropy": {"loss": "copies_ce", "setting": {"lam": 0.0, "beta": 0.1}, "noise": 0.2},
    },
    "pgd": {
        "DRSLoss": {"method": "pgd_loss", "loss": "drs", "lam": 0.1},
        "cross-entropy": {"method": "pgd", "loss": "ce", "lam": None},
    },
}
SEEDS = 5


def main(arguments=None, run=None):
    """Run the study; `run` replaces the training and evaluation of a job in tests."""
    run = run or run_job
    args = measure.parse_arguments(__doc__, arguments, more=runner.add_worker_argument)
    from keras_drsl import datasets

    path = Path(args.out) / f"which_training{'_quick' if args.quick else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.load("digits")
    if args.quick:
        data = tuple((x[:128], y[:128]) for x, y in data)
    seeds = range(1 if args.quick else SEEDS)
    jobs = [
        {"training": training, "row": row, "seed": seed}
        for seed in seeds
        for training in TRAININGS
        for row in ("DRSLoss", "cross-entropy")
    ]
    runner.run_jobs(args, jobs, lambda: runner.read_records(path), lambda job: run(job, data, path, args))
    if runner.is_first_worker(args):
        write_summary(path, args)


def run_job(job, data, path, args):
    """Train the model of a job, evaluate it, and append the record."""
    import keras_drsl
    from studies import recipes

    print(job, flush=True)
    model, recipe = train(job, data[0], args)
    radius = recipes.ADVERSARIAL["digits"]["eps"]
    began = time.perf_counter()
    how = {"suite": "quick"} if args.quick else {}
    report = keras_drsl.evaluate_robustness(model, *data[1], eps=radius, verbose=0, **how)
    record = job | {
        "setting": TRAININGS[job["training"]][job["row"]],
        "recipe": recipe,
        "clean": report.clean_accuracy,
        "robust": report.robust_accuracy,
        "after": {name: accuracy["cumulative"] for name, accuracy in report.accuracy.items()},
        "withstood": runner.withstood(report),
        "warnings": runner.doubts(report),
        "eps": radius,
        "images": report.num_examples,
        "seconds_of_evaluation": round(time.perf_counter() - began, 1),
        "command": measure.command(args, "studies.which_training"),
        "device": args.device_name,
        "versions": versions(),
    }
    runner.append_record(path, record)


def train(job, training, args):
    """Return a model that returns logits, and its recipe."""
    from studies import recipes

    setting = TRAININGS[job["training"]][job["row"]] | {"seed": job["seed"]}
    recipe = recipes.ADVERSARIAL["digits"]
    if job["training"] != "pgd":
        plain = compare_losses.STUDIES["digits"]["recipe"] | ({"epochs": 1} if args.quick else {})
        return compare_losses.train(setting, training, plain), plain
    recipe = recipe | ({"epochs": 1, "warmup_epochs": 0, "steps": 2} if args.quick else {})
    loss, method, options, callbacks = robust_accuracy.prepare(setting, recipe)
    model, _ = recipes.fit(recipe | options, training, method, loss, job["seed"], callbacks=callbacks)
    return model, recipe


def earlier(setting):
    """Return the robust accuracies that an earlier study found with a setting on the test images, by seed."""
    study = "robust_accuracy" if "method" in setting else "compare_losses"
    records = runner.read_records(RESULTS / f"{study}_digits.jsonl")
    found = {
        record["seed"]: record["robust"]
        for record in records
        if record["split"] == "test" and all(record[name] == value for name, value in setting.items())
    }
    return [robust["0.15"] if isinstance(robust, dict) else robust for _, robust in sorted(found.items())]


def write_summary(path, args):
    """Write the table."""
    records = runner.read_records(path)
    lines = [
        "# Digits: which training?",
        "",
        f"From `{path.name}`, which holds each run. Suite standard on {records[0]['images']} test images, L-inf, "
        f"eps {records[0]['eps']:g}. Accuracy in %, mean +- standard deviation over the seeds. Difference: to "
        "cross-entropy seed by seed, with its 95 % interval over seeds and the half-width over images. Version 0.1: "
        "the same in `compare_losses_digits.md` and `robust_accuracy_digits.md`, with other random numbers and without "
        "starts at images of the target class.",
        "",
        "| training | loss | setting | seeds | clean | after APGD on CE | robust | difference | robust, version 0.1 | "
        "checks that warn or fail |",
        "|---" * 10 + "|",
    ]
    for training, settings in TRAININGS.items():
        of = {row: [some for some in records if (some["training"], some["row"]) == (training, row)] for row in settings}
        for row, setting in settings.items():
            runs = of[row]
            other = [] if row == "cross-entropy" else of["cross-entropy"]
            gain = f"{runner.difference(runs, other)} {runner.half_width_over_images(runs, other)}".strip()
            warned = sorted({check for some in runs for check in some["warnings"]})
            cells = [training, row, describe(setting), str(len(runs))]
            cells += [runner.spread_percent([some["clean"] for some in runs])]
            cells += [runner.spread_percent([next(iter(some["after"].values())) for some in runs])]
            cells += [f"**{runner.spread_percent([some['robust'] for some in runs])}**", gain]
            cells += [runner.spread_percent(earlier(setting)), ", ".join(warned)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Written by `{measure.command(args, 'studies.which_training')}`.", ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def describe(setting):
    """Return the numbers of a setting as text."""
    numbers = setting.get("setting", {}) | {name: setting[name] for name in ("lam", "noise") if setting.get(name)}
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items())


if __name__ == "__main__":
    main()
