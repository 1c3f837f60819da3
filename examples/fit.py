"""Train with cross-entropy and with DRSLoss, with and without noise on the inputs, and attack all four models.

What it shows: changing the loss in `model.compile` makes a classifier harder to attack, noise on the inputs while
training does too, and the two add up.

What you should see: a table with one row a model. At the given `--eps`, the worst case of three cleverhans attacks is
clearly higher for DRSLoss, at the same clean accuracy and training time. The weaker the attack, the larger the gap
looks: believe the worst case.

How long: about four minutes on two cores for the default, scikit-learn's digits (1,797 images, no download). MNIST
and CIFAR-10 come through tensorflow-datasets and take longer.

    python examples/fit.py
    python examples/fit.py --dataset mnist --epochs 4 --eps 0.1 --seeds 1
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import keras
import numpy as np
import records

import keras_drsl
from keras_drsl.attacks import cleverhans
from keras_drsl.evaluation import datasets

# What the arguments default to: the noise's standard deviation and the attack's radius are in units of the input range.
DEFAULTS = {
    "digits": {"epochs": 30, "batch_size": 64, "eps": 0.15, "noise": 0.15},
    "mnist": {"epochs": 4, "batch_size": 128, "eps": 0.1, "noise": 0.3},
    "cifar10": {"epochs": 10, "batch_size": 128, "eps": 2 / 255, "noise": 0.05},
}
# On these models more starts find more than more steps do.
STEPS, RESTARTS, CURVE_RESTARTS = 20, 10, 2
CURVE = (1 / 3, 2 / 3, 1, 4 / 3)  # the radii of the figure, in units of --eps
COLUMNS = {
    "clean": "clean accuracy",
    "diversity": "diversity",
    "fgm": "fast gradient",
    "pgd_ce": "PGD on CE",
    "pgd_margin": "PGD on margin",
    "worst_case": "worst case",
    "epoch_seconds": "s an epoch",
}


def main():
    args = parse_arguments()
    out = prepare_output(args)
    try:
        train, test = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    test = tuple(values[: args.max_images] for values in test)

    rows = []
    for noise in dict.fromkeys((0.0, args.noise)):
        for loss in ("ce", "drs") if args.loss == "both" else (args.loss,):
            runs = [fit_and_attack(loss, noise, seed, train, test, args, out) for seed in range(args.seeds)]
            rows.append({"loss": loss, "noise": noise, "runs": runs})

    table = make_table(rows, args, len(test[0]))
    print(table)
    stem = out / f"fit_{args.dataset}"
    stem.with_suffix(".md").write_text(table)
    stem.with_suffix(".json").write_text(json.dumps(describe(args, len(test[0])) | {"rows": rows}, indent=1))
    plot(rows, args, stem)
    print(f"Written: {stem}.md, .json, .png, {stem}_rivals.png and the models in {out / 'models'}")


def fit_and_attack(loss, noise, seed, train, test, args, out):
    """Train one model, save it, attack it; returns its row for one seed."""
    print(f"\n{args.dataset}: loss={loss} noise={noise:g} seed={seed}")
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1:], noise)
    model.compile(
        optimizer="adam",
        loss=keras_drsl.DRSLoss(lam=args.lam) if loss == "drs" else "sparse_categorical_crossentropy",
        metrics=["accuracy", keras_drsl.SoftmaxDiversity()],
    )
    timer = EpochTimer()
    model.fit(*train, epochs=args.epochs, batch_size=args.batch_size, callbacks=[timer])
    model.save(out / "models" / f"fit_{args.dataset}_{loss}_noise{noise:g}_seed{seed}.keras")

    logits_model = keras.Model(model.inputs[0], model.get_layer("logits").output)
    clean = model.evaluate(*test, verbose=0, return_dict=True)
    accuracy, _ = attack(logits_model, *test, args.eps, restarts=RESTARTS, seed=seed)
    row = {
        "seed": seed,
        "clean": clean["accuracy"],
        "diversity": clean["softmax_diversity"],
        "epoch_seconds": float(np.median(timer.seconds)),
        **accuracy,
    }
    if seed == 0:
        row["curve"] = robustness_curve(logits_model, *test, args.eps)
        row["rivals"] = sorted_rivals(logits_model, *test)
    return row


class EpochTimer(keras.callbacks.Callback):
    """Wall-clock seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def build_model(shape, noise):
    """A small CNN with a softmax head and a named layer of logits, for the attacks."""
    pools = [2, 2] if shape[0] > 16 else [1, 2]
    layers = [keras.Input(shape)]
    if noise > 0:
        layers.append(keras.layers.GaussianNoise(noise))
    for filters, pool in zip((32, 64), pools, strict=True):
        layers += [keras.layers.Conv2D(filters, 3, padding="same", activation="relu"), keras.layers.MaxPooling2D(pool)]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(10, name="logits"),
        keras.layers.Softmax(),
    ]
    return keras.Sequential(layers)


def attack(logits_model, x, y, eps, *, restarts, seed=0):
    """Accuracy under each attack and in the worst case, and which images withstand all.

    An image the model gets wrong without an attack counts as broken.
    """
    knobs = {"steps": STEPS, "restarts": restarts, "seed": seed}
    attacks = {
        "fgm": cleverhans.FastGradientMethod(eps),
        "pgd_ce": cleverhans.ProjectedGradientDescent(eps, loss="ce", **knobs),
        "pgd_margin": cleverhans.ProjectedGradientDescent(eps, loss="margin", **knobs),
    }
    right = is_right(logits_model, x, y)
    worst_case = right.copy()
    accuracy = {}
    for name, one in attacks.items():
        withstood = right.copy()
        for start in range(0, len(x), 500):
            batch = slice(start, start + 500)
            x_adv = one(logits_model, x[batch], y[batch])
            if np.abs(x_adv - x[batch]).max() > eps + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
                raise AssertionError(f"{name} left the ball of radius {eps} or the range [0, 1]")
            withstood[batch] &= is_right(logits_model, x_adv, y[batch])
        accuracy[name] = float(withstood.mean())
        worst_case &= withstood
    return accuracy | {"worst_case": float(worst_case.mean())}, worst_case


def is_right(logits_model, x, y):
    batches = [logits_model.predict_on_batch(x[start : start + 500]) for start in range(0, len(x), 500)]
    return np.concatenate(batches).argmax(axis=-1) == y


def robustness_curve(logits_model, x, y, eps):
    """Worst-case accuracy against the radius of the attack; what a smaller radius broke stays broken."""
    standing = is_right(logits_model, x, y)
    curve = [[0.0, float(standing.mean())]]
    for factor in CURVE:
        if standing.any():
            _, withstood = attack(logits_model, x[standing], y[standing], factor * eps, restarts=CURVE_RESTARTS)
            standing[standing] = withstood
        curve.append([factor * eps, float(standing.mean())])
    return curve


def sorted_rivals(logits_model, x, y):
    """The log-softmax values of the non-true classes, largest first, averaged over the images."""
    logits = logits_model.predict(x, batch_size=500, verbose=0).astype("float64")
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= logits.max(1, keepdims=True)
    rivals = log_p[np.arange(10) != y[:, None]].reshape(len(y), 9)
    return (-np.sort(-rivals, axis=1)).mean(axis=0).tolist()


def make_table(rows, args, count):
    """A Markdown table: mean and, over several seeds, standard deviation."""
    lines = [
        f"{args.dataset}: L-inf attacks at eps {args.eps:.4g} on {count} test images, accuracy in %, mean +- standard "
        f"deviation of {args.seeds} seed(s), {args.epochs} epochs",
        "",
        "| loss | noise | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = []
        for column in COLUMNS:
            values = np.array([run[column] for run in row["runs"]])
            values = values if column in ("diversity", "epoch_seconds") else 100 * values
            digits = 2 if column in ("diversity", "epoch_seconds") else 1
            cells.append(records.spread(values, digits))
        lines.append(f"| {label(row, args, noise=False)} | {row['noise']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def label(row, args, *, noise=True):
    name = f"DRSLoss, lam {args.lam:g}" if row["loss"] == "drs" else "cross-entropy"
    return name + (f", noise {row['noise']:g}" if noise and row["noise"] else "")


def plot(rows, args, stem):
    """Two figures of the first seed: accuracy against eps, and what the loss does to the non-true classes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def draw(path, key, x_label, y_label):
        figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        for row in rows:
            points = row["runs"][0][key]
            x, y = zip(*points, strict=True) if key == "curve" else (range(1, 10), points)
            style = {"color": "C0" if row["loss"] == "drs" else "C1", "ls": "-" if row["noise"] else "--"}
            axes.plot(x, np.multiply(y, 100) if key == "curve" else y, "o", label=label(row, args), **style)
        axes.set(xlabel=x_label, ylabel=y_label, title=f"{args.dataset}, seed 0")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)

    draw(f"{stem}.png", "curve", "eps (L-inf)", "worst-case accuracy (%)")
    draw(f"{stem}_rivals.png", "rivals", "non-true classes, largest first", "mean log-softmax")


def describe(args, count):
    """What a reader needs to run it again: the command, the settings, the versions."""
    settings = {name: value for name, value in vars(args).items() if name not in records.ELSEWHERE}
    return {
        "command": records.command("examples/fit.py", args),
        "settings": settings
        | {"steps": STEPS, "restarts": RESTARTS, "curve_restarts": CURVE_RESTARTS, "attacked_images": count},
        "versions": records.versions(["cleverhans"]),
        "machine": platform.machine(),
    }


def prepare_output(args):
    """The output folder, checked before the training rather than after it."""
    out = Path(args.out)
    if (out / f"fit_{args.dataset}.json").exists() and not args.overwrite:
        sys.exit(f"{out / f'fit_{args.dataset}.json'} exists. Give another --out, or --overwrite to replace it.")
    (out / "models").mkdir(parents=True, exist_ok=True)
    return out


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DEFAULTS, default="digits")
    parser.add_argument("--loss", choices=("ce", "drs", "both"), default="both")
    parser.add_argument("--lam", type=float, default=0.3, help="the strength of DRSLoss's restraint")
    parser.add_argument("--noise", type=float, help="standard deviation of the noise in training; 0: none")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--eps", type=float, help="radius of the attacks, L-inf, the input range being [0, 1]")
    parser.add_argument("--seeds", type=int, default=3, help="how many times to train each model")
    parser.add_argument("--max-images", type=int, default=1000, help="how many test images to attack")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--out", default="runs", help="folder for the table, the figures and the models")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, rule, obeys in (
        ("lam", "not be negative", args.lam >= 0),
        ("noise", "lie in [0, 1]", 0 <= args.noise <= 1),
        ("eps", "lie in (0, 1]", 0 < args.eps <= 1),
        *((name, "be positive", getattr(args, name) > 0) for name in ("epochs", "batch_size", "seeds", "max_images")),
    ):
        if not obeys or not math.isfinite(getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} must {rule}. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
