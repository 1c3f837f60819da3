"""How robust is a model, and can the answer be believed? Two `.keras` files, side by side.

Two models of digits are trained, with cross-entropy and with DRSLoss, and saved. Then `keras_drsl.evaluate_robustness`
attacks each saved model by the ensemble that a published number needs, with the checks that a careful reader would
make, and `keras_drsl.robustness_curve` measures its accuracy against the size of the attack.

Expected: both models keep their clean accuracy and lose most of it under attack, DRSLoss less. The strongest attacks
are those on the margin and on the difference of logits: the cross-entropy alone makes both models look better.

On two cores: under five minutes. A run that was stopped continues where it was.

    python examples/evaluate_robustness.py
    python examples/evaluate_robustness.py --models a.keras b.keras   # models of yours, for digits
"""

import argparse
from pathlib import Path

import keras
from keras import layers

import keras_drsl
from keras_drsl import datasets

LOSSES = {"cross-entropy": "sparse_categorical_crossentropy", "DRSLoss": keras_drsl.DRSLoss(lam=0.3)}
CURVE = (0, 1 / 3, 2 / 3, 1, 4 / 3)  # the radii of the curve, in units of --eps


def main(arguments=None):
    args = parse_arguments(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train, (x, y) = datasets.load("digits")
    paths = {Path(path).stem: Path(path) for path in args.models} or train_models(train, out, args.epochs)
    reports, curves = {}, {}
    for name, path in paths.items():
        model = keras.models.load_model(path, compile=False)
        reports[name] = evaluate(model, x, y, out / f"robustness_{path.stem}.json", args)
        radii = [factor * args.eps for factor in CURVE]
        options = {"attacks": ["apgd_ce", "apgd_t_margin"], "suite": "quick", "checks": []}
        curves[name] = keras_drsl.robustness_curve(
            model, x, y, eps=radii, max_samples=args.max_images, verbose=0, **options
        )
        print(f"\n{name}\n{reports[name]}\n\n{curves[name]}")
    table = side_by_side(reports)
    print("\n" + table)
    (out / "robustness.md").write_text(table)
    first, *others = curves
    others = {name: curves[name] for name in others}
    curves[first].plot(out / "robustness.png", label=first, others=others, overwrite=True)
    print(f"Written: {out / 'robustness.md'}, {out / 'robustness.png'} and the reports beside them")


def train_models(train, out, epochs):
    """Train one model per loss unless its file exists, and return the files."""
    paths = {name: out / f"digits_{name}.keras" for name in LOSSES}
    for name, path in paths.items():
        if path.exists():
            continue
        print(f"training with {name}", flush=True)
        keras.utils.set_random_seed(0)
        convolutions = [layers.Conv2D(filters, 3, padding="same", activation="relu") for filters in (32, 64)]
        head = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")]
        model = keras.Sequential([keras.Input((8, 8, 1)), *convolutions, layers.MaxPooling2D(), *head])
        model.compile(optimizer="adam", loss=LOSSES[name], metrics=["accuracy"])
        model.fit(*train, epochs=epochs, batch_size=64, verbose=2)
        model.save(path)
    return paths


def evaluate(model, x, y, path, args):
    """Return the report in a file, or evaluate the model; progress is kept in a state beside the file."""
    if path.exists():
        print(f"{path} exists: it is not made again")
        return keras_drsl.RobustnessReport.from_json(path)
    state = path.with_suffix(".state")
    report = keras_drsl.evaluate_robustness(
        model, x, y, eps=args.eps, suite=args.suite, max_samples=args.max_images, state_path=state, verbose=0
    )
    report.to_json(path)
    state.unlink()
    return report


def side_by_side(reports):
    """Return a Markdown table with one column per report."""
    rows = {"clean": [f"{report.clean_accuracy:.1%}" for report in reports.values()]}
    for attack in dict.fromkeys(name for report in reports.values() for name in report.accuracy):
        accuracies = [report.accuracy.get(attack) for report in reports.values()]
        rows[f"after {attack}"] = ["" if found is None else f"{found['cumulative']:.1%}" for found in accuracies]
    rows["**robust accuracy**"] = [f"**{report.robust_accuracy:.1%}**" for report in reports.values()]
    rows["95 % interval"] = ["{:.1%} to {:.1%}".format(*report.confidence_interval) for report in reports.values()]
    rows["checks that warn or fail"] = [
        ", ".join(check.name for check in report.checks if check.status in ("warn", "fail")) or "none"
        for report in reports.values()
    ]
    head = f"| | {' | '.join(reports)} |\n|---|{'---|' * len(reports)}\n"
    return head + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="MODEL.keras", help="models to evaluate, not to train"
    )
    parser.add_argument("--eps", type=float, default=0.15, help="radius of the attacks, L∞, for inputs in [0, 1]")
    parser.add_argument("--suite", choices=("quick", "cleverhans", "standard"), default="standard")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the training")
    parser.add_argument("--max-images", type=int, help="how many test images, the first ones; by default all")
    parser.add_argument("--out", default="runs", help="folder for models, reports, table and picture")
    args = parser.parse_args(arguments)
    if not 0 < args.eps <= 1:
        parser.error(f"--eps must lie in (0, 1]. Received: {args.eps}")
    return args


if __name__ == "__main__":
    main()
