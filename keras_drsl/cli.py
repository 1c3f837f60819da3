"""The `keras-drsl` command: evaluate a saved model, merge the reports of shards, show a report.

    keras-drsl evaluate model.keras --dataset digits --eps 0.1 --out report.json
    keras-drsl evaluate model.keras --dataset data.npz --eps 0.1 --shard 0/4 --out part0.json
    keras-drsl merge part0.json part1.json part2.json part3.json --out report.json
    keras-drsl show report.json

Exit status: 0 after a finished evaluation, 2 for invalid arguments or files, 3 with --strict if a check failed or a
shard is missing.
"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import keras

import keras_drsl
from keras_drsl import _files, datasets
from keras_drsl._typing import Array
from keras_drsl.evaluation import RobustnessReport, evaluate_robustness, robustness_curve
from keras_drsl.evaluation.suites import SUITES
from keras_drsl.plotting import new_figure
from keras_drsl.threat import ThreatModel

CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # the radii of --plot, in units of --eps


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        print(f"keras-drsl: {error}", file=sys.stderr)
        return 2
    return status


def _evaluate(args: argparse.Namespace) -> int:
    threat = ThreatModel(args.eps, args.norm, args.clip_min, args.clip_max)
    _check_paths(args)
    model = _load(args.model)
    undefended = None if args.undefended is None else _load(args.undefended)
    x, y = _read_data(args)
    options = {
        "threat": threat,
        "batch_size": args.batch_size,
        "seed": args.seed,
        # A file or another program expects the report alone.
        "verbose": 0 if args.quiet or not sys.stdout.isatty() else 1,
    }
    report = evaluate_robustness(
        model,
        x,
        y,
        suite=args.suite,
        max_samples=args.max_samples,
        shard=args.shard,
        undefended=undefended,
        state_path=args.state,
        **options,
    )
    if args.plot is not None:
        radii = [factor * args.eps for factor in CURVE if args.norm == 2 or factor * args.eps <= threat.span]
        index = report.per_example["index"]
        curve = robustness_curve(model, x[index], y[index], eps=radii, suite="quick", **options)
        curve.plot(args.plot, overwrite=args.overwrite)
    if args.out is not None:
        report.to_json(args.out, overwrite=args.overwrite)
    print(report)
    return _status(report, args.strict)


def _check_paths(args: argparse.Namespace) -> None:
    """Raise `ValueError` for an output that cannot be written, before the attacks rather than after them."""
    for name in ("out", "plot"):
        if getattr(args, name) is not None:
            _files.check_new(name, getattr(args, name), overwrite=args.overwrite)
    if args.plot is not None:
        figure, _ = new_figure()
        if args.plot.rpartition(".")[2] not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"`plot` must end in a kind of figure, such as .png. Received: {args.plot!r}")
    paths = [path for path in (args.out, args.plot, args.state) if path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError(f"`out`, `plot` and `state` must be different files. Received: {', '.join(paths)}")


def _read_data(args: argparse.Namespace) -> tuple[Array, Array]:
    if args.dataset in datasets.NAMES:
        return datasets.load(args.dataset, args.data_dir)[1]
    if not args.dataset.endswith(".npz"):
        names = ", ".join(datasets.NAMES)
        raise ValueError(f"`dataset` must be one of {names}, or an npz file. Received: dataset={args.dataset!r}")
    return datasets.load_npz(args.dataset)


def _merge(args: argparse.Namespace) -> int:
    _files.check_new("out", args.out, overwrite=args.overwrite)
    report = RobustnessReport.merge([RobustnessReport.from_json(path) for path in args.reports])
    report.to_json(args.out, overwrite=args.overwrite)
    print(report)
    incomplete = any(check.name == "shards" for check in report.checks)
    return 3 if args.strict and incomplete else _status(report, args.strict)


def _show(args: argparse.Namespace) -> int:
    report = RobustnessReport.from_json(args.report)
    print(report.to_markdown() if args.markdown else report)
    return _status(report, args.strict)


def _status(report: RobustnessReport, strict: bool) -> int:
    return 3 if strict and not report.trustworthy else 0


def _load(path: str) -> keras.Model:
    try:
        # Keras's safe mode is on: a file cannot make it run code of its own.
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(f"`MODEL` must be a file that Keras can load. Received: {path!r} ({error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-drsl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=keras_drsl.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    evaluate = commands.add_parser("evaluate", help="evaluate the robustness of a saved model")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", metavar="MODEL.keras")
    evaluate.add_argument(
        "--dataset", required=True, help="digits, mnist or cifar10 (their test images), or an npz file with x and y"
    )
    evaluate.add_argument("--data-dir", help="where tensorflow-datasets has mnist or cifar10")
    evaluate.add_argument("--eps", type=_number, required=True, help="radius of the attacks, as 0.1 or 8/255")
    evaluate.add_argument("--norm", type=_norm, default="inf", help="inf (the default) or 2")
    evaluate.add_argument("--suite", choices=SUITES, default="standard", help="by default standard")
    evaluate.add_argument(
        "--undefended", metavar="MODEL.keras", help="a second model without a defense, for two checks"
    )
    evaluate.add_argument("--clip-min", type=float, default=0.0, help="the smallest valid input value")
    evaluate.add_argument("--clip-max", type=float, default=1.0, help="the largest valid input value")
    evaluate.add_argument("--max-samples", type=int, help="how many images, each class in proportion; by default all")
    evaluate.add_argument("--batch-size", type=int, default=256, help="images attacked together, by default 256")
    evaluate.add_argument("--seed", type=int, default=0, help="of all randomness, by default 0")
    evaluate.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only every N-th image from the I-th on, 0 <= I < N"
    )
    evaluate.add_argument("--state", metavar="FILE", help="keep progress there; the same command continues from it")
    evaluate.add_argument("--out", metavar="REPORT.json")
    evaluate.add_argument("--plot", metavar="CURVE.png", help="draw accuracy against eps (suite quick)")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bars")

    merge = commands.add_parser("merge", help="merge the reports of shards")
    merge.set_defaults(run=_merge)
    merge.add_argument("reports", nargs="+", metavar="REPORT.json")
    merge.add_argument("--out", required=True, metavar="REPORT.json")

    show = commands.add_parser("show", help="print a report")
    show.set_defaults(run=_show)
    show.add_argument("report", metavar="REPORT.json")
    show.add_argument("--markdown", action="store_true", help="as Markdown")

    for command in (evaluate, merge, show):
        command.add_argument("--strict", action="store_true", help="status 3 if a check failed or a shard is missing")
    for command in (evaluate, merge):
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _number(text: str) -> float:
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number, as 0.1 or 8/255. Received: {text!r}") from None


def _norm(text: str) -> Any:
    return 2 if text == "2" else text


def _shard(text: str) -> tuple[int, int]:
    try:
        place, count = text.split("/")
        return int(place), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be I/N, as 0/4. Received: {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
