"""How robust is a model, and can the answer be believed? Cross-entropy and DRSLoss, side by side.

What it shows: `keras_drsl.evaluate_robustness` on `.keras` files, with the ensemble of attacks a published number needs
and the checks a careful reader would make, and the accuracy against the size of the attack.

What you should see: both models keep their clean accuracy and lose most of it under attack, DRSLoss less. The attacks
that find the most are those on the margin and on difference of logits: the cross-entropy alone flatters both.

How long: under five minutes on two cores for the digits, training included; MNIST takes an hour or two with the four
models below. A run that was stopped goes on where it was.

    python examples/evaluate_robustness.py
    python examples/evaluate_robustness.py --dataset mnist --noise 0 0.3 --eps 0.1 0.2 --max-images 1000
"""

import argparse
import sys
from pathlib import Path

import keras
import records

# The models are those of the first example.
from fit import DEFAULTS, build_model

import keras_drsl
from keras_drsl.evaluation import datasets

LAM = 0.3
CURVE = (0, 1 / 3, 2 / 3, 1, 4 / 3)  # the radii of the figure, in units of the first --eps
CURVE_ATTACKS = ("apgd_ce", "apgd_t_margin")


def main():
    args = parse_arguments()
    out = Path(args.out)
    (out / "models").mkdir(parents=True, exist_ok=True)
    try:
        train, (x, y) = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    reports, curves = {}, {}
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
            if args.curve:
                radii = [factor * args.eps[0] for factor in CURVE]
                knobs = {"attacks": CURVE_ATTACKS, "suite": "quick", "max_samples": args.max_images, "verbose": 0}
                curves[label] = keras_drsl.robustness_curve(model, x, y, eps=radii, **knobs)
                curves[label].to_json(out / f"curve_{name}.json", overwrite=True)

    for (label, eps), report in reports.items():
        print(f"\n{label}, eps {eps:.3g}\n{report}")
    table = side_by_side(reports) + f"\nWritten by `{describe(args)}`, the models trained with seed 0.\n"
    print("\n" + table)
    stem = out / f"robustness_{args.dataset}"
    stem.with_suffix(".md").write_text(table)
    if curves:
        first, *others = curves
        curves[first].plot(
            stem.with_suffix(".png"), label=first, overwrite=True, others={name: curves[name] for name in others}
        )
    print(f"Written: {stem}.md, the reports beside it and the models in {out / 'models'}")


def train_model(loss, noise, train, args):
    """The model of `examples/fit.py`, seed 0."""
    print(f"\ntraining: loss={loss} noise={noise:g}")
    keras.utils.set_random_seed(0)
    model = build_model(train[0].shape[1:], noise)
    model.compile(
        optimizer="adam",
        loss=keras_drsl.DRSLoss(lam=LAM) if loss == "drs" else "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    defaults = DEFAULTS[args.dataset]
    model.fit(*train, epochs=args.epochs or defaults["epochs"], batch_size=defaults["batch_size"], verbose=2)
    return model


def evaluate(model, x, y, eps, path, args):
    """The report of one model and eps: the one written before, or a new one, begun or not."""
    if path.exists():
        report = keras_drsl.RobustnessReport.from_json(path)
        if (report.settings["suite"], report.settings["max_samples"]) != (args.suite, args.max_images):
            sys.exit(f"{path} is of another --suite or --max-images. Give another --out.")
        print(f"{path} is there already")
        return report
    print(f"\n{path.stem}")
    state = path.with_suffix(".state")
    report = keras_drsl.evaluate_robustness(
        model, x, y, eps=eps, suite=args.suite, max_samples=args.max_images, state_path=state
    )
    report.provenance |= {"command": describe(args), "commit": records.commit()}
    report.to_json(path)
    state.unlink()
    return report


def describe(args):
    return records.command("examples/evaluate_robustness.py", args, unsaid=("curve",))


def side_by_side(reports):
    """A Markdown table: a column a report, a row for each attack's cumulative accuracy."""
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
    rows["checks that warn or fail"] = [
        ", ".join(f"{check.name} ({check.status})" for check in report.checks if check.status != "pass") or "none"
        for report in reports.values()
    ]
    head = "| | " + " | ".join(label for label, _ in reports) + " |\n|---|" + "---|" * len(reports) + "\n"
    return head + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DEFAULTS, default="digits")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0], help="standard deviation of the input noise")
    parser.add_argument(
        "--eps", type=float, nargs="+", help="radii of the attacks, L-inf, the input range being [0, 1]"
    )
    parser.add_argument("--suite", choices=("quick", "cleverhans", "standard"), default="standard")
    parser.add_argument("--epochs", type=int, help="of the training; by default those of examples/fit.py")
    parser.add_argument("--max-images", type=int, help="how many test images, the first ones; by default all")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--no-curve", dest="curve", action="store_false", help="leave the figure out")
    parser.add_argument("--out", default="runs", help="folder for models, reports, table and figure")
    args = parser.parse_args()
    args.eps = args.eps or [DEFAULTS[args.dataset]["eps"]]
    for name in ("eps", "noise"):
        if not all(0 <= value <= 1 and (value > 0 or name == "noise") for value in getattr(args, name)):
            parser.error(f"--{name} must lie in {'(' if name == 'eps' else '['}0, 1]. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
