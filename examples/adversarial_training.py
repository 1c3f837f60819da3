"""Adversarial training in plain Keras: which robustness lasts under strong attacks, and what DRSLoss adds to it.

Four models of digits are trained and evaluated by the standard suite: two as usual, with cross-entropy and DRSLoss,
and two on attacked images, by `keras_drsl.AdversarialTraining`. `keras_drsl.RobustnessMonitor` logs the robust accuracy
of each epoch on images set aside for validation, and Keras's own `EarlyStopping` keeps the best weights.

Expected: all four classify clean images about equally well. Under attack the first two lose most of it, and the
adversarially trained models keep most of it. DRSLoss makes a large difference without adversarial training, and a small
one with it.

On two cores: about five minutes.

    python examples/adversarial_training.py
"""

import argparse
import json
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_drsl
from keras_drsl import datasets
from keras_drsl.plotting import loss_color, new_figure

EPS = 0.15
# Name, method, loss. On attacked images the restraint is weaker.
TRAININGS = [
    ("usual training, cross-entropy", "clean", "sparse_categorical_crossentropy"),
    ("usual training, DRSLoss", "clean", keras_drsl.DRSLoss(lam=0.3)),
    ("adversarial training, cross-entropy", "pgd", "sparse_categorical_crossentropy"),
    ("adversarial training, DRSLoss", "pgd", keras_drsl.DRSLoss(lam=0.1)),
]


def main(arguments=None):
    args = parse_arguments(arguments)
    stem = Path(args.out) / "adversarial_digits"
    if stem.with_suffix(".json").exists() and not args.overwrite:
        sys.exit(f"{stem}.json exists. Give another --out, or --overwrite to replace it.")
    stem.parent.mkdir(parents=True, exist_ok=True)
    (x, y), test = datasets.load("digits")
    order = np.random.default_rng(0).permutation(len(x))
    train, validation = ((x[part], y[part]) for part in (order[240:], order[:240]))

    rows = []
    for name, method, loss in TRAININGS:
        print(f"\n{name}", flush=True)
        keras.utils.set_random_seed(0)
        model = build_model()
        history = fit(model, method, loss, train, validation, args)
        model.save(stem.parent / f"{name.replace(', ', '_').replace(' ', '_')}.keras")
        report = keras_drsl.evaluate_robustness(model, *test, eps=EPS, max_samples=args.max_images, verbose=0)
        print(report)
        rows.append({"training": name, "report": report.to_dict(), "history": history})
    table = make_table(rows)
    print("\n" + table)
    stem.with_suffix(".md").write_text(table)
    stem.with_suffix(".json").write_text(json.dumps(rows))
    plot(rows, stem.with_suffix(".png"))
    print(f"Written: {stem}.md, .json, .png and the models beside them")


def build_model():
    """Return a small classifier of images of 8 x 8 pixels."""
    convolutions = [layers.Conv2D(filters, 3, padding="same", activation="relu") for filters in (32, 64)]
    head = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((8, 8, 1)), *convolutions, layers.MaxPooling2D(), *head])


def fit(model, method, loss, train, validation, args):
    """Train a model, keep the weights of the epoch most robust on the validation images, and return the history."""
    # From cross-entropy alone the attack does not see the restraint: it increases the whole loss.
    options = {"attack_loss": "loss"} if method == "pgd" else {}
    warmup = min(10, args.epochs // 3)
    robust = keras_drsl.AdversarialTraining(
        model, EPS, method=method, steps=args.steps, warmup_epochs=warmup, **options
    )
    robust.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    monitor = keras_drsl.RobustnessMonitor(*validation, eps=EPS, max_samples=120, every=args.every)
    stop = keras.callbacks.EarlyStopping(
        "val_robust_accuracy", mode="max", patience=args.epochs, restore_best_weights=True
    )
    # The monitor comes first: the callbacks after it read what it logs.
    history = robust.fit(*train, batch_size=64, epochs=args.epochs, callbacks=[monitor, stop], verbose=2)
    return {name: [float(value) for value in values] for name, values in history.history.items()}


def make_table(rows):
    """Return a Markdown table of clean and robust accuracy."""
    lines = [
        f"Digits, L∞, eps {EPS}, suite standard, {rows[0]['report']['num_examples']} test images, accuracy in %",
        "",
        "| training | clean | after APGD on CE | robust | checks that warn or fail |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        report = row["report"]
        shares = (report["clean_accuracy"], report["attacks"][0]["cumulative"], report["robust_accuracy"])
        doubts = [check["name"] for check in report["checks"] if check["status"] in ("warn", "fail")]
        cells = [row["training"], *(f"{100 * share:.1f}" for share in shares), ", ".join(doubts) or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Draw the robust accuracy on the validation images by epoch."""
    figure, axes = new_figure()
    for row in rows:
        values = 100 * np.array(row["history"]["val_robust_accuracy"])
        style = {"color": loss_color(row["training"]), "linestyle": "--" if "usual" in row["training"] else "-"}
        axes.plot(np.arange(len(values)) + 1, values, label=row["training"], **style)
    axes.set(xlabel="epoch", ylabel="robust accuracy (%)", ylim=(0, 100))
    axes.set_title(f"Digits, eps {EPS}, quick suite on validation images: an upper bound", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="steps of the attack in each training step")
    parser.add_argument("--every", type=int, default=3, help="monitor every so many epochs")
    parser.add_argument("--max-images", type=int, default=360, help="how many test images to attack")
    parser.add_argument("--out", default="runs", help="folder for the table, the picture and the models")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args(arguments)
    for name in ("epochs", "steps", "every", "max_images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
