"""Does DRSLoss with noise give larger certified radii than cross-entropy with the same noise?

A job trains a small CNN on images with Gaussian noise, by a loss, and certifies 200 test images with the same noise. It
appends a line to `OUT/certificates_DATASET.jsonl`. Jobs with a line there are not run again. When none is left, the
table is written beside it. Nothing is chosen: `lam` is 0.03, the best with noise in `studies.compare_losses`, and 0.3.

    python -m studies.certificates --dataset digits --out results
    python -m studies.certificates --dataset mnist --out results

Two processes share the work with `--worker 0/2` and `--worker 1/2`. On two cores: an hour for digits, two for MNIST.
"""

import time

from benchmarks import measure
from studies import runner
from studies.records import versions
from studies.runner import difference, half_width_over_images, spread_percent

LAMS = (None, 0.03, 0.3)  # None for cross-entropy
STUDIES = {
    "digits": {"sigmas": (0.12, 0.25, 0.5), "seeds": 5, "images": 200, "draws": 10_000, "recipe": {"epochs": 80}},
    "mnist": {"sigmas": (0.12, 0.25, 0.5), "seeds": 3, "images": 200, "draws": 10_000, "recipe": {"epochs": 6}},
}


def main(arguments=None, run=None):
    """Run the study; `run` replaces the training and certification of a job in tests."""
    run = run or run_job
    args = measure.parse_arguments(__doc__, arguments, data_dir=True, more=runner.add_arguments_of(STUDIES))
    from studies import recipes

    study = STUDIES[args.dataset]
    study = study | {"recipe": recipes.PLAIN[args.dataset] | study["recipe"]}
    if args.quick:
        study |= {"sigmas": study["sigmas"][:1], "seeds": 2, "images": 16, "draws": 100}
        study["recipe"] |= {"epochs": 1}
    path, data = runner.open_study(args, "certificates")
    jobs = [
        {"sigma": sigma, "lam": lam, "seed": seed}
        for seed in range(study["seeds"])
        for sigma in study["sigmas"]
        for lam in LAMS
    ]
    runner.run_jobs(args, jobs, lambda: runner.read_records(path), lambda job: run(job, study, data, path, args))
    if runner.is_first_worker(args):
        write_summary(path, study, args)


def run_job(job, study, data, path, args):
    """Train the model of a job, certify test images, and append the record."""
    import keras

    import keras_drsl
    from studies import networks, recipes

    print(args.dataset, job, flush=True)
    recipe, (training, (x, y)) = study["recipe"], data
    keras.utils.set_random_seed(job["seed"])
    model = networks.small_cnn(x.shape[1:], job["sigma"])
    model.compile("adam", recipes.make_loss("ce" if job["lam"] is None else "drs", job["lam"]))
    model.fit(*training, batch_size=recipe["batch_size"], epochs=recipe["epochs"], verbose=0)
    began = time.perf_counter()
    report = keras_drsl.certify(
        model, x, y, sigma=job["sigma"], draws=study["draws"], max_samples=study["images"], seed=job["seed"], verbose=0
    )
    record = job | {
        "radii": [round(float(radius), 5) for radius in report.radii],
        "abstentions": report.abstentions,
        "draws_used": round(report.draws_used, 4),
        "settings": {name: report.settings[name] for name in ("draws", "selection_draws", "alpha")},
        "recipe": recipe,
        "seconds_of_certification": round(time.perf_counter() - began, 1),
        "command": measure.command(args, "studies.certificates"),
        "device": args.device_name,
        "versions": versions(),
    }
    runner.append_record(path, record)


def write_summary(path, study, args):
    """Write the table."""
    import numpy as np

    done = runner.read_records(path)
    lines = [
        f"# {args.dataset}: certified radii",
        "",
        f"From `{path.name}`, which holds each run. {len(done[0]['radii'])} test images, {study['draws']} draws each, "
        "L2. Certified accuracy in %, mean +- standard deviation over the seeds. Difference: of the mean radius to "
        "that of cross-entropy, in % of sigma, seed by seed, with the 95 % interval over seeds (Student's t), then the "
        "half-width over images. Draws: the share of the draws that were made before an image was decided.",
        "",
        "| sigma | loss | lam | seeds | right | radius 0.5 sigma | radius sigma | radius 2 sigma | "
        "mean radius / sigma | difference | over images | abstains | draws |",
        "|---" * 13 + "|",
    ]
    for sigma in study["sigmas"]:
        plain = [run for run in done if run["sigma"] == sigma and run["lam"] is None]
        for lam in LAMS:
            runs = [run for run in done if run["sigma"] == sigma and run["lam"] == lam]
            radii = [np.array(run["radii"]) / sigma for run in runs]
            cells = [f"{sigma:g}", "cross-entropy" if lam is None else "DRSLoss", "" if lam is None else f"{lam:g}"]
            cells.append(str(len(runs)))
            cells += [spread_percent([(some > least).mean() for some in radii]) for least in (0, 0.5, 1, 2)]
            cells.append(f"{np.mean([some.mean() for some in radii]):.3f}")
            base = [] if lam is None else plain
            cells.append(difference(runs, base, lambda run, sigma=sigma: np.mean(run["radii"]) / sigma))
            cells.append(half_width_over_images(runs, base, lambda run, sigma=sigma: np.array(run["radii"]) / sigma))
            cells.append(spread_percent([run["abstentions"] / len(run["radii"]) for run in runs]))
            cells.append(spread_percent([run["draws_used"] for run in runs]))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Written by `{measure.command(args, 'studies.certificates')}`.", ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
