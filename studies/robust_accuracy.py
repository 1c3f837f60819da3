"""Measure what adversarial training and DRSLoss achieve together.

The study trains one model per job (a data set, a method of `keras_drsl.AdversarialTraining`, a loss, a `lam`, a seed),
evaluates it, and appends a line to `OUT/robust_accuracy_DATASET.jsonl`. Jobs with a line there are not run again. When
none is left, it writes the table beside it.

1. Choice: models are trained without the validation images, which are drawn anew for each seed, and evaluated on these
   by the worst case of two attacks. This chooses `lam` for each method, and the best use of the restraint. In PGD's
   training: on the attacked images (`pgd`), on clean and attacked ones (`pgd_both`), with inner attacks on the margin
   (`pgd_margin`) or on the whole loss (`pgd_loss`; both for `fgsm` too), with `lam` rising in the first half of the
   epochs (`pgd_rising`). In TRADES: in its clean term (`trades`), or on the attacked images only (`trades_attacked`).
2. Test: models are trained on all training images (on a GPU, all but those that early stopping watches), and evaluated
   on the test images by the standard suite.

    python -m studies.robust_accuracy --dataset digits --out results
    python -m studies.robust_accuracy --dataset mnist --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`.
"""

import csv
import json
import time
from pathlib import Path

from benchmarks import measure
from studies import runner
from studies.records import versions
from studies.runner import difference, half_width_over_images, spread_percent

LAMS = (0.03, 0.1, 0.3, 1.0, 3.0)
# `choose`: the methods that `lam` is chosen for, among `lams`, by `choice_seeds` models each, on `validation` images.
# `variants`: other uses of the restraint in a method. `seeds`: how many models of each method are tested. `attacks`:
# those that decide the choice. Where nothing is chosen, `uses` are the best on the validation images of digits, and
# `lam` is the best there for PGD.
STUDIES = {
    "digits": {
        "choose": ("clean", "fgsm", "pgd", "trades"), "lams": LAMS, "choice_seeds": 2, "validation": 360,
        "variants": {
            "fgsm": ("fgsm_margin", "fgsm_loss"), "trades": ("trades_attacked",),
            "pgd": ("pgd_both", "pgd_margin", "pgd_loss", "pgd_rising"),
        },
        "uses": {}, "losses": ("ce", "ls", "drs"), "seeds": {"clean": 5, "fgsm": 5, "pgd": 5, "trades": 5},
        "images": None, "attacks": ("apgd_ce", "apgd_margin"), "recipe": {},
    },
    "mnist": {
        "choose": (), "lams": (0.1,), "choice_seeds": 0, "validation": 500, "variants": {},
        "uses": {"pgd": "pgd_loss", "fgsm": "fgsm_margin"}, "losses": ("ce", "drs"), "seeds": {"pgd": 1, "fgsm": 3},
        "images": 500, "attacks": ("apgd_ce", "apgd_margin"), "recipe": {"epochs": 15},
    },
    "cifar10": {
        "choose": (), "lams": (0.1,), "choice_seeds": 0, "validation": 1000, "variants": {},
        "uses": {"pgd": "pgd_loss", "fgsm": "fgsm_margin"}, "losses": ("ce", "drs"), "seeds": {"fgsm": 1},
        "images": 500, "attacks": ("apgd_ce", "apgd_margin"), "recipe": {"epochs": 10},
    },
}  # fmt: skip
# The recipe for a GPU: PreAct-ResNet-18 on attacks of ten steps.
ON_GPU = {
    "mnist": {"seeds": {"fgsm": 3, "pgd": 3}},
    "cifar10": {
        "seeds": {"pgd": 1}, "images": 1000,
        "recipe": {"network": "resnet18", "epochs": 30, "peak": 0.1, "watch": True},
    },
}  # fmt: skip
NAMES = {"ce": "cross-entropy", "ls": "label smoothing 0.1", "drs": "DRSLoss"}


def main(arguments=None, run=None):
    """Run the study; `run` replaces the training and evaluation of a job in tests."""
    run = run or run_job
    args = measure.parse_arguments(__doc__, arguments, data_dir=True, more=runner.add_arguments_of(STUDIES))
    from keras_drsl import datasets
    from studies import recipes

    study = STUDIES[args.dataset] | (ON_GPU.get(args.dataset, {}) if args.device == "gpu" else {})
    study = quick(study) if args.quick else study
    recipe = recipes.ADVERSARIAL[args.dataset] | study["recipe"] | {"validation": study["validation"]}
    study = study | {"recipe": recipe}
    out = Path(args.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    path = out / f"robust_accuracy_{args.dataset}{'_quick' if args.quick else ''}.jsonl"
    data = datasets.load(args.dataset, args.data_dir)
    if args.quick:
        data = tuple((x[:512], y[:512]) for x, y in data)
    for stage in (choice_of_lam, choice_of_variant, test):
        jobs = stage(study, read(path, study))
        runner.run_jobs(args, jobs, lambda: read(path, study), lambda job: run(job, study, data, path, args))
    if runner.is_first_worker(args):
        write_summary(path, study, args)


def quick(study):
    """Return a study as small as it can be with every part still run."""
    return study | {
        "choose": ("pgd",) if study["choose"] else (), "lams": (0.03, 0.3), "choice_seeds": 1, "validation": 64,
        "variants": {"pgd": ("pgd_margin",)} if study["variants"] else {}, "seeds": {"pgd": 2}, "images": 32,
        "attacks": ("fgsm_ce", "fgsm_margin"),
        "recipe": study["recipe"] | {"epochs": 1, "steps": 2, "warmup_epochs": 0},
    }  # fmt: skip


def choice_of_lam(study, done):
    """Return the jobs that choose `lam`: DRSLoss with each value, and the losses without one for comparison."""
    settings = [("drs", lam) for lam in study["lams"]] + [(loss, None) for loss in study["losses"] if loss != "drs"]
    return [
        make_job("validation", method, loss, lam, seed)
        for method in study["choose"]
        for loss, lam in settings
        for seed in range(study["choice_seeds"])
    ]


def choice_of_variant(study, done):
    """Return the jobs that choose the use of the restraint: each variant, with the chosen `lam` and those near it."""
    jobs = []
    for method, variants in study["variants"].items():
        at = study["lams"].index(chosen_lam(method, study, done))
        lams = study["lams"][max(at - 1, 0) : at + 3]
        for variant in variants:
            for loss, lam in [*(("drs", lam) for lam in lams), *controls(variant)]:
                jobs += [make_job("validation", variant, loss, lam, seed) for seed in range(study["choice_seeds"])]
    return jobs


def controls(variant):
    """Return cross-entropy in a variant, where that is not the method itself."""
    return [("ce", None)] if variant.endswith(("_both", "_margin")) else []


def test(study, done):
    """Return the jobs of the test: each method and loss, and the variant that was best on validation."""
    jobs = []
    for method, seeds in study["seeds"].items():
        settings = [(method, loss, None) for loss in study["losses"] if loss != "drs"]
        use = study["uses"].get(method, method)
        settings.append((use, "drs", chosen_lam(method, study, done)))
        settings += [(use, *control) for control in controls(use)]
        variant, lam = best_variant(method, study, done)
        if variant != method:
            settings += [(variant, "drs", lam), *((variant, *control) for control in controls(variant))]
        jobs += [make_job("test", *setting, seed) for setting in settings for seed in range(seeds)]
    return jobs


def chosen_lam(method, study, done):
    """Return the `lam` of the best worst case on validation; a method without a choice takes that of the first."""
    if not study["choose"]:
        return study["lams"][0]
    method = method if method in study["choose"] else study["choose"][0]
    return max(study["lams"], key=lambda lam: validated(method, "drs", lam, study, done))


def best_variant(method, study, done):
    """Return the use of DRSLoss in the training of a method that is best on validation, and its `lam`."""
    if method not in study["variants"]:
        return method, None
    mine = (method, *study["variants"][method])
    tried = {
        (record["method"], record["lam"])
        for record in done
        if record["split"] == "validation" and record["loss"] == "drs" and record["method"] in mine
    }
    return max(sorted(tried), key=lambda setting: validated(setting[0], "drs", setting[1], study, done))


def validated(method, loss, lam, study, done):
    """Return the mean worst case on validation."""
    jobs = [make_job("validation", method, loss, lam, seed) for seed in range(study["choice_seeds"])]
    return sum(runner.find(job, done)["robust"] for job in jobs) / len(jobs)


def make_job(split, method, loss, lam, seed):
    return {"split": split, "method": method, "loss": loss, "lam": lam, "seed": seed}


def read(path, study):
    """Return the records of runs with the settings of the study."""
    return [
        record
        for record in runner.read_records(path)
        if record["recipe"] == study["recipe"] and record["evaluation"]["max_samples"] == study["images"]
    ]


def run_job(job, study, data, path, args):
    """Train the model of a job, or continue with a model that was begun, evaluate it, and append the record."""
    import keras

    import keras_drsl
    from studies import recipes

    print(args.dataset, job, flush=True)
    recipe = study["recipe"]
    train, test = data
    if job["split"] == "validation" or recipe.get("watch"):
        train, validation = recipes.split(train, study["validation"], seed=job["seed"])
    name = "_".join(str(value) for value in (path.stem, *job.values()))
    model_path = path.parent / "models" / f"{name}.keras"
    state_path, facts_path = model_path.with_suffix(".state"), model_path.with_suffix(".json")
    if facts_path.exists():
        model, facts = keras.models.load_model(model_path), json.loads(facts_path.read_text())
    else:
        loss, method, options, callbacks = prepare(job, recipe)
        log, best = model_path.with_suffix(".csv"), model_path.with_suffix(".best.keras")
        before = read_history(log)
        if recipe.get("watch"):
            highest = max(before.get("val_robust_accuracy", [-1.0]))
            keep = {"monitor": "val_robust_accuracy", "mode": "max", "save_best_only": True}
            callbacks += [
                keras_drsl.RobustnessMonitor(*(values[:500] for values in validation), eps=recipe["eps"]),
                keras.callbacks.ModelCheckpoint(best, initial_value_threshold=highest, **keep),
            ]
        backup = keras.callbacks.BackupAndRestore(str(model_path.with_suffix(".backup")))
        callbacks += [keras.callbacks.CSVLogger(log, append=True), backup]
        began = time.perf_counter()
        model, _ = recipes.fit(recipe | options, train, method, loss, job["seed"], callbacks=callbacks)
        seconds = None if before else round(time.perf_counter() - began, 1)  # of a whole training only
        if best.exists():
            model = keras.models.load_model(best, compile=False)
        model.save(model_path)
        facts = {"seconds_of_training": seconds, "history": read_history(log)}
        facts_path.write_text(json.dumps(facts))
        for file in (log, best):
            file.unlink(missing_ok=True)
    is_test = job["split"] == "test"
    images = test if is_test else validation
    how = {"suite": "standard"} if is_test and not args.quick else {"attacks": study["attacks"], "suite": "quick"}
    how |= {"eps": recipe["eps"], "max_samples": study["images"], "x_pool": images}
    began = time.perf_counter()
    first = (values[: study["images"]] for values in images)
    report = keras_drsl.evaluate_robustness(model, *first, state_path=state_path, verbose=0, **how)
    record = job | {
        "clean": report.clean_accuracy,
        "robust": report.robust_accuracy,
        "after": {name: accuracy["cumulative"] for name, accuracy in report.accuracy.items()},
        "images": report.num_examples,
        "withstood": runner.withstood(report),
        "warnings": runner.doubts(report),
        "evaluation": report.settings | {"attacks": [attack["name"] for attack in report.attacks]},
        "recipe": recipe,
        **facts,
        "seconds_of_evaluation": round(time.perf_counter() - began, 1),
        "command": measure.command(args, "studies.robust_accuracy"),
        "device": args.device_name,
        "versions": versions(),
    }
    runner.append_record(path, record)
    for file in (state_path, facts_path):
        file.unlink(missing_ok=True)
    if job["split"] == "validation":
        model_path.unlink()


def read_history(path):
    """Return what `CSVLogger` wrote: the values by epoch, the last ones where an epoch was begun again."""
    if not path.exists():
        return {}
    with path.open() as file:
        rows = {row.pop("epoch"): row for row in csv.DictReader(file)}
    columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()), {})}
    # `CSVLogger` writes columns for validation even where there is none.
    return {
        name: [round(float(value), 4) for value in values] for name, values in columns.items() if "NA" not in values
    }


def prepare(job, recipe):
    """Return the loss of a job, its method and options as `AdversarialTraining` takes them, and its callbacks."""
    from keras_drsl import drs_loss
    from keras_drsl.training import METHODS, trades_penalty
    from studies import recipes

    loss = recipes.make_loss(job["loss"], job["lam"])
    base, _, variant = job["method"].partition("_")
    method, options, callbacks = METHODS[base], {}, []
    if variant == "both":
        method = method.replace(learns_from=("clean", "adversarial"))
    elif variant in ("margin", "loss"):
        options = {"attack_loss": variant}
    elif variant == "rising":
        loss, callback = rising(job["lam"], recipe["epochs"])
        callbacks.append(callback)
    elif variant == "attacked":

        def penalty(log_p, log_q, y, beta):
            plain, whole = (drs_loss(y, log_q, lam, from_logits=True) for lam in (0.0, job["lam"]))
            return trades_penalty(log_p, log_q, y, beta) + whole - plain

        loss, method = recipes.make_loss("ce", None), method.replace(penalty=penalty)
    elif variant:
        raise ValueError(f"no variant {variant} of {base}")
    return loss, method, options, callbacks


def rising(lam, epochs):
    """Return DRSLoss with a `lam` that rises in the first half of the epochs, and the callback that raises it."""
    import keras

    from keras_drsl import drs_loss

    share = keras.Variable(0.0, trainable=False)

    class Rising(keras.losses.Loss):
        def call(self, y_true, y_pred):
            plain, whole = (drs_loss(y_true, y_pred, weight, from_logits=True) for weight in (0.0, lam))
            return plain + share * (whole - plain)

    class Raise(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            share.assign(min(1.0, 2 * (epoch + 1) / epochs))

    return Rising(), Raise()


def write_summary(path, study, args):
    """Write the table."""
    done = read(path, study)
    lines = [
        f"# {args.dataset}: adversarial training and DRSLoss",
        "",
        f"From `{path.name}`, which holds each run. Accuracy in %, mean +- standard deviation over the seeds.",
        *test_table(groups(record for record in done if record["split"] == "test")),
        *choice_table(groups(record for record in done if record["split"] == "validation"), study),
        "",
        f"Written by `{measure.command(args, 'studies.robust_accuracy')}`.",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def test_table(rows):
    """Return the lines of the results on the test images."""
    lines = [
        "",
        "## Test: suite standard",
        "",
        "Differences are taken seed by seed: to cross-entropy and to label smoothing with the same variant of the "
        "method, or with the method itself where they were not trained with the variant. In brackets the 95 % interval "
        "over seeds (Student's t); it shows how training varies. Then the half-width over images; it shows how results "
        "vary with the images.",
        "",
        "| method | loss | lam | seeds | images | clean | after APGD on CE | robust | to cross-entropy | "
        "over images | to label smoothing | over images |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, loss, lam), runs in rows.items():
        first = next(iter(runs[0]["after"]))
        cells = [
            method, NAMES[loss], "" if lam is None else f"{lam:g}", str(len(runs)), str(runs[0]["images"]),
            spread_percent([run["clean"] for run in runs]), spread_percent([run["after"][first] for run in runs]),
            f"**{spread_percent([run['robust'] for run in runs])}**",
        ]  # fmt: skip
        for other in ("ce", "ls"):
            bases = [rows.get((name, other, None), []) for name in (method, method.partition("_")[0])]
            compared = other == "ce" or loss == "drs"
            base = next((base for base in bases if base and base is not runs), []) if compared else []
            cells += [difference(runs, base), half_width_over_images(runs, base)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def choice_table(rows, study):
    """Return the lines of the results on the validation images, none without choices."""
    if not rows:
        return []
    lines = [
        "",
        f"## Choice: worst case of {', '.join(study['attacks'])} on validation images",
        "",
        "DRSLoss had more settings to choose from than the others: cross-entropy has none, and label smoothing is 0.1 "
        "throughout.",
        "",
        "| method | loss | lam | seeds | clean | robust |",
        "|---|---|---|---|---|---|",
    ]
    for (method, loss, lam), runs in rows.items():
        cells = [method, NAMES[loss], "" if lam is None else f"{lam:g}", str(len(runs))]
        cells += [spread_percent([run[name] for run in runs]) for name in ("clean", "robust")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def groups(records):
    """Return the runs that differ in nothing except the seed, by method, loss and lam."""
    result = {}
    for record in sorted(records, key=lambda run: (run["method"], run["loss"], run["lam"] or 0, run["seed"])):
        result.setdefault((record["method"], record["loss"], record["lam"]), []).append(record)
    return result


if __name__ == "__main__":
    main()
