"""Compare all losses, without a single attack step in training: what each achieves with and without noise.

The study trains one small CNN per job (a loss, its setting, Gaussian noise on the inputs during training, a seed),
evaluates it, and appends a line to `OUT/compare_losses_DATASET.jsonl`. Jobs with a line there are not run again. When
none is left, it writes the table beside it.

1. Choice: each loss chooses its setting, and with noise setting and noise together, by the worst case of two attacks
   (one of them targeted at each class) on validation images that no model was trained on. All settings are tried with
   one seed, and the best few with a second seed, which draws other images.
2. Test: models are trained on all training images, and evaluated on test images by the standard suite, at the largest
   radius first. An image that withstands it there counts as robust at smaller radii, whose balls lie inside. Some runs
   attack every image at every radius, and the table says how often they contradict this.

On MNIST, settings are those chosen on digits, and only the noise is chosen again. `digits_redrawn` chooses nothing: it
repeats some tests of digits with other test images for each seed, and two noisy copies without the restraint, without
the consistency penalty, and without both.

    python -m studies.compare_losses --dataset digits --out results
    python -m studies.compare_losses --dataset digits_redrawn --out results
    python -m studies.compare_losses --dataset mnist --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`. On two cores: about six hours for digits, half an
hour for the redrawn ones, ten hours for MNIST.
"""

import collections
import itertools
import math
import sys
import time
from pathlib import Path

from benchmarks import measure
from studies import runner
from studies.records import versions

# For each loss, its name in the table and the settings it may choose from. The last three use two noisy copies of each
# image: DRSLoss with the consistency penalty, then without the restraint, then without the penalty.
LOSSES = {
    "cross_entropy": ("cross-entropy", [{}]),
    "label_smoothing": ("label smoothing", [{"label_smoothing": value} for value in (0.1, 0.2, 0.4, 0.6)]),
    "DRSLoss": ("DRSLoss", [{"lam": value} for value in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]),
    "PRSLoss": ("PRSLoss", [{"lam": value} for value in (1e-4, 1e-3, 1e-2, 1e-1)]),
    "Squentropy": ("Squentropy", [{"lam": value} for value in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]),
    "GuidedComplementEntropy": (
        "guided complement entropy",
        [{"alpha": value} for value in (0.05, 0.1, 0.2, 1 / 3, 0.5)],
    ),
    "ComplementObjective": ("complement objective", [{"lam": value} for value in (1.0, 3.0, 10.0, 30.0)]),
    "ProbabilisticallyCompactLoss": ("prob. compact loss", [{"lam": value} for value in (0.0, 0.05, 0.2)]),
    "LogitSqueezing": ("logit squeezing", [{"lam": value} for value in (0.03, 0.1, 0.3, 1.0)]),
    "ZLoss": ("z-loss", [{"lam": value} for value in (1e-4, 1e-2, 1.0)]),
    "copies": (
        "DRSLoss, two noisy copies",
        [{"lam": lam, "beta": beta} for lam in (0.3, 1.0) for beta in (0.03, 0.1, 0.3)],
    ),
    "copies_ce": ("cross-entropy, two noisy copies", [{"lam": 0.0, "beta": value} for value in (0.0, 0.03, 0.1, 0.3)]),
    "copies_apart": ("DRSLoss, two copies, leads free", [{"lam": value, "beta": 0.0} for value in (0.1, 0.3, 1.0)]),
}
COPIES = ("copies", "copies_ce", "copies_apart")
# These are tested again with other test images, with noise.
REPEATED = ("cross_entropy", "label_smoothing", "LogitSqueezing", "Squentropy", "DRSLoss", "copies")
# With seed 0, these are attacked at every radius on every image.
IN_FULL = ("cross_entropy", "DRSLoss", "GuidedComplementEntropy", "LogitSqueezing", "copies")
# `eps`: the radii of the test; choices are made at the last one. `again`: how many settings are tried with a second
# seed. `seeds`: how many models are tested; `more_seeds` for cross-entropy and the `best` on validation. `redrawn`:
# each seed has its own test images.
STUDIES = {
    "digits": {
        "data": "digits", "redrawn": False,
        "eps": (0.05, 0.1, 0.15), "noises": (0.2, 0.3, 0.4, 0.5), "again": 4, "seeds": 5, "best": 0, "more_seeds": 5,
        "validation": 360, "images": None, "recipe": {"epochs": 80, "batch_size": 64}, "settings_from": None,
        "seen_noise": 0.2,
    },
    "mnist": {
        "data": "mnist", "redrawn": False,
        "eps": (0.1, 0.2), "noises": (0.3, 0.5, 0.7, 1.0), "again": 0, "seeds": 1, "best": 3, "more_seeds": 3,
        "validation": 300, "images": 300, "recipe": {"epochs": 6, "batch_size": 128}, "settings_from": "digits",
        "seen_noise": 0.3,
    },
}  # fmt: skip
STUDIES["digits_redrawn"] = STUDIES["digits"] | {
    "redrawn": True, "eps": (0.15,), "seeds": 3, "settings_from": "digits",
}  # fmt: skip
# The attacks of the choice. Untargeted ones would overstate the losses that make the non-true logits equal, by up to
# fifteen points.
ATTACKS = ("apgd_ce", "apgd_t_margin")


def main(arguments=None, run=None):
    """Run the study; `run` replaces the training and evaluation of a job in tests."""
    run = run or run_job
    args = measure.parse_arguments(__doc__, arguments, data_dir=True, more=runner.add_arguments_of(STUDIES))
    from keras_drsl import datasets

    losses = few_losses() if args.quick else LOSSES
    studies = {name: quick(study) if args.quick else study for name, study in STUDIES.items()}
    study = studies[args.dataset]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = path_of(out, args.dataset, args)
    settings = {key: losses[key[0]][1] for key in keys(losses)}
    if study["settings_from"]:
        first = studies[study["settings_from"]]
        done = read(path_of(out, study["settings_from"], args), first)

        def be_done(jobs):
            if any(runner.find(job, done) is None for job in jobs):
                sys.exit(f"Run `--dataset {study['settings_from']}` first: settings are chosen there.")

        chosen = choose(first, settings, be_done, lambda: done)
        settings = {key: [setting] for key, (_, setting, _) in chosen.items()}
    data = datasets.load(study["data"], args.data_dir)
    if args.quick:
        data = tuple((x[:256], y[:256]) for x, y in data)

    def read_all():
        return read(path, study)

    trained = 0

    def do(jobs):
        nonlocal trained
        trained += runner.run_jobs(args, jobs, read_all, lambda job: run(job, study, data, path, args))

    if study["redrawn"]:
        tests = [make_job("test", option, seed) for seed in range(study["seeds"]) for option in repeated(chosen)]
    else:
        tests = test_jobs(study, choose(study, settings, do, read_all), read_all())
    do(tests)
    if runner.is_first_worker(args):
        tested = [runner.find(job, read_all()) for job in tests]
        # The time of a step is measured when models were trained, and otherwise kept from the table.
        steps = {} if trained else stored_steps(path.with_suffix(".md"))
        write_summary(path, study, tested, steps or time_steps(rows_of(tested), study, data, args), args)


def few_losses():
    """Return few losses with few settings, to see that every part runs."""
    few = {name: LOSSES[name] for name in ("cross_entropy", "Squentropy", "copies")}
    name, settings = few["Squentropy"]
    copies, copies_settings = few["copies"]
    return few | {"Squentropy": (name, settings[:2]), "copies": (copies, copies_settings[:1])}


def read(path, study):
    """Return the records of runs with the settings of the study."""
    return [record for record in runner.read_records(path) if record["study"] == conditions(study)]


def conditions(study):
    """Return what all runs of a study have in common, as JSON returns it."""
    return {name: study[name] for name in ("recipe", "validation", "images", "seen_noise")} | {"eps": [*study["eps"]]}


def path_of(out, dataset, args):
    return out / f"compare_losses_{dataset}{'_quick' if args.quick else ''}.jsonl"


def quick(study):
    """Return a study as small as it can be with every part still run."""
    return study | {
        "eps": study["eps"][-2:], "noises": study["noises"][:2], "again": 2, "seeds": 1, "best": 1, "more_seeds": 2,
        "validation": 32, "images": 16, "recipe": {"epochs": 1, "batch_size": 64},
    }  # fmt: skip


def keys(losses):
    """Return each loss without noise and with noise; noisy copies only with noise."""
    return [(name, noisy) for noisy in (False, True) for name in losses if noisy or name not in COPIES]


def noises(name, study):
    """Return the noises that a loss may choose from. Uniform noise of two copies is no wider than the range, [0, 1]."""
    return [noise for noise in study["noises"] if name not in COPIES or radius_of(noise) <= 1]


def radius_of(noise):
    """Return the radius of uniform noise of a standard deviation."""
    return noise * math.sqrt(3)


def make_job(split, option, seed):
    loss, setting, noise = option
    job = {"split": split, "loss": loss, "setting": setting, "noise": noise, "seed": seed}
    return job | ({"attacks": [*ATTACKS]} if split == "validation" else {})


def choose(study, settings, do, read_all):
    """Return the loss, setting and noise of each key that are best on validation; `do` runs the jobs it is given."""
    options = {
        (name, noisy): [
            (name, setting, noise)
            for setting in settings[name, noisy]
            for noise in (noises(name, study) if noisy else [0.0])
        ]
        for name, noisy in settings
    }
    seeds = 2 if study["again"] else 1
    for seed in range(seeds):
        do([make_job("validation", option, seed) for some in options.values() for option in some])
        done = read_all()
        count = study["again"] if seed + 1 < seeds else 1
        for key, some in options.items():
            options[key] = sorted(some, key=lambda option, seed=seed: -validated(option, seed + 1, study, done))[:count]
    return {key: some[0] for key, some in options.items()}


def validated(option, seeds, study, done):
    """Return the mean worst case on validation at the largest radius."""
    found = [runner.find(make_job("validation", option, seed), done) for seed in range(seeds)]
    return sum(record["robust"][f"{study['eps'][-1]:g}"] for record in found) / seeds


def test_jobs(study, chosen, done):
    """Return the jobs of the chosen settings on test images, with more seeds for the best and for cross-entropy."""
    seeds = 2 if study["again"] else 1
    best = sorted(chosen, key=lambda key: -validated(chosen[key], seeds, study, done))[: study["best"]]
    jobs = []
    for key, option in chosen.items():
        count = study["more_seeds"] if key in best or key[0] == "cross_entropy" else study["seeds"]
        jobs += [make_job("test", option, seed) for seed in range(count)]
    # All losses with one seed, then with the next: a study that was stopped can be read.
    return sorted(jobs, key=lambda job: job["seed"])


def repeated(chosen):
    """Return the options that are tested with other test images, and two noisy copies without their parts."""
    name, setting, noise = chosen["copies", True]
    halves = [setting | part for part in ({"beta": 0.0}, {"lam": 0.0}, {"lam": 0.0, "beta": 0.0})]
    options = [chosen["cross_entropy", False], *(chosen[loss, True] for loss in REPEATED if (loss, True) in chosen)]
    return options + [(name, half, noise) for half in halves]


def against_order(tests, radii):
    """Count contradictions to the assumption that an image robust at a radius is robust at smaller ones.

    Only the runs that attacked all images at all radii count.

    Returns:
        How many images were robust at a larger radius, and how many of these fell at a smaller one.
    """
    robust = fell = 0
    for run in tests:
        # The first runs attacked all images, and did not record how many.
        if set(run.get("attacked", {}).values()) <= {run["images"]}:
            for smaller, larger in itertools.combinations(radii, 2):
                at_larger = [digit == "1" for digit in run["withstood"][larger]]
                robust += sum(at_larger)
                fell += sum(
                    was_robust and digit == "0"
                    for was_robust, digit in zip(at_larger, run["withstood"][smaller], strict=True)
                )
    return robust, fell


def make_loss(name, setting):
    """Return a loss of class ids and logits."""
    import keras

    import keras_drsl

    if name == "cross_entropy":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "label_smoothing":
        # Keras's own takes no smoothing for class ids. Without restraint, DRSLoss is the same.
        return keras_drsl.DRSLoss(0.0, from_logits=True, **setting)
    return getattr(keras_drsl, name)(**setting, from_logits=True)


def train(job, data, recipe):
    """Train a model that returns logits."""
    model, options = compiled(job, data, recipe)
    model.fit(*data, **options, verbose=0)
    return model.model if job["loss"] in COPIES else model


def compiled(job, data, recipe):
    """Return the compiled model of a job, or its training with two copies, and the recipe."""
    import keras

    import keras_drsl
    from studies import networks

    keras.utils.set_random_seed(job["seed"])
    model = networks.build("cnn", data[0].shape[1:], 0 if job["loss"] in COPIES else job["noise"])
    if job["loss"] not in COPIES:
        model.compile("adam", make_loss(job["loss"], job["setting"]))
        return model, recipe
    # Two copies of half as many images, for half the epochs: as many steps, of equal size.
    options = {"method": "consistency", "beta": job["setting"]["beta"], "seed": job["seed"]}
    copies = keras_drsl.AdversarialTraining(model, radius_of(job["noise"]), **options)
    copies.compile("adam", keras_drsl.DRSLoss(job["setting"]["lam"], from_logits=True))
    return copies, {name: math.ceil(value / 2) for name, value in recipe.items()}


def run_job(job, study, data, path, args):
    """Train the model of a job, evaluate it, and append the record."""
    import keras
    import numpy as np

    import keras_drsl
    from studies import recipes

    print(args.dataset, job, flush=True)
    training, images = data
    if job["split"] == "validation":
        training, images = recipes.split(training, study["validation"], seed=job["seed"])
    elif study["redrawn"]:
        whole = tuple(np.concatenate(parts) for parts in zip(training, images, strict=True))
        training, images = recipes.split(whole, len(images[0]), seed=job["seed"])
    began = time.perf_counter()
    model = train(job, training, study["recipe"])
    seconds = time.perf_counter() - began
    is_test = job["split"] == "test"
    how = {"suite": "standard"} if is_test and not args.quick else {"suite": "quick", "attacks": ATTACKS}
    x, y = (part[: study["images"]] for part in images)
    robust_now = np.zeros(len(x), bool)
    in_full = job["seed"] == 0 and job["loss"] in IN_FULL
    robust, attacked, withstood, warnings, first = {}, {}, {}, {}, None
    for eps in sorted(study["eps"], reverse=True) if is_test else study["eps"][-1:]:
        left = np.flatnonzero(~robust_now | in_full)
        if len(left):
            report = keras_drsl.evaluate_robustness(model, x[left], y[left], eps=eps, verbose=0, **how)
            robust_now[left] = [name is None for name in report.per_example["broken_by"]]
            warnings[f"{eps:g}"] = runner.doubts(report)
            first = first or report
        robust[f"{eps:g}"], attacked[f"{eps:g}"] = float(robust_now.mean()), len(left)
        withstood[f"{eps:g}"] = "".join("1" if is_robust else "0" for is_robust in robust_now)
    logits = model.predict(x, batch_size=500, verbose=0)
    noisy = x + np.random.default_rng(0).normal(0, study["seen_noise"], x.shape).astype("float32")
    diversity = keras_drsl.softmax_diversity(y, logits, from_logits=True)
    # The fields of a job stay as they are, so that its record is found.
    record = {
        "attacks": [attack["name"] for attack in first.attacks],
        **job,
        "robust": robust,
        "attacked": attacked,
        "after": {f"{study['eps'][-1]:g}": {name: accuracy["cumulative"] for name, accuracy in first.accuracy.items()}},
        "withstood": withstood,
        "warnings": warnings,
        "clean": float((logits.argmax(1) == y).mean()),
        "under_noise": float((model.predict(noisy, batch_size=500, verbose=0).argmax(1) == y).mean()),
        "calibration_error": calibration_error(logits, y),
        "diversity": float(keras.ops.mean(diversity)),
        "images": len(x),
        "study": conditions(study),
        "seconds_of_training": round(seconds, 1),
        "command": measure.command(args, "studies.compare_losses"),
        "device": args.device_name,
        "versions": versions(),
    }
    runner.append_record(path, record)


def calibration_error(logits, y, bins=15):
    """Compute the expected calibration error: |accuracy - confidence| in bins of equal width, weighted by images.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    import numpy as np
    from scipy import special

    p = special.softmax(logits.astype("float64"), axis=1)
    confidence, right = p.max(1), p.argmax(1) == y
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].sum() - confidence[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(y))


def rows_of(tested):
    """Return the test runs by row of the table: noise or none, loss, setting."""
    rows = {}
    for run in tested:
        rows.setdefault((run["noise"] > 0, run["loss"], *run["setting"].items()), []).append(run)
    return rows


def stored_steps(path):
    """Return the cells of the step column of a table by loss, setting and noise; empty without a table."""
    lines = path.read_text().splitlines() if path.exists() else []
    head = next(
        (number for number, line in enumerate(lines) if line.startswith("| loss | setting | training noise")), None
    )
    if head is None or " step " not in lines[head]:
        return {}
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {tuple(cells[:3]): cells[4] for cells in rows}


def time_steps(rows, study, data, args):
    """Measure a training step of each row over that of the first row, plain cross-entropy.

    Returns:
        By the first cells of each row, the ratio of the medians with the quartiles of the turns.
    """
    jobs = {tuple(first_cells(key, runs, study)): runs[0] for key, runs in rows.items()}
    count, rounds = (2, 2) if args.quick else (20, 7)
    calls = {}
    for key, job in jobs.items():
        model, options = compiled(job, data[0], study["recipe"])
        # Two copies of half a batch make a step of equal size.
        batch = tuple(part[: options["batch_size"]] for part in data[0])
        calls[key] = lambda model=model, batch=batch: [model.train_on_batch(*batch) for _ in range(count)]
    seconds = measure.interleave(calls, rounds)
    plain = next(iter(seconds.values()))
    steps = {}
    for key, values in seconds.items():
        step = measure.ratio(values, plain)
        steps[key] = f"{step['ratio']:.2f} ({step['spread'][0]:.2f} to {step['spread'][1]:.2f})"
    return steps


def first_cells(key, runs, study):
    """Return the first cells of a row: loss, setting, noise. A star marks the end of the values to choose from."""
    _, name, *setting = key
    noise, choice = runs[0]["noise"], noises(name, study)
    return [
        LOSSES[name][0],
        ", ".join(f"{argument} {value:.3g}{at_end(name, argument, value)}" for argument, value in setting),
        f"{noise:g}{'*' if noise in (choice[0], choice[-1]) else ''}",
    ]


def write_summary(path, study, tested, steps, args):
    """Write the table."""
    done, radii = read(path, study), [f"{eps:g}" for eps in study["eps"]]
    chosen_by = [run for run in done if run["split"] == "validation" and run["attacks"] == [*ATTACKS]]
    others = [run for run in done if run["split"] == "test" and run not in tested]
    lines = [
        f"# {args.dataset}: losses side by side",
        "",
        introduction(path, study, tested, radii),
        "",
        *test_table(rows_of(tested), study, radii, steps),
        *short_table(
            f"Choice: worst case of {' and '.join(ATTACKS)} at {radii[-1]} on validation images", chosen_by, radii[-1]
        ),
        *short_table(
            f"Test runs of settings that an earlier way of choosing had chosen, at {radii[-1]}", others, radii[-1]
        ),
        "",
        f"Written by `{measure.command(args, 'studies.compare_losses')}`.",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def introduction(path, study, tested, radii):
    """Return the paragraph that explains the table."""
    images = f"{tested[0]['images']} test images{', drawn anew for each seed' if study['redrawn'] else ''}"
    robust, fell = against_order(tested, radii)
    order = (
        "Images are attacked at the largest radius first. Those that withstand it count as robust at smaller radii. "
        f"In the runs that attacked all images at all radii, {fell} of {robust} images that were robust at a larger "
        "radius fell at a smaller one."
    )
    sentences = [
        f"From `{path.name}`, which holds each run.",
        f"Suite standard on {images}, L-inf, no adversarial training, {study['recipe']['epochs']} epochs, half as many "
        "for two copies.",
        "In %, mean +- standard deviation over the seeds.",
        "ECE: expected calibration error.",
        f"noisy: accuracy under Gaussian noise of {study['seen_noise']}.",
        f"Difference at {radii[-1]}: to cross-entropy with its own best noise, or without noise, seed by seed, with "
        "its 95 % interval over seeds where there are several, and the half-width over images.",
        "The best of many rows looks better than it is.",
        "Step: time of a training step over that of cross-entropy without noise, ratio of the medians and quartiles of "
        "the turns; for two copies, with half as many images.",
        "All models are trained from scratch by one recipe, also where the authors begin with cross-entropy (prob. "
        "compact loss).",
        "`*`: the first or last of the values to choose from.",
        *([order] if len(radii) > 1 else []),
    ]
    return " ".join(sentences)


def test_table(rows, study, radii, steps):
    """Return the lines of the results on the test images."""
    last = radii[-1]
    lines = [
        f"| loss | setting | training noise | seeds | step | clean | ECE | noisy | {' | '.join(radii)} | "
        f"after APGD on CE at {last} | difference | checks that warn or fail at {last} |",
        "|---|---|---|---|---|---|---|---|" + "---|" * (len(radii) + 3),
    ]
    for key, runs in rows.items():
        base = rows[key[0], "cross_entropy"] if key[1] != "cross_entropy" else []
        columns = [[run[name] for run in runs] for name in ("clean", "calibration_error", "under_noise")]
        columns += [[run["robust"][radius] for run in runs] for radius in radii]
        columns.append([next(iter(run["after"][last].values())) for run in runs])
        first = first_cells(key, runs, study)
        cells = [*first, str(len(runs)), steps.get(tuple(first), ""), *map(runner.spread_percent, columns)]
        cells[-2] = f"**{cells[-2]}**"
        gain = runner.difference(runs, base, lambda run: run["robust"][last])
        over_images = runner.half_width_over_images(runs, base, lambda run: run["withstood"][last])
        warned = collections.Counter(check for run in runs for check in run["warnings"][last])
        cells += [f"{gain} {over_images}".strip(), ", ".join(f"{check}: {count}" for check, count in warned.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def short_table(title, runs, radius):
    """Return the lines of a section: clean and robust accuracy of each loss, setting and noise. None without runs."""
    groups = {}
    for run in runs:
        groups.setdefault((run["loss"], tuple(run["setting"].items()), run["noise"]), []).append(run)
    lines = ["", f"## {title}", "", "| loss | setting | training noise | seeds | clean | robust |", "|---" * 6 + "|"]
    for (name, setting, noise), some in sorted(groups.items()):
        cells = [LOSSES[name][0], ", ".join(f"{key} {value:.3g}" for key, value in setting), f"{noise:g}"]
        cells += [str(len(some)), runner.spread_percent([run["clean"] for run in some])]
        lines.append(f"| {' | '.join(cells)} | {runner.spread_percent([run['robust'][radius] for run in some])} |")
    return lines if runs else []


def at_end(name, key, value):
    """Return a star for the smallest and largest value that a loss could choose from, if larger ones are possible."""
    values = {setting[key] for setting in LOSSES[name][1]}
    return "*" if len(values) > 1 and 0 < value in (min(values), max(values)) else ""


if __name__ == "__main__":
    main()
