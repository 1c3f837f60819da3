"""Measure what DRSLoss, noise and Density-Softmax do under shift: accuracy, calibration and likelihood.

A job trains the models of a seed and measures each on shifted test images: noise, blur, rotation and contrast at five
strengths, and the common corruptions of `keras_drsl.evaluate_corruptions`, relative to cross-entropy. It also attacks
Density-Softmax and the model inside: their verdicts must be equal. It appends a line to `OUT/shift_DATASET.jsonl`.
Jobs with a line there are not run again. When none is left, the table is written beside it. Nothing is chosen.

    python -m studies.shift --dataset digits --out results
    python -m studies.shift --dataset mnist --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`. On two cores: half an hour for digits, an hour for
MNIST.
"""

from benchmarks import measure
from studies import runner
from studies.records import spread, versions
from studies.runner import difference, spread_percent

# The loss and its lam, the noise on the inputs, and whether the density follows.
TRAININGS = {
    "cross-entropy": ("ce", None, 0.0, False),
    "DRSLoss, lam 0.3": ("drs", 0.3, 0.0, False),
    "DRSLoss, lam 3": ("drs", 3.0, 0.0, False),
    "cross-entropy, noise 0.3": ("ce", None, 0.3, False),
    "DRSLoss, lam 0.03, noise 0.3": ("drs", 0.03, 0.3, False),
    "Density-Softmax": ("ce", None, 0.0, True),
}
# Blur is in shares of the height.
SHIFTS = {
    "noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "blur": (0.02, 0.04, 0.06, 0.08, 0.1),
    "rotation": (10, 20, 30, 40, 50),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
}
STUDIES = {
    "digits": {"seeds": 5, "images": 360, "recipe": {"epochs": 80}},
    "mnist": {"seeds": 3, "images": 500, "recipe": {"epochs": 6}},
}


def main(arguments=None, run=None):
    """Run the study; `run` replaces the training and measurement of a job in tests."""
    run = run or run_job
    args = measure.parse_arguments(__doc__, arguments, data_dir=True, more=runner.add_arguments_of(STUDIES))
    from studies import recipes

    study = STUDIES[args.dataset]
    study = study | {"recipe": recipes.PLAIN[args.dataset] | study["recipe"]}
    if args.quick:
        study |= {"seeds": 2, "images": 16}
        study["recipe"] |= {"epochs": 1}
    path, data = runner.open_study(args, "shift")
    jobs = [{"seed": seed} for seed in range(study["seeds"])]
    runner.run_jobs(args, jobs, lambda: runner.read_records(path), lambda job: run(job, study, data, path, args))
    if runner.is_first_worker(args):
        write_summary(path, args)


def shifted(images, name, strength, seed):
    """Return images in [0, 1], shape `(count, height, width, channels)`, with a shift."""
    import numpy as np
    from scipy import ndimage

    if name == "noise":
        images = images + strength * np.random.default_rng(seed).standard_normal(images.shape)
    elif name == "blur":
        sigma = strength * images.shape[1]
        images = ndimage.gaussian_filter(images, (0, sigma, sigma, 0))
    elif name == "rotation":
        images = ndimage.rotate(images, strength, axes=(2, 1), reshape=False, order=1)
    else:
        mean = images.mean(axis=(1, 2), keepdims=True)
        images = mean + strength * (images - mean)
    return np.clip(images, 0, 1).astype("float32")


def run_job(job, study, data, path, args):
    """Train the models of a seed, measure them, and append the record."""
    import keras_drsl

    print(args.dataset, job, flush=True)
    x, y = (part[: study["images"]] for part in data[1])
    models, rows = {}, {}
    for name in TRAININGS:
        print(name, flush=True)
        models[name] = train(name, data[0], study["recipe"], job["seed"])
        report = keras_drsl.evaluate_corruptions(
            models[name], x, y, baseline=models["cross-entropy"], seed=job["seed"], verbose=0
        )
        rows[name] = {
            "clean": quality(models[name], x, y),
            "shifts": {
                shift: [quality(models[name], shifted(x, shift, strength, job["seed"]), y) for strength in strengths]
                for shift, strengths in SHIFTS.items()
            },
            "corruptions": {
                "mean_error": report.mean_error,
                "mean_calibration_error": report.mean_calibration_error,
                "relative_error": report.relative_error,
                "accuracy": {key: [row["accuracy"] for row in found] for key, found in report.results.items()},
                "skipped": sorted(report.skipped),
            },
        }
    record = job | {
        "rows": rows,
        "control": control(models["Density-Softmax"], x, y, study, args),
        "images": len(x),
        "recipe": study["recipe"],
        "command": measure.command(args, "studies.shift"),
        "device": args.device_name,
        "versions": versions(("scikit-image", "scipy", "albumentations")),
    }
    runner.append_record(path, record)


def train(name, data, recipe, seed):
    """Return the model of a training, which returns logits."""
    import keras

    from keras_drsl.density import DensitySoftmax
    from studies import networks, recipes

    loss, lam, noise, has_density = TRAININGS[name]
    keras.utils.set_random_seed(seed)
    model = networks.small_cnn(data[0].shape[1:], noise)
    model = DensitySoftmax(model) if has_density else model
    model.compile("adam", recipes.make_loss(loss, lam))
    model.fit(*data, batch_size=recipe["batch_size"], epochs=recipe["epochs"], verbose=0)
    return model


def quality(model, x, y):
    """Return the accuracy, the expected calibration error and the mean negative log-likelihood."""
    import numpy as np
    from scipy.special import log_softmax

    from keras_drsl.evaluation.corruptions import calibration_error

    log_p = log_softmax(model.predict(x, batch_size=256, verbose=0).astype("float64"), axis=1)
    are_right = log_p.argmax(axis=1) == y
    return {
        "accuracy": float(are_right.mean()),
        "calibration_error": calibration_error(np.exp(log_p.max(axis=1)), are_right),
        "nll": float(-log_p[np.arange(len(y)), y].mean()),
    }


def control(density, x, y, study, args):
    """Return on how many images the verdicts of Density-Softmax and of the model inside differ."""
    import keras_drsl

    how = {"eps": study["recipe"]["eps"], "verbose": 0, "suite": "quick" if args.quick else "standard"}
    reports = [keras_drsl.evaluate_robustness(model, x, y, **how) for model in (density, density.model)]
    one, other = (runner.withstood(report) for report in reports)
    return {
        "eps": study["recipe"]["eps"],
        "robust": [report.robust_accuracy for report in reports],
        "verdicts_that_differ": sum(a != b for a, b in zip(one, other, strict=True)),
    }


def write_summary(path, args):
    """Write the tables."""
    import numpy as np

    done = runner.read_records(path)
    controls = [run["control"] for run in done]
    lines = [
        f"# {args.dataset}: shift",
        "",
        f"From `{path.name}`, which holds each run. {done[0]['images']} test images, {len(done)} seeds. Accuracy and "
        "expected calibration error (ECE) in %, negative log-likelihood (NLL) in nats: mean +- standard deviation over "
        "the seeds, each the mean over five strengths. Difference: of the accuracy over all four shifts to that of "
        "cross-entropy, with the 95 % interval over seeds (Student's t).",
        "",
        "| training | clean | noise | blur | rotation | contrast | difference | ECE, clean | ECE, shifts | "
        "NLL, clean | NLL, shifts |",
        "|---" * 11 + "|",
    ]

    def mean(run, name, key):
        return float(np.mean([row[key] for rows in run["rows"][name]["shifts"].values() for row in rows]))

    for name in TRAININGS:
        runs = [run["rows"][name] for run in done]
        cells = [name, spread_percent([run["clean"]["accuracy"] for run in runs])]
        for shift in SHIFTS:
            cells.append(spread_percent([np.mean([row["accuracy"] for row in run["shifts"][shift]]) for run in runs]))
        accuracy = {
            who: [{"seed": run["seed"], "robust": mean(run, who, "accuracy")} for run in done]
            for who in ("cross-entropy", name)
        }
        cells.append("" if name == "cross-entropy" else difference(accuracy[name], accuracy["cross-entropy"]))
        cells.append(spread_percent([run["clean"]["calibration_error"] for run in runs]))
        cells.append(spread_percent([mean(run, name, "calibration_error") for run in done]))
        cells.append(spread([run["clean"]["nll"] for run in runs], 2))
        cells.append(spread([mean(run, name, "nll") for run in done], 2))
        lines.append(f"| {' | '.join(cells)} |")
    skipped = done[0]["rows"]["cross-entropy"]["corruptions"]["skipped"]
    lines += [
        "",
        f"Common corruptions, {len(done[0]['rows']['cross-entropy']['corruptions']['accuracy'])} of 15, without "
        f"{', '.join(skipped)}. Relative: the mean corruption error over that of cross-entropy; below 1 is better.",
        "",
        "| training | mean error | ECE | relative |",
        "|---|---|---|---|",
    ]
    for name in TRAININGS:
        runs = [run["rows"][name]["corruptions"] for run in done]
        cells = [name] + [
            spread_percent([run[key] for run in runs]) for key in ("mean_error", "mean_calibration_error")
        ]
        cells.append(spread([run["relative_error"] for run in runs], 2))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Suite standard on Density-Softmax and on the model inside, eps {controls[0]['eps']:g}: verdicts that differ, "
        f"by seed: {', '.join(str(found['verdicts_that_differ']) for found in controls)}; robust accuracy "
        f"{spread_percent([found['robust'][0] for found in controls])} and "
        f"{spread_percent([found['robust'][1] for found in controls])} %.",
        "",
        f"Written by `{measure.command(args, 'studies.shift')}`.",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
