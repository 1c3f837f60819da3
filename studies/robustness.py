"""Evaluate cross-entropy and DRSLoss side by side by the standard suite, with and without noise during training.

The study behind `results/robustness_*.json`: each model is trained with seed 0, saved, loaded, and evaluated at each
radius. A run that was stopped continues where it was.

On two cores: under five minutes for digits; MNIST takes three hours with the four models below.

    python -m studies.robustness --out results
    python -m studies.robustness --dataset mnist --noise 0 0.3 --eps 0.1 0.2 --max-images 300 --out results
"""

import argparse
import sys
from pathlib import Path

import keras

import keras_drsl
from keras_drsl import datasets
from studies import records
from studies.networks import small_cnn
from studies.recipes import PLAIN
from studies.runner import doubts

MODULE = "studies.robustness"
LAM = 0.3


def main(arguments=None):
    args = parse_arguments(arguments)
    out = Path(args.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    try:
        train, (x, y) = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    reports = {}
    for noise in args.noise:
        for loss in ("ce", "drs"):
            name = f"{args.dataset}_{loss}_noise{noise:g}"
            path = out / "models" / f"{name}.keras"
            if not path.exists():
                train_model(loss, noise, train, args).save(path)
            model = keras.models.load_model(path, compile=False)
            label = ("DRSLoss" if loss == "drs" else "cross-entropy") + (f", noise {noise:g}" if noise else "")
            for eps in args.eps:
                reports[label, eps] = evaluate(model, x, y, eps, out / f"robustness_{name}_eps{eps:.3g}.json", args)

    for (label, eps), report in reports.items():
        print(f"\n{label}, eps {eps:.3g}\n{report}")
    table = side_by_side(reports) + f"\nWritten by `{records.command(MODULE, args)}`, the models trained with seed 0.\n"
    print("\n" + table)
    stem = out / f"robustness_{args.dataset}"
    stem.with_suffix(".md").write_text(table)
    print(f"Written: {stem}.md, the reports beside it and the models in {out / 'models'}")


def train_model(loss, noise, train, args):
    """Train the small CNN with a softmax, seed 0."""
    print(f"\ntraining: loss={loss} noise={noise:g}")
    keras.utils.set_random_seed(0)
    model = small_cnn(train[0].shape[1:], noise)
    model.add(keras.layers.Softmax())
    model.compile(
        optimizer="adam",
        loss=keras_drsl.DRSLoss(lam=LAM) if loss == "drs" else "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    defaults = PLAIN[args.dataset]
    model.fit(*train, epochs=args.epochs or defaults["epochs"], batch_size=defaults["batch_size"], verbose=2)
    return model


def evaluate(model, x, y, eps, path, args):
    """Return the report in a file, or evaluate the model; progress is kept in a state beside the file."""
    if path.exists():
        report = keras_drsl.RobustnessReport.from_json(path)
        if (report.settings["suite"], report.settings["max_samples"]) != (args.suite, args.max_images):
            sys.exit(f"{path} is of another --suite or --max-images. Give another --out.")
        print(f"{path} exists: it is not made again")
        return report
    print(f"\n{path.stem}")
    state = path.with_suffix(".state")
    first = slice(args.max_images)
    report = keras_drsl.evaluate_robustness(
        model, x[first], y[first], x_pool=(x, y), eps=eps, suite=args.suite, max_samples=args.max_images,
        state_path=state,
    )  # fmt: skip
    report.provenance |= {"command": records.command(MODULE, args), "commit": records.commit()}
    report.to_json(path)
    state.unlink()
    return report


def side_by_side(reports):
    """Return a Markdown table with one column per report, and the accuracy after each attack."""
    attacks = dict.fromkeys(name for report in reports.values() for name in report.accuracy)
    rows = {
        "eps": [f"{eps:.3g}" for _, eps in reports],
        "clean": [f"{report.clean_accuracy:.1%}" for report in reports.values()],
    }
    for name in attacks:
        cells = [report.accuracy.get(name) for report in reports.values()]
        rows[f"after {name}"] = ["" if cell is None else f"{cell['cumulative']:.1%}" for cell in cells]
    rows["**robust accuracy**"] = [f"**{report.robust_accuracy:.1%}**" for report in reports.values()]
    rows["95 % interval"] = ["{:.1%} to {:.1%}".format(*report.confidence_interval) for report in reports.values()]
    rows["checks that warn or fail"] = [", ".join(doubts(report)) or "none" for report in reports.values()]
    head = "| | " + " | ".join(label for label, _ in reports) + " |\n|---|" + "---|" * len(reports) + "\n"
    return head + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=PLAIN, default="digits")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0], help="standard deviation of the input noise")
    parser.add_argument(
        "--eps", type=float, nargs="+", help="radii of the attacks, L-inf, the input range being [0, 1]"
    )
    parser.add_argument("--suite", choices=("quick", "cleverhans", "standard"), default="standard")
    parser.add_argument("--epochs", type=int, help="epochs of the training")
    parser.add_argument("--max-images", type=int, help="how many test images, the first ones; by default all")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--out", default="runs", help="folder for models, reports and table")
    args = parser.parse_args(arguments)
    args.eps = args.eps or [PLAIN[args.dataset]["eps"]]
    for name in ("eps", "noise"):
        if not all(0 <= value <= 1 and (value > 0 or name == "noise") for value in getattr(args, name)):
            parser.error(f"--{name} must lie in {'(' if name == 'eps' else '['}0, 1]. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
