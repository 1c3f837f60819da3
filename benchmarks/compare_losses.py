"""All losses side by side, without a single attack step in training: what each is worth, with and without noise.

It trains one small CNN after another (a loss, its setting, Gaussian noise on the inputs while training, a seed),
evaluates it and appends a line to `OUT/compare_losses_DATASET.jsonl`. What stands there is not done again. When nothing
is left to do, it writes the table and the figure beside it.

1. Choice: each loss chooses its setting, and with noise setting and noise together, by the worst case of two attacks,
   one of them aimed at each rival, on validation images that no model was trained on. All are tried with one seed, the
   best few with a second, which draws other images.
2. Test: models trained on all training images, attacked on test images by the standard suite, at the largest radius
   first. What withstands it there counts as withstanding it in the smaller balls, which lie inside. Some runs attack
   every image at every radius all the same, and the table says how often they speak against that.

On MNIST settings are those chosen on the digits, and only the noise is chosen anew. `digits_redrawn` chooses nothing:
it repeats some of the digits' tests with other test images for each seed, and takes from the two noisy copies the one
half of what they add, the other, and both.

    python benchmarks/compare_losses.py --dataset digits --out results
    python benchmarks/compare_losses.py --dataset digits_redrawn --out results
    python benchmarks/compare_losses.py --dataset mnist --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`. On two cores about six hours for the digits, half
an hour for the redrawn ones, ten hours for MNIST.
"""

import collections
import itertools
import math
import sys
import time
from pathlib import Path

import measure
import shared

# Of each loss, the name in the table and what it may choose from. The last three are two noisy copies of each image:
# DRSLoss with their leads kept alike, and what is left without the one and the other.
LOSSES = {
    "cross_entropy": ("cross-entropy", [{}]),
    "label_smoothing": ("label smoothing", [{"label_smoothing": one} for one in (0.1, 0.2, 0.4, 0.6)]),
    "DRSLoss": ("DRSLoss", [{"lam": one} for one in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]),
    "PRSLoss": ("PRSLoss", [{"lam": one} for one in (1e-4, 1e-3, 1e-2, 1e-1)]),
    "Squentropy": ("Squentropy", [{"lam": one} for one in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]),
    "GuidedComplementEntropy": ("guided complement entropy", [{"alpha": one} for one in (0.05, 0.1, 0.2, 1 / 3, 0.5)]),
    "ComplementObjective": ("complement objective", [{"lam": one} for one in (1.0, 3.0, 10.0, 30.0)]),
    "ProbabilisticallyCompactLoss": ("prob. compact loss", [{"lam": one} for one in (0.0, 0.05, 0.2)]),
    "LogitSqueezing": ("logit squeezing", [{"lam": one} for one in (0.03, 0.1, 0.3, 1.0)]),
    "ZLoss": ("z-loss", [{"lam": one} for one in (1e-4, 1e-2, 1.0)]),
    "copies": (
        "DRSLoss, two noisy copies",
        [{"lam": lam, "beta": beta} for lam in (0.3, 1.0) for beta in (0.03, 0.1, 0.3)],
    ),
    "copies_ce": ("cross-entropy, two noisy copies", [{"lam": 0.0, "beta": one} for one in (0.0, 0.03, 0.1, 0.3)]),
    "copies_apart": ("DRSLoss, two copies, leads free", [{"lam": one, "beta": 0.0} for one in (0.1, 0.3, 1.0)]),
}
COPIES = ("copies", "copies_ce", "copies_apart")
# Tested again with other test images, with noise.
REPEATED = ("cross_entropy", "label_smoothing", "LogitSqueezing", "Squentropy", "DRSLoss", "copies")
# With seed 0 attacked at every radius on every image.
IN_FULL = ("cross_entropy", "DRSLoss", "GuidedComplementEntropy", "LogitSqueezing", "copies")
# `eps`: the radii of the test; choices are made at the last. `again`: how many are tried with a second seed. `seeds`:
# of the tests, and of those of cross-entropy and the `best` on validation. `redrawn`: each seed has test images of its
# own.
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
# Of the choice. An untargeted attack would flatter the losses that level the rivals, by up to fifteen points.
ATTACKS = ("apgd_ce", "apgd_t_margin")


def main():
    args = measure.arguments(__doc__, data_dir=True, more=add_arguments)
    from keras_drsl.evaluation import datasets

    if args.quick:
        for name in LOSSES.keys() - {"cross_entropy", "Squentropy", "copies"}:
            del LOSSES[name]
        del LOSSES["Squentropy"][1][2:], LOSSES["copies"][1][1:]
    studies = {name: quick(study) if args.quick else study for name, study in STUDIES.items()}
    study = studies[args.dataset]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = path_of(out, args.dataset, args)
    settings = {key: LOSSES[key[0]][1] for key in keys()}
    if study["settings_from"]:
        first = studies[study["settings_from"]]
        done = read(path_of(out, study["settings_from"], args), first)

        def be_done(jobs):
            if any(shared.find(job, done) is None for job in jobs):
                sys.exit(f"Run `--dataset {study['settings_from']}` first: settings are chosen there.")

        chosen = choose(first, settings, be_done, lambda: done)
        settings = {key: [setting] for key, (_, setting, _) in chosen.items()}
    data = datasets.load(study["data"], args.data_dir)
    if args.quick:
        data = tuple((x[:256], y[:256]) for x, y in data)

    def read_all():
        return read(path, study)

    def do(jobs):
        shared.share(args, jobs, read_all, lambda job: run(job, study, data, path, args))

    if study["redrawn"]:
        tests = [make_job("test", option, seed) for seed in range(study["seeds"]) for option in repeated(chosen)]
    else:
        tests = test_jobs(study, choose(study, settings, do, read_all), read_all())
    do(tests)
    if shared.is_first(args):
        write_summary(path, study, tests, data, args)


def add_arguments(parser):
    parser.add_argument("--dataset", choices=STUDIES, default="digits")
    shared.add_worker(parser)


def read(path, study):
    """The records of runs made as the study makes them."""
    return [one for one in shared.read(path) if one["study"] == conditions(study)]


def conditions(study):
    """What all runs of a study have in common, as JSON gives it back."""
    return {name: study[name] for name in ("recipe", "validation", "images", "seen_noise")} | {"eps": [*study["eps"]]}


def path_of(out, dataset, args):
    return out / f"compare_losses_{dataset}{'_quick' if args.quick else ''}.jsonl"


def quick(study):
    """As small as it can be and still go through all of it."""
    return study | {
        "eps": study["eps"][-2:], "noises": study["noises"][:2], "again": 2, "seeds": 1, "best": 1, "more_seeds": 2,
        "validation": 32, "images": 16, "recipe": {"epochs": 1, "batch_size": 64},
    }  # fmt: skip


def keys():
    """Each loss without noise and with; noisy copies are nothing without noise."""
    return [(name, noisy) for noisy in (False, True) for name in LOSSES if noisy or name not in COPIES]


def noises(name, study):
    """The noises a loss may choose from: the uniform noise of two copies is no wider than the images' range, [0, 1]."""
    return [noise for noise in study["noises"] if name not in COPIES or radius_of(noise) <= 1]


def radius_of(noise):
    """The radius of uniform noise of a standard deviation."""
    return noise * math.sqrt(3)


def make_job(split, option, seed):
    loss, setting, noise = option
    job = {"split": split, "loss": loss, "setting": setting, "noise": noise, "seed": seed}
    return job | ({"attacks": [*ATTACKS]} if split == "validation" else {})


def choose(study, settings, do, read_all):
    """The loss, setting and noise of each key that are best on validation, once `do` has done what it is given."""
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
            options[key] = sorted(some, key=lambda one, seed=seed: -validated(one, seed + 1, study, done))[:count]
    return {key: some[0] for key, some in options.items()}


def validated(option, seeds, study, done):
    """The mean worst case on validation at the largest radius."""
    found = [shared.find(make_job("validation", option, seed), done) for seed in range(seeds)]
    return sum(one["robust"][f"{study['eps'][-1]:g}"] for one in found) / seeds


def test_jobs(study, chosen, done):
    """What is chosen, on the test images; the best on validation with more seeds, and cross-entropy."""
    seeds = 2 if study["again"] else 1
    best = sorted(chosen, key=lambda key: -validated(chosen[key], seeds, study, done))[: study["best"]]
    jobs = []
    for key, option in chosen.items():
        count = study["more_seeds"] if key in best or key[0] == "cross_entropy" else study["seeds"]
        jobs += [make_job("test", option, seed) for seed in range(count)]
    # All with one seed, then with the next: a study that is stopped can be read.
    return sorted(jobs, key=lambda job: job["seed"])


def repeated(chosen):
    """What is tested with other test images, and the two noisy copies without what they add."""
    name, setting, noise = chosen["copies", True]
    halves = [setting | part for part in ({"beta": 0.0}, {"lam": 0.0}, {"lam": 0.0, "beta": 0.0})]
    options = [chosen["cross_entropy", False], *(chosen[one, True] for one in REPEATED if one in LOSSES)]
    return options + [(name, half, noise) for half in halves]


def against_order(tests, radii):
    """Of the runs that attacked all images at all radii: how often one stood at a larger radius, and fell at a smaller.

    The first runs did so and did not count the attacked.
    """
    stood = fell = 0
    for one in tests:
        if set(one.get("attacked", {}).values()) <= {one["images"]}:
            for smaller, larger in itertools.combinations(radii, 2):
                at_larger = [at == "1" for at in one["withstood"][larger]]
                stood += sum(at_larger)
                fell += sum(
                    stands and at == "0" for stands, at in zip(at_larger, one["withstood"][smaller], strict=True)
                )
    return stood, fell


def make_loss(name, setting):
    """A loss of class ids and logits."""
    import keras

    import keras_drsl

    if name == "cross_entropy":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "label_smoothing":
        # Keras's own takes no smoothing for class ids; without restraint this is the same.
        return keras_drsl.DRSLoss(0.0, from_logits=True, **setting)
    return getattr(keras_drsl, name)(**setting, from_logits=True)


def train(job, data, recipe):
    """A model that returns logits."""
    model, options = compiled(job, data, recipe)
    model.fit(*data, **options, verbose=0)
    return model.model if job["loss"] in COPIES else model


def compiled(job, data, recipe):
    """What is to be fitted, a model that returns logits or a training of it, and how."""
    import keras
    import networks

    import keras_drsl

    keras.utils.set_random_seed(job["seed"])
    model = networks.build("cnn", data[0].shape[1:], 0 if job["loss"] in COPIES else job["noise"])
    if job["loss"] not in COPIES:
        model.compile("adam", make_loss(job["loss"], job["setting"]))
        return model, recipe
    # Two copies of half as many images, half as often: the same number of steps, of equal size.
    options = {"method": "noise", "beta": job["setting"]["beta"], "seed": job["seed"]}
    copies = keras_drsl.AdversarialTraining(model, radius_of(job["noise"]), **options)
    copies.compile("adam", keras_drsl.DRSLoss(job["setting"]["lam"], from_logits=True))
    return copies, {name: math.ceil(value / 2) for name, value in recipe.items()}


def run(job, study, data, path, args):
    """Train the model of a job, evaluate it, and append the record."""
    import adversarial_training as example
    import keras
    import numpy as np

    import keras_drsl

    print(args.dataset, job, flush=True)
    training, images = data
    if job["split"] == "validation":
        training, images = example.split(training, study["validation"], seed=job["seed"])
    elif study["redrawn"]:
        whole = tuple(np.concatenate(parts) for parts in zip(training, images, strict=True))
        training, images = example.split(whole, len(images[0]), seed=job["seed"])
    began = time.perf_counter()
    model = train(job, training, study["recipe"])
    seconds = time.perf_counter() - began
    is_test = job["split"] == "test"
    how = {"suite": "standard"} if is_test and not args.quick else {"suite": "quick", "attacks": ATTACKS}
    x, y = (part[: study["images"]] for part in images)
    stands = np.zeros(len(x), bool)
    in_full = job["seed"] == 0 and job["loss"] in IN_FULL
    robust, attacked, withstood, warnings, first = {}, {}, {}, {}, None
    for eps in sorted(study["eps"], reverse=True) if is_test else study["eps"][-1:]:
        left = np.flatnonzero(~stands | in_full)
        if len(left):
            report = keras_drsl.evaluate_robustness(model, x[left], y[left], eps=eps, verbose=0, **how)
            stands[left] = [one is None for one in report.per_example["broken_by"]]
            warnings[f"{eps:g}"] = [f"{one.name} ({one.status})" for one in report.checks if one.status != "pass"]
            first = first or report
        robust[f"{eps:g}"], attacked[f"{eps:g}"] = float(stands.mean()), len(left)
        withstood[f"{eps:g}"] = "".join("1" if one else "0" for one in stands)
    logits = model.predict(x, batch_size=500, verbose=0)
    noisy = x + np.random.default_rng(0).normal(0, study["seen_noise"], x.shape).astype("float32")
    diversity = keras_drsl.softmax_diversity(y, logits, from_logits=True)
    # What a job asks for stays as it is: the attacks of a choice too, of which a report names a check that broke more.
    record = {
        "attacks": [one["name"] for one in first.attacks],
        **job,
        "robust": robust,
        "attacked": attacked,
        "after": {f"{study['eps'][-1]:g}": {name: one["cumulative"] for name, one in first.accuracy.items()}},
        "withstood": withstood,
        "warnings": warnings,
        "clean": float((logits.argmax(1) == y).mean()),
        "under_noise": float((model.predict(noisy, batch_size=500, verbose=0).argmax(1) == y).mean()),
        "calibration_error": calibration_error(logits, y),
        "diversity": float(keras.ops.mean(diversity)),
        "images": len(x),
        "study": conditions(study),
        "seconds_of_training": round(seconds, 1),
        "command": measure.command(args, "compare_losses"),
        "device": args.device_name,
        "versions": measure.versions(),
    }
    shared.append(path, record)


def calibration_error(logits, y, bins=15):
    """The expected calibration error: |accuracy - confidence| in bins of equal width, weighted by their images.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    import numpy as np
    from scipy import special

    p = special.softmax(logits.astype("float64"), axis=1)
    confidence, right = p.max(1), p.argmax(1) == y
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].sum() - confidence[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(y))


def time_steps(jobs, study, data, args):
    """The time of a training step of each job over the first one's, plain cross-entropy: medians, and quartiles."""
    count, rounds = (2, 2) if args.quick else (20, 7)
    calls = {}
    for key, job in jobs.items():
        model, options = compiled(job, data[0], study["recipe"])
        # For two copies half a batch, which makes a step of equal size.
        batch = tuple(part[: options["batch_size"]] for part in data[0])
        calls[key] = lambda model=model, batch=batch: [model.train_on_batch(*batch) for _ in range(count)]
    seconds = measure.interleave(calls, rounds)
    plain = next(iter(seconds.values()))
    return {key: measure.ratio(values, plain) for key, values in seconds.items()}


def write_summary(path, study, tests, data, args):
    """The table and the figure."""
    done = read(path, study)
    tested = [shared.find(job, done) for job in tests]
    rows = {}
    for one in tested:
        rows.setdefault((one["noise"] > 0, one["loss"], *one["setting"].items()), []).append(one)
    steps = time_steps({key: runs[0] for key, runs in rows.items()}, study, data, args)
    radii = [f"{eps:g}" for eps in study["eps"]]
    last = radii[-1]
    stood, fell = against_order(tested, radii)
    images = f"{tested[0]['images']} test images{', drawn anew for each seed' if study['redrawn'] else ''}"
    order = (
        " Attacked at the largest radius first; what withstands it there counts as withstanding it in the balls "
        f"inside: in the runs that attacked all images at all radii, of {stood} that stood at a larger radius {fell} "
        "fell at a smaller."
    )
    lines = [
        f"# {args.dataset}: losses side by side",
        "",
        f"From `{path.name}`, which holds each run. Suite standard on {images}, L-inf, no adversarial training, "
        f"{study['recipe']['epochs']} epochs, half as many for two copies. In %, mean +- standard deviation over the "
        f"seeds; ECE: expected calibration error; noisy: accuracy under Gaussian noise of {study['seen_noise']}. "
        f"Difference: at {last}, to cross-entropy with its own best noise, or without, seed by seed, with its 95 % "
        "interval over seeds where there are several, and the half-width over images; the best of many rows looks "
        "better than it is. Step: time of a training step over cross-entropy's without noise, the medians' ratio and "
        "the quartiles of turns, for two copies on half as many images. All are trained from scratch by one recipe, "
        "those too whose authors begin with cross-entropy (prob. compact loss). `*`: the first or last of what could "
        f"be chosen.{order if len(radii) > 1 else ''}",
        "",
        f"| loss | setting | training noise | seeds | step | clean | ECE | noisy | {' | '.join(radii)} | "
        f"after APGD on CE at {last} | difference | checks that warn or fail at {last} |",
        "|---|---|---|---|---|---|---|---|" + "---|" * (len(radii) + 3),
    ]
    for (noisy, name, *key), runs in rows.items():
        base = rows[noisy, "cross_entropy"] if name != "cross_entropy" else []
        setting = ", ".join(f"{argument} {value:.3g}{at_end(name, argument, value)}" for argument, value in key)
        noise = runs[0]["noise"]
        choice = noises(name, study)
        noise = f"{noise:g}{'*' if noise in (choice[0], choice[-1]) else ''}"
        columns = [[one[key] for one in runs] for key in ("clean", "calibration_error", "under_noise")]
        columns += [[one["robust"][radius] for one in runs] for radius in radii]
        columns.append([next(iter(one["after"][last].values())) for one in runs])
        cells = [LOSSES[name][0], setting, noise, str(len(runs))]
        step = steps[(noisy, name, *key)]
        cells.append(f"{step['ratio']:.2f} ({step['spread'][0]:.2f} to {step['spread'][1]:.2f})")
        cells += map(shared.spread, columns)
        cells[-2] = f"**{cells[-2]}**"
        gain = shared.difference(runs, base, lambda one: one["robust"][last])
        cells.append(f"{gain} {shared.over_images(runs, base, lambda one: one['withstood'][last])}".strip())
        warned = collections.Counter(check for one in runs for check in one["warnings"][last])
        cells.append(", ".join(f"{check}: {count}" for check, count in warned.items()))
        lines.append(f"| {' | '.join(cells)} |")
    chosen_by = [one for one in done if one["split"] == "validation" and one["attacks"] == [*ATTACKS]]
    lines += short_table(
        f"Choice: worst case of {' and '.join(ATTACKS)} at {last} on validation images", chosen_by, last
    )
    others = [one for one in done if one["split"] == "test" and one not in tested]
    lines += short_table(
        f"Test runs of settings that were chosen by an earlier way of choosing, at {last}", others, last
    )
    lines += ["", f"Written by `{measure.command(args, 'compare_losses')}`.", ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))
    if not study["redrawn"]:
        plot(rows, last, path.with_suffix(".png"), args)


def short_table(title, runs, radius):
    """The lines of a section: clean and robust accuracy of each loss, setting and noise. None without runs."""
    groups = {}
    for one in runs:
        groups.setdefault((one["loss"], tuple(one["setting"].items()), one["noise"]), []).append(one)
    lines = ["", f"## {title}", "", "| loss | setting | training noise | seeds | clean | robust |", "|---" * 6 + "|"]
    for (name, setting, noise), some in sorted(groups.items()):
        cells = [LOSSES[name][0], ", ".join(f"{key} {value:.3g}" for key, value in setting), f"{noise:g}"]
        cells += [str(len(some)), shared.spread([one["clean"] for one in some])]
        lines.append(f"| {' | '.join(cells)} | {shared.spread([one['robust'][radius] for one in some])} |")
    return lines if runs else []


def at_end(name, key, value):
    """A star for the smallest and the largest value that a loss could choose from, unless there is nothing beyond."""
    values = {setting[key] for setting in LOSSES[name][1]}
    return "*" if len(values) > 1 and 0 < value in (min(values), max(values)) else ""


def plot(rows, radius, path, args):
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for noisy in (False, True):
        for place, name in enumerate(LOSSES):
            runs = next((runs for key, runs in rows.items() if key[:2] == (noisy, name)), [])
            values = 100 * np.array([one["robust"][radius] for one in runs])
            if len(values) == 0:
                continue
            at = place + (0.2 if noisy else -0.2)
            label = ("with its own best noise" if noisy else "without noise") if place == 0 else None
            axes.barh(at, values.mean(), 0.38, color=f"C{int(noisy)}", alpha=0.6, label=label)
            axes.plot(values, [at] * len(values), "k.", ms=3)
    axes.set_yticks(range(len(LOSSES)), [name for name, _ in LOSSES.values()])
    axes.invert_yaxis()
    axes.set(xlabel="robust accuracy (%)", title=f"{args.dataset}, eps {radius}, suite standard; a dot a seed")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
