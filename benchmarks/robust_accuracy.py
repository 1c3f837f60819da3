"""What adversarial training and DRSLoss are worth together: a study that can be stopped and started again.

It trains one model after another (a data set, a method of `keras_drsl.AdversarialTraining`, a loss, a `lam`, a seed),
evaluates it and appends a line to `OUT/robust_accuracy_DATASET.jsonl`. What stands there is not done again. When
nothing is left to do, it writes the table and the figure beside it.

1. Choice: models trained without the validation images, drawn anew for each seed, and the worst case of two attacks on
   these. It settles `lam` for each method, and how to use the restraint best. In PGD's training: on the attacked images
   (`pgd`), on clean and attacked ones (`pgd_both`), with inner attacks on the margin (`pgd_margin`) or on the whole
   loss (`pgd_loss`; both for `fgsm` too), with `lam` rising in the first half of the epochs (`pgd_rising`). In TRADES:
   in its clean term (`trades`), or on the attacked images alone (`trades_attacked`).
2. Test: models trained on all training images (on a graphics card, all but those watched to stop in time), evaluated
   on the test images by the standard suite.

    python benchmarks/robust_accuracy.py --dataset digits --out results
    python benchmarks/robust_accuracy.py --dataset mnist --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`.
"""

import csv
import json
import time
from pathlib import Path

import measure
import shared

LAMS = (0.03, 0.1, 0.3, 1.0, 3.0)
# `choose`: for which methods `lam` is chosen, among `lams`, by `choice_seeds` models each, on `validation` images;
# `variants`: other uses of the restraint in a method; `seeds`: how many models of each method the test is made of.
# `attacks` make the choice. Where nothing is chosen, `uses` are those that were best on digits' validation images, and
# `lam` the one that was best there in PGD's.
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
# The recipe of a graphics card: PreAct-ResNet-18 on attacks of ten steps.
ON_GPU = {
    "mnist": {"seeds": {"fgsm": 3, "pgd": 3}},
    "cifar10": {
        "seeds": {"pgd": 1}, "images": 1000,
        "recipe": {"network": "resnet18", "epochs": 30, "peak": 0.1, "watch": True},
    },
}  # fmt: skip
NAMES = {"ce": "cross-entropy", "ls": "label smoothing 0.1", "drs": "DRSLoss"}


def main():
    args = measure.arguments(__doc__, data_dir=True, more=add_arguments)
    import adversarial_training as example

    from keras_drsl.evaluation import datasets

    study = STUDIES[args.dataset] | (ON_GPU.get(args.dataset, {}) if args.device == "gpu" else {})
    study = quick(study) if args.quick else study
    recipe = example.RECIPES[args.dataset] | study["recipe"] | {"validation": study["validation"]}
    study = study | {"recipe": recipe}
    out = Path(args.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    path = out / f"robust_accuracy_{args.dataset}{'_quick' if args.quick else ''}.jsonl"
    data = datasets.load(args.dataset, args.data_dir)
    if args.quick:
        data = tuple((x[:512], y[:512]) for x, y in data)
    for stage in (choice_of_lam, choice_of_variant, test):
        jobs = stage(study, read(path, study))
        shared.share(args, jobs, lambda: read(path, study), lambda job: run(job, study, data, path, args))
    if shared.is_first(args):
        write_summary(path, study, args)


def add_arguments(parser):
    parser.add_argument("--dataset", choices=STUDIES, default="digits")
    shared.add_worker(parser)


def quick(study):
    """As small as it can be and still go through all of it."""
    return study | {
        "choose": ("pgd",) if study["choose"] else (), "lams": (0.03, 0.3), "choice_seeds": 1, "validation": 64,
        "variants": {"pgd": ("pgd_margin",)} if study["variants"] else {}, "seeds": {"pgd": 2}, "images": 32,
        "attacks": ("fgsm_ce", "fgsm_margin"),
        "recipe": study["recipe"] | {"epochs": 1, "steps": 2, "warmup_epochs": 0},
    }  # fmt: skip


def choice_of_lam(study, done):
    """The jobs that settle `lam`: DRSLoss with each, and the losses without one for comparison."""
    settings = [("drs", lam) for lam in study["lams"]] + [(loss, None) for loss in study["losses"] if loss != "drs"]
    return [
        make_job("validation", method, loss, lam, seed)
        for method in study["choose"]
        for loss, lam in settings
        for seed in range(study["choice_seeds"])
    ]


def choice_of_variant(study, done):
    """The jobs that settle how to use the restraint: each variant, with the `lam` chosen and those around it."""
    jobs = []
    for method, variants in study["variants"].items():
        at = study["lams"].index(chosen_lam(method, study, done))
        lams = study["lams"][max(at - 1, 0) : at + 3]
        for variant in variants:
            for loss, lam in [*(("drs", lam) for lam in lams), *controls(variant)]:
                jobs += [make_job("validation", variant, loss, lam, seed) for seed in range(study["choice_seeds"])]
    return jobs


def controls(variant):
    """Cross-entropy in a variant, where that is not the method itself."""
    return [("ce", None)] if variant.endswith(("_both", "_margin")) else []


def test(study, done):
    """The jobs of the test: each method and loss, and the variant that was best on validation."""
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
    """The `lam` of the best worst case on validation; for a method without a choice, that of the first that has one."""
    if not study["choose"]:
        return study["lams"][0]
    method = method if method in study["choose"] else study["choose"][0]
    return max(study["lams"], key=lambda lam: validated(method, "drs", lam, study, done))


def best_variant(method, study, done):
    """The use of DRSLoss in a method's training that is best on validation, and its `lam`."""
    if method not in study["variants"]:
        return method, None
    mine = (method, *study["variants"][method])
    tried = {(one["method"], one["lam"]) for one in done if one["split"] == "validation" and one["loss"] == "drs"}
    return max(
        sorted(one for one in tried if one[0] in mine), key=lambda one: validated(one[0], "drs", one[1], study, done)
    )


def validated(method, loss, lam, study, done):
    """The mean worst case on validation."""
    jobs = [make_job("validation", method, loss, lam, seed) for seed in range(study["choice_seeds"])]
    return sum(shared.find(job, done)["robust"] for job in jobs) / len(jobs)


def make_job(split, method, loss, lam, seed):
    return {"split": split, "method": method, "loss": loss, "lam": lam, "seed": seed}


def read(path, study):
    """The records of runs made as the study makes them."""
    return [
        one
        for one in shared.read(path)
        if one["recipe"] == study["recipe"] and one["evaluation"]["max_samples"] == study["images"]
    ]


def run(job, study, data, path, args):
    """Train the model of a job, or take up what was begun of it, evaluate it, and append the record."""
    import adversarial_training as example
    import keras

    import keras_drsl
    from keras_drsl.evaluation import files

    print(args.dataset, job, flush=True)
    recipe = study["recipe"]
    train, test = data
    if job["split"] == "validation" or recipe.get("watch"):
        train, validation = example.split(train, study["validation"], seed=job["seed"])
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
                keras_drsl.RobustnessMonitor(*validation, eps=recipe["eps"], max_samples=500),
                keras.callbacks.ModelCheckpoint(best, initial_value_threshold=highest, **keep),
            ]
        backup = keras.callbacks.BackupAndRestore(str(model_path.with_suffix(".backup")))
        callbacks += [keras.callbacks.CSVLogger(log, append=True), backup]
        began = time.perf_counter()
        model, _ = example.fit(recipe | options, train, method, loss, job["seed"], callbacks=callbacks)
        seconds = None if before else round(time.perf_counter() - began, 1)  # of a whole training alone
        if best.exists():
            model = keras.models.load_model(best, compile=False)
        model.save(model_path)
        facts = {"seconds_of_training": seconds, "history": read_history(log)}
        files.write(facts_path, json.dumps(facts))
        for one in (log, best):
            one.unlink(missing_ok=True)
    is_test = job["split"] == "test"
    images = test if is_test else validation
    how = {"suite": "standard"} if is_test and not args.quick else {"attacks": study["attacks"], "suite": "quick"}
    began = time.perf_counter()
    report = keras_drsl.evaluate_robustness(
        model, *images, eps=recipe["eps"], max_samples=study["images"], state_path=state_path, verbose=0, **how
    )
    record = job | {
        "clean": report.clean_accuracy,
        "robust": report.robust_accuracy,
        "after": {name: one["cumulative"] for name, one in report.accuracy.items()},
        "images": report.images,
        "withstood": shared.verdicts(report),
        "warnings": [f"{check.name} ({check.status})" for check in report.checks if check.status != "pass"],
        "evaluation": report.settings | {"attacks": [one["name"] for one in report.attacks]},
        "recipe": recipe,
        **facts,
        "seconds_of_evaluation": round(time.perf_counter() - began, 1),
        "command": measure.command(args, "robust_accuracy"),
        "device": args.device_name,
        "versions": measure.versions(),
    }
    shared.append(path, record)
    for one in (state_path, facts_path):
        one.unlink(missing_ok=True)
    if job["split"] == "validation":
        model_path.unlink()


def read_history(path):
    """What `CSVLogger` wrote: for each name the values by epoch, the last ones where an epoch was begun anew."""
    if not path.exists():
        return {}
    with path.open() as file:
        rows = {row.pop("epoch"): row for row in csv.DictReader(file)}
    columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()), {})}
    # It writes columns for validation even where there is none.
    return {name: [round(float(one), 4) for one in values] for name, values in columns.items() if "NA" not in values}


def prepare(job, recipe):
    """The loss of a job, its method and options as `AdversarialTraining` takes them, and callbacks it needs."""
    import adversarial_training as example

    from keras_drsl import drs_loss
    from keras_drsl.training import ADVERSARIAL, CLEAN, METHODS, trades_penalty

    loss = example.make_loss(job["loss"], job["lam"])
    base, _, variant = job["method"].partition("_")
    method, options, callbacks = METHODS[base], {}, []
    if variant == "both":
        method = method._replace(learns_from=(CLEAN, ADVERSARIAL))
    elif variant in ("margin", "loss"):
        options = {"attack_loss": variant}
    elif variant == "rising":
        loss, callback = rising(job["lam"], recipe["epochs"])
        callbacks.append(callback)
    elif variant == "attacked":

        def penalty(log_p, log_q, y, beta):
            plain, whole = (drs_loss(y, log_q, lam, from_logits=True) for lam in (0.0, job["lam"]))
            return trades_penalty(log_p, log_q, y, beta) + whole - plain

        loss, method = example.make_loss("ce", None), method._replace(penalty=penalty)
    elif variant:
        raise ValueError(f"no variant {variant} of {base}")
    return loss, method, options, callbacks


def rising(lam, epochs):
    """DRSLoss whose `lam` rises from 0 in the first half of the epochs, and the callback that raises it."""
    import keras

    from keras_drsl import drs_loss

    share = keras.Variable(0.0, trainable=False)

    class Rising(keras.losses.Loss):
        def call(self, y_true, y_pred):
            plain, whole = (drs_loss(y_true, y_pred, one, from_logits=True) for one in (0.0, lam))
            return plain + share * (whole - plain)

    class Raise(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            share.assign(min(1.0, 2 * (epoch + 1) / epochs))

    return Rising(), Raise()


def write_summary(path, study, args):
    """The table and the figure."""
    done = read(path, study)
    lines = [
        f"# {args.dataset}: adversarial training and DRSLoss",
        "",
        f"From `{path.name}`, which holds each run. Accuracy in %, mean +- standard deviation over the seeds.",
        "",
        "## Test: suite standard",
        "",
        "Differences are taken seed by seed, to cross-entropy and to label smoothing by the same method, or where they "
        "were not trained by that variant of it, by the method itself. In brackets the 95 % interval over seeds "
        "(Student's t), which tells how training varies; then the half-width over images, which tells how they do.",
        "",
        "| method | loss | lam | seeds | images | clean | after APGD on CE | robust | to cross-entropy | "
        "over images | to label smoothing | over images |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = groups(one for one in done if one["split"] == "test")
    for (method, loss, lam), runs in rows.items():
        first = next(iter(runs[0]["after"]))
        cells = [
            method, NAMES[loss], "" if lam is None else f"{lam:g}", str(len(runs)), str(runs[0]["images"]),
            shared.spread([one["clean"] for one in runs]), shared.spread([one["after"][first] for one in runs]),
            f"**{shared.spread([one['robust'] for one in runs])}**",
        ]  # fmt: skip
        for other in ("ce", "ls"):
            bases = [rows.get((one, other, None), []) for one in (method, method.partition("_")[0])]
            told = other == "ce" or loss == "drs"
            base = next((one for one in bases if one and one is not runs), []) if told else []
            cells += [shared.difference(runs, base), shared.over_images(runs, base)]
        lines.append(f"| {' | '.join(cells)} |")
    tried = groups(one for one in done if one["split"] == "validation")
    if tried:
        lines += [
            "",
            f"## Choice: worst case of {', '.join(study['attacks'])} on validation images",
            "",
            "DRSLoss has had more to choose from than the others: cross-entropy has nothing to set, and label "
            "smoothing is 0.1 throughout.",
            "",
            "| method | loss | lam | seeds | clean | robust |",
            "|---|---|---|---|---|---|",
        ]
    for (method, loss, lam), runs in tried.items():
        cells = [method, NAMES[loss], "" if lam is None else f"{lam:g}", str(len(runs))]
        cells += [shared.spread([one[name] for one in runs]) for name in ("clean", "robust")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Written by `{measure.command(args, 'robust_accuracy')}`.", ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))
    plot(rows, path.with_suffix(".png"), args)


def groups(runs):
    """The runs that differ in nothing but the seed, in the order they were made."""
    result = {}
    for one in sorted(runs, key=lambda one: (one["method"], one["loss"], one["lam"] or 0, one["seed"])):
        result.setdefault((one["method"], one["loss"], one["lam"]), []).append(one)
    return result


def plot(rows, path, args):
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    methods = list(dict.fromkeys(method for method, _, _ in rows))
    losses = [loss for loss in NAMES if any(key[1] == loss for key in rows)]
    for place, loss in enumerate(losses):
        keys = [key for key in rows if key[1] == loss]
        at = [methods.index(method) + (place - (len(losses) - 1) / 2) * 0.25 for method, _, _ in keys]
        values = [100 * np.array([one["robust"] for one in rows[key]]) for key in keys]
        axes.bar(at, [one.mean() for one in values], 0.23, label=NAMES[loss], alpha=0.6)
        for x, one in zip(at, values, strict=True):
            axes.plot([x] * len(one), one, "k.", ms=3)
    axes.set_xticks(range(len(methods)), methods)
    axes.set(ylabel="robust accuracy (%)", title=f"{args.dataset}, suite standard; a dot a seed")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
