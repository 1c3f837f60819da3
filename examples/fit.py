"""Train with cross-entropy and with DRSLoss, with and without noise on the inputs, and attack all four models.

It shows that changing the loss in `model.compile` makes a classifier harder to attack, that noise on the inputs during
training does too, and that the two effects add up. The models are attacked by three attacks of cleverhans. Beside their
worst case, the table has the robust accuracy by `keras_drsl.evaluate_robustness`, whose attack is stronger.

Expected: one row per model. At `--eps`, the worst case is clearly higher for DRSLoss, at the same clean accuracy and
training time. Weak attacks show a larger gap than strong ones: believe the worst case.

On two cores: about six minutes for scikit-learn's digits (1,797 images, no download). MNIST and CIFAR-10 are loaded
by tensorflow-datasets and take longer.

    python examples/fit.py
    python examples/fit.py --dataset mnist --epochs 4 --eps 0.1 --seeds 1
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_drsl
from keras_drsl import datasets
from keras_drsl.attacks import cleverhans
from keras_drsl.models import Classifier
from keras_drsl.plotting import loss_color, new_figure

# Noise is the standard deviation, eps the radius of the attacks, both in units of the input range [0, 1].
DEFAULTS = {
    "digits": {"epochs": 30, "batch_size": 64, "eps": 0.15, "noise": 0.15},
    "mnist": {"epochs": 4, "batch_size": 128, "eps": 0.1, "noise": 0.3},
    "cifar10": {"epochs": 10, "batch_size": 128, "eps": 2 / 255, "noise": 0.05},
}
STEPS, RESTARTS = 20, 5  # of PGD: more restarts find more on these models than more steps do
# The attack of the suite "standard" that finds the most, with 30 steps in place of 100: it finds nearly as much.
APGD = {"loss": "margin", "targeted": True, "steps": 30}
CURVE = (0, 1 / 3, 2 / 3, 1, 4 / 3)  # the radii of the picture, in units of --eps
LOSSES = {"ce": "cross-entropy", "drs": "DRSLoss"}
COLUMNS = {
    "clean": "clean accuracy",
    "diversity": "diversity",
    "fgm": "fast gradient",
    "pgd_ce": "PGD on CE",
    "pgd_margin": "PGD on margin",
    "worst_case": "worst case",
    "apgd": "APGD, seed 0",
    "epoch_seconds": "s per epoch",
}


def main(arguments=None):
    args = parse_arguments(arguments)
    stem = Path(args.out) / f"fit_{args.dataset}"
    if stem.with_suffix(".json").exists() and not args.overwrite:
        sys.exit(f"{stem}.json exists. Give another --out, or --overwrite to replace it.")
    try:
        train, test = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    test = tuple(values[: args.max_images] for values in test)
    (stem.parent / "models").mkdir(parents=True, exist_ok=True)

    # One model holds the weights of each trained model in turn, so that the attacks are compiled only once.
    attacked = build_model(train[0].shape[1:], noise=0)
    logits = Classifier(keras.Model(attacked.inputs[0], attacked.get_layer("logits").output))
    rows, reports = [], {}
    for noise in dict.fromkeys((0.0, args.noise)):
        for loss in LOSSES:
            data, models = (train, test), (attacked, logits)
            runs = [run(loss, noise, seed, data, models, reports, args) for seed in range(args.seeds)]
            rows.append({"loss": loss, "noise": noise, "runs": runs})
    table = make_table(rows, args, len(test[0]))
    print("\n" + table)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "data_dir", "overwrite")}
    versions = {package: version(package) for package in ("keras-drsl", "keras", "tensorflow", "cleverhans", "numpy")}
    record = {"command": command(settings), "settings": settings, "versions": versions, "rows": rows}
    stem.with_suffix(".md").write_text(table)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    plot(rows, args, stem)
    page = write_page(reports, stem.parent / "report.html")
    print(f"Written: {stem}.md, .json, .png, {stem}_rivals.png, {page} and the models in {stem.parent / 'models'}")


def run(loss, noise, seed, data, attacked, reports, args):
    """Train one model, save it, attack it, and return its figures. The first seed's report goes to `reports`."""
    print(f"\n{args.dataset}: {LOSSES[loss]}, noise {noise:g}, seed {seed}", flush=True)
    train, test = data
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1:], noise)
    model.compile(
        optimizer="adam",
        loss=keras_drsl.DRSLoss(lam=args.lam) if loss == "drs" else "sparse_categorical_crossentropy",
        metrics=["accuracy", keras_drsl.SoftmaxDiversity()],
    )
    ends = [time.perf_counter()]
    timer = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()))
    model.fit(*train, epochs=args.epochs, batch_size=args.batch_size, callbacks=[timer], verbose=0)
    model.save(Path(args.out) / "models" / f"fit_{args.dataset}_{loss}_noise{noise:g}_seed{seed}.keras")

    clean = model.evaluate(*test, verbose=0, return_dict=True)
    attacked[0].set_weights(model.get_weights())
    figures = {
        "seed": seed,
        "clean": clean["accuracy"],
        "diversity": clean["softmax_diversity"],
        "epoch_seconds": float(np.median(np.diff(ends))),
        **attack(attacked[1], *test, args.eps, seed),
    }
    if seed == 0:
        name = label({"loss": loss}, args) + (f", noise {noise:g}" if noise else "")
        reports[name] = report, curve = evaluate(model, *test, args.eps)
        figures |= {
            "apgd": report.robust_accuracy,
            "curve": [list(point) for point in zip(curve.eps, curve.accuracy, strict=True)],
            "rivals": sorted_wrong_classes(model, *test),
        }
    print({name: round(value, 3) for name, value in figures.items() if name in COLUMNS}, flush=True)
    return figures


def attack(classifier, x, y, eps, seed):
    """Return the accuracy under each attack of cleverhans, and in the worst case.

    An image that is misclassified without an attack counts as broken.
    """
    options = {"steps": STEPS, "restarts": RESTARTS, "seed": seed}
    attacks = {
        "fgm": cleverhans.FastGradientMethod(eps),
        "pgd_ce": cleverhans.ProjectedGradientDescent(eps, loss="ce", **options),
        "pgd_margin": cleverhans.ProjectedGradientDescent(eps, loss="margin", **options),
    }
    batches = [slice(start, start + 500) for start in range(0, len(x), 500)]
    withstood = {}
    for name, run_attack in attacks.items():
        logits = [classifier.logits(run_attack(classifier, x[batch], y[batch])) for batch in batches]
        withstood[name] = np.concatenate(logits).argmax(1) == y
    worst_case = np.all(list(withstood.values()), axis=0)
    return {name: float(images.mean()) for name, images in {**withstood, "worst_case": worst_case}.items()}


def evaluate(model, x, y, eps):
    """Return a report by the package's own attacks, and a curve over eps."""
    apgd = keras_drsl.attacks.APGD(eps, **APGD)
    report = keras_drsl.evaluate_robustness(
        model, x, y, eps=eps, attacks=[apgd], checks="quick", keep_examples=True, verbose=0
    )
    print(report, flush=True)
    radii = [factor * eps for factor in CURVE]
    return report, keras_drsl.robustness_curve(model, x, y, eps=radii, suite="quick", checks=[], verbose=0)


def sorted_wrong_classes(model, x, y):
    """Return the mean log-softmax values of the wrong classes of an image, the largest first."""
    p = model.predict(x, batch_size=500, verbose=0).astype("float64")
    wrong = np.log(np.maximum(p, 1e-30))[np.arange(p.shape[1]) != y[:, None]].reshape(len(y), -1)
    return (-np.sort(-wrong, axis=1)).mean(axis=0).tolist()


def write_page(reports, path):
    """Write a page about the last model, compared with the others, and return its path."""
    *others, (name, (report, curve)) = reports.items()
    comparisons = [keras_drsl.compare(report, other, names=(name, rival)) for rival, (other, _) in others]
    report.to_html(path, title=name, curve=curve, comparison=comparisons)
    return path


def build_model(shape, noise):
    """Return two convolutions and two dense layers; small images are pooled only once."""
    # Each layer draws a seed when it is made: the noise comes first, as in the published runs.
    inputs = [keras.Input(shape), *([layers.GaussianNoise(noise)] if noise else [])]
    pools = (2, 2) if shape[0] > 16 else (1, 2)
    convolutions = [
        layer
        for filters, pool in zip((32, 64), pools, strict=True)
        for layer in (layers.Conv2D(filters, 3, padding="same", activation="relu"), layers.MaxPooling2D(pool))
    ]
    head = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10, name="logits"), layers.Softmax()]
    return keras.Sequential([*inputs, *convolutions, *head])


def make_table(rows, args, count):
    """Return a Markdown table: the mean and, over several seeds, the standard deviation."""
    lines = [
        f"{args.dataset}: L∞ attacks at eps {args.eps:.4g} on {count} test images, accuracy in %, mean +- standard "
        f"deviation of {args.seeds} seed(s), {args.epochs} epochs",
        "",
        f"| loss | noise | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = [label(row, args), f"{row['noise']:g}"]
        for column in COLUMNS:
            values = np.array([figures[column] for figures in row["runs"] if column in figures])
            scale, digits = (1, 2) if column in ("diversity", "epoch_seconds") else (100, 1)
            spread = f" +- {scale * values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{scale * values.mean():.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def label(row, args):
    return LOSSES[row["loss"]] + (f", lam {args.lam:g}" if row["loss"] == "drs" else "")


def plot(rows, args, stem):
    """Draw two pictures of the first seed: accuracy against eps, and the wrong classes."""
    pictures = {
        "": ("curve", "eps (L∞)", "accuracy under the quick suite (%)"),
        "_rivals": ("rivals", "wrong classes of an image, the likeliest first", "mean log-softmax value"),
    }
    for suffix, (key, x_label, y_label) in pictures.items():
        figure, axes = new_figure()
        for row in rows:
            points = row["runs"][0][key]
            x, y = np.transpose(points) * [[1], [100]] if key == "curve" else (range(1, len(points) + 1), points)
            noise = f", noise {row['noise']:g}" if row["noise"] else ""
            style = {"color": loss_color(label(row, args)), "linestyle": "-" if noise else "--"}
            axes.plot(x, y, marker="o", label=label(row, args) + noise, **style)
        axes.set(xlabel=x_label, ylabel=y_label, title=f"{args.dataset}, first seed")
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(f"{stem}{suffix}.png", dpi=150)


def command(settings):
    words = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return " ".join(["python examples/fit.py", *words])


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DEFAULTS, default="digits")
    parser.add_argument("--lam", type=float, default=0.3, help="the strength of the restraint of DRSLoss")
    parser.add_argument("--noise", type=float, help="standard deviation of the noise during training; 0: none")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--eps", type=float, help="radius of the attacks, L∞, for inputs in [0, 1]")
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each kind")
    parser.add_argument("--max-images", type=int, default=1000, help="how many test images to attack")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--out", default="runs", help="folder for the table, the pictures and the models")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    rules = {
        "lam": ("not be negative", 0 <= args.lam < float("inf")),
        "noise": ("lie in [0, 1]", 0 <= args.noise <= 1),
        "eps": ("lie in (0, 1]", 0 < args.eps <= 1),
    }
    counts = ("epochs", "batch_size", "seeds", "max_images")
    rules |= {name: ("be positive", getattr(args, name) > 0) for name in counts}
    for name, (rule, holds) in rules.items():
        if not holds:
            parser.error(f"--{name.replace('_', '-')} must {rule}. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
