"""Adversarial training in plain Keras: what lasts under strong attacks, and what DRSLoss adds to it.

What it shows: `keras_drsl.AdversarialTraining` around a Keras model, `keras_drsl.RobustnessMonitor` beside it, and the
finished models evaluated by the standard suite: one trained as usual, one with DRSLoss alone, and two trained on
attacked images, with cross-entropy and with DRSLoss.

What you should see: all four classify clean images about as well. Under attack the first two lose most of it, and the
adversarially trained ones keep most of it. DRSLoss makes a large difference without adversarial training and a small
one with it. The figure shows robust accuracy by epoch, on images set aside for validation, under a quick attack.

How long: about five minutes on two cores for the digits; MNIST takes hours. CIFAR-10 is for a GPU, where
`--network resnet18` is a recipe of the field.

    python examples/adversarial_training.py
    python examples/adversarial_training.py --dataset mnist --method fgsm --epochs 10 --max-images 500
    KERAS_BACKEND=jax python examples/adversarial_training.py --dataset cifar10 --network resnet18 --max-images 1000
"""

import argparse
import json
import math
import sys
from pathlib import Path

import keras
import networks
import numpy as np
import records

import keras_drsl
from keras_drsl.evaluation import datasets
from keras_drsl.training import ATTACK_LOSSES, METHODS

# What the arguments default to. From the images in `validation` no model learns. With `peak` the learning rate rises to
# that and falls to 0; with `augment` the images are cropped and flipped at random.
RECIPES = {
    "digits": {"network": "cnn", "epochs": 30, "warmup_epochs": 10, "batch_size": 64, "eps": 0.15, "validation": 240},
    "mnist": {"network": "cnn", "epochs": 20, "warmup_epochs": 5, "batch_size": 128, "eps": 0.3, "validation": 500,
              "peak": 0.002},
    "cifar10": {"network": "small_resnet", "epochs": 30, "warmup_epochs": 0, "batch_size": 128, "eps": 8 / 255,
                "validation": 1000, "optimizer": "sgd", "peak": 0.1, "augment": True},
}  # fmt: skip
ATTACKED = ("pgd", "fgsm", "mart")  # the methods whose attack may drive up any loss
LOSSES = {"ce": "cross-entropy", "ls": "label smoothing 0.1", "drs": "DRSLoss"}


def main():
    args = parse_arguments()
    out = Path(args.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    stem = out / f"adversarial_{args.dataset}"
    if stem.with_suffix(".json").exists() and not args.overwrite:
        sys.exit(f"{stem}.json exists. Give another --out, or --overwrite to replace it.")
    try:
        train, test = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    train, validation = split(train, args.validation, seed=0)

    kinds = [("clean", "ce"), ("clean", "drs")]
    kinds += [(args.method, loss) for loss in dict.fromkeys(("ce", args.loss)) if (args.method, loss) not in kinds]
    # A run that was stopped goes on with the model it was at.
    begun = records.Begun(f"{stem}.begun.jsonl")
    named = (*records.ELSEWHERE, "method", "loss", "lam", "clean_lam", "seeds")
    settings = {name: value for name, value in vars(args).items() if name not in named}
    rows = []
    for method, loss in kinds:
        # Without attacks in training, the restraint may be stronger.
        lam = {"ce": None, "ls": None, "drs": args.clean_lam if method == "clean" else args.lam}[loss]
        row = {"method": method, "loss": loss, "lam": lam, "runs": []}
        for seed in range(args.seeds):
            one = {"method": method, "loss": loss, "lam": lam, "seed": seed}
            row["runs"].append(
                begun.run(settings | one, lambda one=one: run(**one, data=(train, validation, test), args=args))
            )
        rows.append(row)

    table = make_table(rows, args, len(test[0][: args.max_images]))
    print("\n" + table)
    stem.with_suffix(".md").write_text(table)
    record = {"command": describe(args), "versions": records.versions(), "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    plot(rows, stem.with_suffix(".png"), args)
    begun.end()
    print(f"Written: {stem}.md, .json, .png and the models in {out / 'models'}")


def run(method, loss, lam, seed, data, args):
    """Train one model, save it, evaluate it."""
    train, validation, test = data
    print(f"\n{args.dataset}: method={method} loss={loss} seed={seed}")
    monitor = keras_drsl.RobustnessMonitor(*validation, eps=args.eps, max_samples=args.watch, every=args.every)
    recipe = vars(args) | {"attack_loss": (args.attack_loss or "loss") if method in ATTACKED else None}
    model, history = fit(recipe, train, method, make_loss(loss, lam), seed, callbacks=[monitor], verbose=2)
    model.save(Path(args.out) / "models" / f"adversarial_{args.dataset}_{method}_{loss}_seed{seed}.keras")
    report = keras_drsl.evaluate_robustness(model, *test, eps=args.eps, max_samples=args.max_images, verbose=0)
    print(report)
    return {
        "seed": seed,
        "clean": report.clean_accuracy,
        "robust": report.robust_accuracy,
        "after": {name: one["cumulative"] for name, one in report.accuracy.items()},
        "warnings": [f"{check.name} ({check.status})" for check in report.checks if check.status != "pass"],
        "history": {name: [float(value) for value in values] for name, values in history.items()},
    }


def fit(recipe, train, method, loss, seed, *, callbacks=(), verbose=0):
    """A model trained on images `(x, y)` by a recipe, and its history; `method` as `AdversarialTraining` takes it."""
    keras.utils.set_random_seed(seed)
    x, y = train
    model = networks.build(recipe["network"], x.shape[1:])
    options = {name: recipe[name] for name in ("steps", "attack_loss") if recipe.get(name) is not None}
    robust = keras_drsl.AdversarialTraining(
        model, recipe["eps"], method=method, warmup_epochs=recipe["warmup_epochs"], seed=seed, **options
    )
    data = {"x": x, "y": y, "batch_size": recipe["batch_size"]}
    if recipe.get("augment"):
        data = {"x": networks.CroppedAndFlipped(x, y, recipe["batch_size"], seed)}
    rate = 0.001
    if recipe.get("peak"):
        rate = networks.UpAndDown(recipe["peak"], recipe["epochs"] * math.ceil(len(x) / recipe["batch_size"]))
    sgd = recipe.get("optimizer") == "sgd"
    optimizer = keras.optimizers.SGD(rate, momentum=0.9) if sgd else keras.optimizers.Adam(rate)
    robust.compile(optimizer, loss, metrics=["accuracy"])
    history = robust.fit(**data, epochs=recipe["epochs"], callbacks=list(callbacks), verbose=verbose)
    return model, history.history


def make_loss(name, lam):
    """A loss of class ids and logits."""
    if name == "ce":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Without restraint, DRSLoss is the cross-entropy, and Keras's own takes no label smoothing for class ids.
    options = {"lam": lam} if name == "drs" else {"lam": 0.0, "label_smoothing": 0.1}
    return keras_drsl.DRSLoss(**options, from_logits=True)


def split(data, count, seed):
    """All but `count` examples, drawn at random, and those."""
    order = np.random.default_rng(seed).permutation(len(data[0]))
    return tuple(one[order[count:]] for one in data), tuple(one[order[:count]] for one in data)


def describe(args):
    return records.command("examples/adversarial_training.py", args, unsaid=("peak", "optimizer", "augment"))


def label(row):
    lam = "" if row["lam"] is None else f", lam {row['lam']:g}"
    return f"{row['method']}, {LOSSES[row['loss']]}{lam}"


def make_table(rows, args, count):
    """A Markdown table: mean and, over several seeds, standard deviation."""
    lines = [
        f"{args.dataset}: L-inf, eps {args.eps:.4g}, suite standard, {count} test images, accuracy in %, mean +- "
        f"standard deviation of {args.seeds} seed(s), {args.epochs} epochs",
        "",
        "| training | clean | after APGD on CE | robust | checks that warn or fail |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        columns = [[run["clean"], run["after"]["apgd_ce"], run["robust"]] for run in row["runs"]]
        cells = [records.spread(column) for column in 100 * np.transpose(columns)]
        warnings = dict.fromkeys(name for run in row["runs"] for name in run["warnings"])
        lines.append(f"| {label(row)} | {' | '.join(cells)} | {', '.join(warnings) or 'none'} |")
    return "\n".join(lines) + f"\n\nWritten by `{describe(args)}`.\n"


def plot(rows, path, args):
    """Robust accuracy on the validation images by epoch, first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for row in rows:
        values = 100 * np.array(row["runs"][0]["history"]["val_robust_accuracy"])
        watched = np.unique([*range(0, len(values), args.every), len(values) - 1])
        style = {"color": "C0" if row["loss"] == "drs" else "C1", "ls": "--" if row["method"] == "clean" else "-"}
        axes.plot(watched + 1, values[watched], "o", ms=3, label=label(row), **style)
    title = f"{args.dataset}, eps {args.eps:.3g}, suite quick on validation images: an upper bound"
    axes.set(xlabel="epoch", ylabel="val_robust_accuracy (%)", ylim=(0, 100))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=RECIPES, default="digits")
    # "noise" attacks nothing and wants a larger eps: the example of losses has it.
    parser.add_argument("--method", choices=[name for name in METHODS if name != "noise"], default="pgd")
    parser.add_argument("--loss", choices=LOSSES, default="drs", help="beside cross-entropy")
    parser.add_argument("--lam", type=float, default=0.1, help="DRSLoss's restraint on attacked images")
    parser.add_argument("--clean-lam", type=float, default=0.3, help="DRSLoss's restraint without adversarial training")
    parser.add_argument("--eps", type=float, help="radius of all attacks, L-inf, the input range being [0, 1]")
    parser.add_argument("--steps", type=int, help="inner steps, by default 10")
    parser.add_argument("--attack-loss", choices=ATTACK_LOSSES, help="what they drive up, by default the whole loss")
    parser.add_argument("--network", choices=networks.NAMES)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--warmup-epochs", type=int, help="epochs in which eps rises")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seeds", type=int, default=1, help="how many times to train each model")
    parser.add_argument("--validation", type=int, help="how many training images to set aside")
    parser.add_argument("--watch", type=int, default=120, help="how many of those to watch while training")
    parser.add_argument("--every", type=int, default=3, help="watch every so many epochs")
    parser.add_argument("--max-images", type=int, help="how many test images to attack, by default all")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--out", default="runs", help="folder for the table, the figure and the models")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args()
    for name, value in RECIPES[args.dataset].items():
        if getattr(args, name, None) is None:
            # In a short training the warm-up is short as well.
            setattr(args, name, min(value, args.epochs // 3) if name == "warmup_epochs" else value)
    if args.attack_loss and args.method not in ATTACKED:
        parser.error(f"--attack-loss needs --method {', '.join(ATTACKED)}. Received: {args.method}")
    if not 0 < args.eps <= 1:
        parser.error(f"--eps must lie in (0, 1]. Received: {args.eps}")
    for name in ("lam", "clean_lam", "warmup_epochs"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative. Received: {getattr(args, name)}")
    for name in ("steps", "epochs", "batch_size", "seeds", "validation", "watch", "every", "max_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
