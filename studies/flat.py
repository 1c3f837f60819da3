"""Train with flat losses and with one attack step, tune cross-entropy and DRSLoss equally, and test what is best.

A job is a method of training, a loss, a setting and a seed. Each appends a line to `OUT/flat_DATASET.jsonl`. Jobs with
a line there are not run again. When none is left, the table is written beside it.

1. Choice: models are trained without the validation images, which are drawn anew for each seed, and evaluated on these
   by `fast_apgd`, which is targeted at each class. All settings are tried with one seed, the best few with a second.
   In a method, both losses have the same number of settings.
2. Variants: flat training at the chosen settings with smooth activations, with averaged weights, and with other steps
   of the finite difference, on the same validation images. Nothing is chosen here.
3. Test: models are trained on all training images, and evaluated on the test images by the standard suite.
4. Redrawn: the chosen settings and the published ones of ten attack steps, on five other splits of all images.

    python -m studies.flat --dataset digits --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`. The first lines say how long it takes.
"""

import itertools
import time

from benchmarks import measure
from studies import runner
from studies.records import versions
from studies.runner import difference, half_width_over_images, spread_percent

# The attack of the choice: on the margin, targeted at each class. On such models its verdict is that of the standard
# suite or close to it (`benchmarks.fast_suite`), in a tenth of the time.
ATTACKS = ("fast_apgd",)
NAMES = {"ce": "cross-entropy", "drs": "DRSLoss"}


def grid(**values):
    """Return all combinations of values as settings."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


# The settings of each loss. `eps` is the radius of the training, of flat training the weight of the slope too. `noise`
# is the radius of uniform noise that the training starts in.
DIGITS = {
    "flat": {
        "ce": grid(eps=(0.15, 0.3, 0.45, 0.6, 0.8, 1.0), noise=(0.0, 0.3)),
        "drs": grid(eps=(0.3, 0.6), noise=(0.0, 0.3), lam=(0.03, 0.1, 0.3)),
    },
    "flat_consistency": {
        "ce": grid(eps=(0.15, 0.3, 0.6, 1.0), noise=(0.3,), beta=(0.03, 0.3)),
        "drs": grid(eps=(0.3, 0.6), noise=(0.3,), beta=(0.03, 0.3), lam=(0.03, 0.1)),
    },
    "nfgsm": {
        "ce": grid(eps=(0.15, 0.2, 0.25), attack_loss=("cross_entropy", "margin")),
        "drs": grid(eps=(0.15, 0.2), attack_loss=("margin",), lam=(0.03, 0.1, 0.3)),
    },
    "improved_kl": {"ce": grid(beta=(3.0, 6.0, 12.0)), "drs": grid(beta=(6.0,), lam=(0.03, 0.1, 0.3))},
}
# The published settings of ten attack steps, which were chosen in `studies.robust_accuracy`.
PGD = [
    ("pgd", "ce", {}),
    ("pgd", "drs", {"lam": 0.03}),
    ("pgd", "drs", {"lam": 0.1, "attack_loss": "loss"}),
]
VARIANTS = [{"network": "cnn_gelu"}, {"ema": 0.99}, {"step_share": 0.01}]
# `tested`: the methods that are tried with a second seed and tested. With the first seed, the consistency term did not
# make flat training better on validation. `minutes`: what a run of each split takes on one core.
STUDIES = {
    "digits": {
        "settings": DIGITS, "tested": ("flat", "nfgsm", "improved_kl"), "again": 2, "variants": VARIANTS, "seeds": 5,
        "splits": 5, "validation": 240, "images": None, "recipe": {},
        "minutes": {"validation": 0.9, "test": 4.5, "redrawn": 4.5},
    },
}  # fmt: skip


def main(arguments=None, run=None):
    """Run the study; `run` replaces the training and evaluation of a job in tests."""
    run = run or run_job
    args = measure.parse_arguments(__doc__, arguments, data_dir=True, more=runner.add_arguments_of(STUDIES))
    from studies import recipes

    study = quick(STUDIES[args.dataset]) if args.quick else STUDIES[args.dataset]
    study = study | {"recipe": recipes.ADVERSARIAL[args.dataset] | study["recipe"]}
    path, data = runner.open_study(args, "flat")
    for stage in (first_choice, second_choice, variants, tests, redrawn):
        jobs = stage(study, read(path, study))
        left = [job for job in jobs if runner.find(job, read(path, study)) is None]
        hours = sum(study["minutes"].get(job["split"], 1) for job in left) / 60
        print(
            f"{stage.__name__}: {len(left)} of {len(jobs)} jobs left, about {hours:.1f} hours on one core", flush=True
        )
        runner.run_jobs(args, jobs, lambda: read(path, study), lambda job: run(job, study, data, path, args))
    if runner.is_first_worker(args):
        write_summary(path, study, args)


def quick(study):
    """Return a study as small as it can be with every part still run."""
    few = {"flat": {"ce": grid(eps=(0.15, 0.3)), "drs": grid(eps=(0.15,), lam=(0.1, 0.3))}}
    return study | {
        "settings": few, "tested": ("flat",), "again": 1, "variants": study["variants"][:2], "seeds": 2, "splits": 1,
        "validation": 32, "images": 16, "recipe": {"epochs": 1, "warmup_epochs": 0, "steps": 2},
    }  # fmt: skip


def read(path, study):
    """Return the records of runs with the recipe of the study."""
    return [record for record in runner.read_records(path) if record["recipe"] == study["recipe"]]


def make_job(split, method, loss, setting, seed):
    return {"split": split, "method": method, "loss": loss, "setting": setting, "seed": seed}


def first_choice(study, done):
    """Return the jobs that try all settings with one seed."""
    return [
        make_job("validation", method, loss, setting, 0)
        for method, losses in study["settings"].items()
        for loss, settings in losses.items()
        for setting in settings
    ]


def second_choice(study, done):
    """Return the jobs that try the best settings with a second seed."""
    return [
        make_job("validation", method, loss, setting, 1)
        for method in study["tested"]
        for loss, settings in study["settings"][method].items()
        for setting in best(method, loss, settings, 1, done)[: study["again"]]
    ]


def best(method, loss, settings, seeds, done):
    """Return the settings that were tried with so many seeds, the best on validation first."""

    def robust(setting):
        found = [runner.find(make_job("validation", method, loss, setting, seed), done) for seed in range(seeds)]
        return None if None in found else -sum(record["robust"] for record in found)

    tried = [(robust(setting), number) for number, setting in enumerate(settings)]
    return [settings[number] for _, number in sorted(some for some in tried if some[0] is not None)]


def chosen(study, done):
    """Return the best setting of each method and loss that is tested."""
    return {
        (method, loss): best(method, loss, settings, 2, done)[0]
        for method in study["tested"]
        for loss, settings in study["settings"][method].items()
    }


def variants(study, done):
    """Return the jobs of the variants of flat training."""
    return [
        make_job("validation", "flat", loss, setting | variant, seed)
        for (method, loss), setting in chosen(study, done).items()
        if method == "flat"
        for variant in study["variants"]
        for seed in range(2)
    ]


def tests(study, done):
    """Return the jobs of the test, all methods with one seed, then with the next."""
    settings = chosen(study, done).items()
    return [make_job("test", *key, setting, seed) for seed in range(study["seeds"]) for key, setting in settings]


def redrawn(study, done):
    """Return the jobs on other splits."""
    rows = [(*key, setting) for key, setting in chosen(study, done).items() if key[0] in ("flat", "nfgsm")]
    return [make_job("redrawn", *row, seed) for seed in range(study["splits"]) for row in [*PGD, *rows]]


def run_job(job, study, data, path, args):
    """Train the model of a job, evaluate it, and append the record."""
    import numpy as np

    import keras_drsl
    from studies import recipes

    print(job, flush=True)
    training, images = data
    if job["split"] == "validation":
        training, images = recipes.split(training, study["validation"], seed=job["seed"])
    elif job["split"] == "redrawn":
        whole = tuple(np.concatenate(parts) for parts in zip(training, images, strict=True))
        training, images = recipes.split(whole, len(images[0]), seed=job["seed"])
    method, changes = prepare(job)
    loss = recipes.make_loss(job["loss"], job["setting"].get("lam"))
    record = {"recipe": study["recipe"], "diverged": False}
    began = time.perf_counter()
    try:
        model, history = recipes.fit(study["recipe"] | changes, training, method, loss, job["seed"])
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        record |= {"diverged": True, "clean": 0.0, "robust": 0.0, "after": {}, "withstood": "", "warnings": []}
    else:
        seconds = time.perf_counter() - began
        x, y = (part[: study["images"]] for part in images)
        is_choice = job["split"] == "validation" or args.quick
        how = {"suite": "quick", "attacks": ATTACKS, "checks": []} if is_choice else {"suite": "standard"}
        report = keras_drsl.evaluate_robustness(
            model, x, y, eps=study["recipe"]["eps"], x_pool=images, verbose=0, **how
        )
        broken = np.array([name is not None for name in report.per_example["broken_by"]])
        record |= {
            "clean": report.clean_accuracy,
            "robust": report.robust_accuracy,
            "robust_by_class": [float(1 - broken[y == k].mean()) for k in np.unique(y)],
            "after": {name: accuracy["cumulative"] for name, accuracy in report.accuracy.items()},
            "withstood": runner.withstood(report),
            "warnings": runner.doubts(report),
            "images": report.num_examples,
            "attack_strength": [round(value, 4) for value in history["attack_strength"]],
            "seconds_of_training": round(seconds, 1),
        }
    record |= {
        "seconds": round(time.perf_counter() - began, 1),
        "command": measure.command(args, "studies.flat"),
        "device": args.device_name,
        "versions": versions(),
    }
    runner.append_record(path, job | record)


def prepare(job):
    """Return the method of a job as `AdversarialTraining` takes it, and what changes in the recipe."""
    from keras_drsl.training import METHODS, consistency_penalty, improved_kl_penalty

    setting = dict(job["setting"])
    changes = {name: setting.pop(name) for name in ("attack_loss", "network", "ema", "beta") if name in setting}
    eps = setting.pop("eps", None)
    if eps is not None:
        changes["training_eps"] = eps
    if job["method"] == "pgd":
        return METHODS["pgd"], changes
    if job["method"] == "improved_kl":
        return METHODS["trades"].replace(penalty=improved_kl_penalty), changes
    if job["method"] == "nfgsm":
        return METHODS["nfgsm"], changes
    share = setting.get("step_share", 0.1)
    changes["step_size"] = share * eps
    penalty = None
    if job["method"] == "flat_consistency":
        # The step is a small share of `eps`. Its square makes the penalty that of a step of `eps`.
        penalty, changes["beta"] = consistency_penalty, changes["beta"] / share**2
    return METHODS["flat"].replace(start_radius=setting.get("noise", 0.0) / eps, penalty=penalty), changes


def write_summary(path, study, args):
    """Write the table."""
    done = read(path, study)
    lines = [
        f"# {args.dataset}: flat losses and one attack step",
        "",
        f"From `{path.name}`, which holds each run. Accuracy in %, mean +- standard deviation over the seeds. "
        f"L-inf, eps {study['recipe']['eps']:g}.",
    ]
    titles = {"test": "Test: suite standard", "redrawn": "Other splits: suite standard"}
    for split, title in titles.items():
        rows = groups(record for record in done if record["split"] == split)
        lines += test_table(rows, title, on_equal_images=split == "test") if rows else []
    lines += choice_table(groups(record for record in done if record["split"] == "validation"), study)
    lines += ["", f"Written by `{measure.command(args, 'studies.flat')}`.", ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def test_table(rows, title, *, on_equal_images):
    """Return the lines of the results on test images, which may be equal for all seeds."""
    lines = [
        "",
        f"## {title}",
        "",
        "Difference: to cross-entropy in the same method at its own best setting, seed by seed, with the 95 % interval "
        "over seeds (Student's t), then the half-width over images.",
        "",
        "| method | loss | setting | seeds | images | clean | after APGD on CE | robust | difference | over images | "
        "lowest class | checks that warn or fail |",
        "|---" * 12 + "|",
    ]
    for (method, loss, setting), runs in rows.items():
        base = next((some for key, some in rows.items() if key[:2] == (method, "ce")), []) if loss == "drs" else []
        over_images = half_width_over_images(runs, base) if on_equal_images else ""
        lowest = [min(run["robust_by_class"]) for run in runs]
        cells = [
            method, NAMES[loss], setting, str(len(runs)), str(runs[0]["images"]),
            spread_percent([run["clean"] for run in runs]),
            spread_percent([next(iter(run["after"].values())) for run in runs]),
            f"**{spread_percent([run['robust'] for run in runs])}**", difference(runs, base), over_images,
            spread_percent(lowest), ", ".join(sorted({check for run in runs for check in run["warnings"]})),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def choice_table(rows, study):
    """Return the lines of the results on validation images."""
    lines = [
        "",
        f"## Choice: worst case of {', '.join(ATTACKS)} on {study['validation']} validation images",
        "",
        "| method | loss | setting | seeds | clean | robust |",
        "|---" * 6 + "|",
    ]
    for (method, loss, setting), runs in rows.items():
        if any(run["diverged"] for run in runs):
            results = ["diverged", ""]
        else:
            results = [spread_percent([run["clean"] for run in runs])]
            results += [spread_percent([run["robust"] for run in runs])]
        lines.append(f"| {' | '.join([method, NAMES[loss], setting, str(len(runs)), *results])} |")
    return lines


def groups(records):
    """Return the runs that differ in nothing except the seed, by method, loss and setting as text."""
    result = {}
    for record in records:
        setting = ", ".join(f"{name} {value}" for name, value in record["setting"].items())
        result.setdefault((record["method"], record["loss"], setting), []).append(record)
    return dict(sorted(result.items(), key=lambda row: row[0][:2]))


if __name__ == "__main__":
    main()
