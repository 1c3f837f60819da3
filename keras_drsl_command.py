"""The `keras-drsl` command: evaluate a saved model, merge the reports of shards, compare reports, show a report.

    keras-drsl evaluate model.keras --dataset digits --eps 0.1 --out report.json
    keras-drsl evaluate model.keras --dataset data.npz --eps 0.1 --shard 0/4 --out part0.json
    keras-drsl merge part0.json part1.json part2.json part3.json --out report.json
    keras-drsl compare report.json other.json
    keras-drsl show report.json

Exit status: 0 after a finished evaluation, 2 for invalid arguments or files or an output that could not be written,
3 with --strict if a check failed or a shard is missing.
"""

# This module lies beside the package, because an import of the package imports Keras and a backend. Help, version and
# wrong arguments need neither.

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DATASETS = ("digits", "mnist", "cifar10")
DATASET = r"[a-z][a-z0-9_]*(/[\w.+-]+)?(:[\w.*]+)?"  # of a data set, its configuration and version
SUITES = ("quick", "cleverhans", "fast", "standard")
ALIASES = {"autoattack": "standard"}  # of suites
TASKS = ("multiclass", "multilabel", "positions")
NORMS = {"inf": "inf", "linf": "inf", "l∞": "inf", "2": 2, "l2": 2, "1": 1, "l1": 1}
LARGEST = 2**31 - 1
INPUTS = ("model", "dataset", "preprocessing", "undefended", "reports", "report", "sides", "compare")
MODELS = ("model", "preprocessing", "undefended")
OUTPUTS = ("out", "keep", "html", "plot", "state")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        _check_paths(args)
        if args.command == "compare":
            _check_sides(args)
        if getattr(args, "compare", None) and args.html is None:
            raise ValueError("`compare` needs --html, the page that shows it. Received: no --html")
    except ValueError as error:
        parser.error(str(error))
    from keras_drsl import cli

    return cli.run(args)


def _check_paths(args: argparse.Namespace) -> None:
    """Raise `ValueError` for a missing input, an existing output, or one file in two places."""
    inputs = [(name, path) for name in INPUTS for path in _paths(args, name)]
    outputs = [(name, path) for name in OUTPUTS for path in _paths(args, name)]
    for name, path in inputs:
        if not os.path.exists(path):
            kind = "a file that Keras can load" if name in MODELS else "a file that exists"
            shown = "MODEL" if name == "model" else name
            raise ValueError(f"`{shown}` must be {kind}. Received: {path!r}, which does not exist")
    for position, (name, path) in enumerate(outputs):
        for other, known in [*inputs, *outputs[:position]]:
            if _is_same_file(path, known):
                raise ValueError(f"`{other}` and `{name}` must be different files. Received: {known!r} and {path!r}")
        if name != "state" and os.path.exists(path) and not args.overwrite:
            raise ValueError(
                f"`{name}` must be a path where nothing exists. Received: {name}={path!r}, which exists "
                "(--overwrite replaces a file)"
            )


def _check_sides(args: argparse.Namespace) -> None:
    """Raise `ValueError` unless there are two sides, or several without a file to write."""
    if len(args.sides) < 2 or (len(args.sides) > 2 and (args.out or args.plot)):
        files = "" if len(args.sides) < 2 else " for --out and --plot"
        raise ValueError(f"`sides` must be two{files}, with a space between them. Received: {len(args.sides)}")


def _paths(args: argparse.Namespace, name: str) -> list[str]:
    """Return the paths of local files that an argument names."""
    value = getattr(args, name, None) or []
    values = [value] if isinstance(value, str) else value
    paths = [path for some in values for path in ([some] if isinstance(some, str) else some)]
    return [path for path in paths if not (name == "dataset" and _is_name(path)) and "://" not in path]


def _is_name(dataset: str) -> bool:
    """Return whether an argument is the name of a data set, and no file or folder."""
    return dataset in DATASETS or not (dataset.endswith(".npz") or os.path.isdir(dataset))


def _is_same_file(first: str, second: str) -> bool:
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    # Some file systems do not distinguish upper and lower case.
    return os.path.realpath(first).casefold() == os.path.realpath(second).casefold()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-drsl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    evaluate = commands.add_parser("evaluate", help="evaluate the robustness of a saved model")
    evaluate.add_argument("model", metavar="MODEL.keras", type=_path)
    evaluate.add_argument(
        "--dataset",
        type=_dataset,
        required=True,
        help="digits, mnist, cifar10 or another data set of images of tensorflow-datasets (their test images), an npz "
        "file with x and y, or a folder of images with one sub-folder per class",
    )
    evaluate.add_argument("--data-dir", type=_path, help="where tensorflow-datasets has the data set")
    evaluate.add_argument(
        "--eps",
        type=_several(_positive, _not_negative),
        required=True,
        help="radius of the attacks, as 0.1 or 8/255, or one per channel, as 8,8,4",
    )
    evaluate.add_argument(
        "--norm", type=_norm, default="inf", help="inf (the default), 2 or 1; Linf, L2 and L1 as well"
    )
    evaluate.add_argument(
        "--suite",
        type=_suite,
        default="standard",
        help=f"{', '.join(SUITES)}; by default standard, and autoattack is another name of it",
    )
    evaluate.add_argument(
        "--undefended", metavar="MODEL.keras", type=_path, help="a second model without a defense, for two checks"
    )
    evaluate.add_argument(
        "--preprocessing",
        metavar="MODEL.keras",
        type=_path,
        help="a model in front of the other, which maps images in the valid range to what that one takes",
    )
    for name, default, which in (("--clip-min", 0.0, "smallest"), ("--clip-max", 1.0, "largest")):
        evaluate.add_argument(
            name, type=_several(_number), default=default, help=f"the {which} valid input value, or one per channel"
        )
    evaluate.add_argument("--mask", type=_mask, help="1 for each channel that may not change, otherwise 0, as 0,0,1")
    evaluate.add_argument("--output", help="the output that holds the classes, of a model with several")
    evaluate.add_argument(
        "--expectation-draws", type=_integer(1), default=1, help="average a random model over so many calls"
    )
    evaluate.add_argument(
        "--attack-input",
        type=_path,
        metavar="NAME",
        help="the input that is attacked, of a model with several, or an embedding layer; an npz file holds one array "
        "for each input, and y",
    )
    evaluate.add_argument(
        "--task",
        choices=TASKS,
        default="multiclass",
        help="multilabel for y of 0 and 1, one column per label; positions for one class per pixel or token",
    )
    evaluate.add_argument("--ignore-class", type=int, help="the class that does not count, for --task positions")
    evaluate.add_argument("--which", type=_integer(0), help="the only label that counts, for --task multilabel")
    evaluate.add_argument(
        "--max-samples", type=_integer(1), help="how many images, each class in proportion; by default all"
    )
    evaluate.add_argument(
        "--batch-size", type=_integer(1), default=256, help="images attacked together, by default 256"
    )
    evaluate.add_argument(
        "--workers", type=_workers, help="processes:N, or ray, to attack batches of images in several processes"
    )
    evaluate.add_argument(
        "--precision", type=_number, help="end as soon as the interval reaches at most this far to each side, as 0.05"
    )
    evaluate.add_argument(
        "--at-least", type=_number, help="end as soon as the robust accuracy is known to be above or below, as 0.6"
    )
    evaluate.add_argument("--seed", type=_integer(0), default=0, help="of all randomness, by default 0")
    evaluate.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only every N-th image from the I-th on, 0 <= I < N"
    )
    evaluate.add_argument(
        "--state", metavar="FILE", type=_path, help="keep progress there; the same command continues from it"
    )
    evaluate.add_argument("--out", metavar="REPORT.json", type=_path)
    evaluate.add_argument(
        "--keep", metavar="REPORT.npz", type=_npz, help="write the report with the perturbed images that were found"
    )
    evaluate.add_argument(
        "--html", metavar="REPORT.html", type=_path, help="write a page for readers, with --keep also with images"
    )
    evaluate.add_argument(
        "--plot", metavar="CURVE.png", type=_path, help="draw accuracy against eps: evaluates the suite at six radii"
    )
    evaluate.add_argument("--quiet", action="store_true", help="show no progress")

    merge = commands.add_parser("merge", help="merge the reports of shards")
    merge.add_argument("reports", nargs="+", metavar="REPORT.json", type=_path, help="or REPORT.npz, of --keep")
    merge.add_argument("--out", required=True, metavar="REPORT.json", type=_path)
    merge.add_argument(
        "--keep",
        metavar="REPORT.npz",
        type=_npz,
        help="write the perturbed images of all shards, each read from an npz",
    )

    compare = commands.add_parser("compare", help="compare the reports of models on the same examples")
    compare.add_argument(
        "sides",
        nargs="+",
        metavar="REPORT.json[,REPORT.json...]",
        type=_side,
        help="a model; several models of one kind, such as several seeds, with commas between them. The first one is "
        "compared with each of the others",
    )
    compare.add_argument("--out", metavar="COMPARISON.json", type=_path)
    compare.add_argument("--plot", metavar="COMPARISON.png", type=_path, help="draw the differences")

    show = commands.add_parser("show", help="print a report")
    show.add_argument("report", metavar="REPORT.json", type=_path, help="or REPORT.npz, of --keep")
    show.add_argument("--markdown", action="store_true", help="as Markdown")
    show.add_argument("--html", metavar="REPORT.html", type=_path, help="write a page for readers")
    show.add_argument(
        "--compare",
        nargs="+",
        metavar="REPORT.json[,REPORT.json...]",
        type=_side,
        help="other models on the same examples, which the page of --html compares this one with; after REPORT.json",
    )

    for command in (evaluate, merge, compare, show):
        command.add_argument("--strict", action="store_true", help="status 3 if a check failed or a shard is missing")
    for command in (evaluate, merge, show):
        command.add_argument("--verbose", action="store_true", help="print every check, not only those with a problem")
    for command in (evaluate, merge, compare, show):
        command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def _version() -> str:
    try:
        return version("keras-drsl")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "unknown"


def _refuse(rule: str, text: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= 60 else text[:60] + "..."
    return argparse.ArgumentTypeError(f"{rule}. Received: {shown!r}")


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise _refuse("must be a path", text)
    return text


def _npz(text: str) -> str:
    if not text.endswith(".npz"):
        raise _refuse("must end in .npz", text)
    return _path(text)


def _workers(text: str) -> str:
    if not re.fullmatch(r"processes:[1-9]\d*|ray", text):
        raise _refuse("must be processes:N or ray", text)
    return text


def _side(text: str) -> list[str]:
    return [_path(part) for part in text.split(",")]


def _dataset(text: str) -> str:
    if text.lower() in DATASETS:
        return text.lower()
    if _is_name(text) and not re.fullmatch(DATASET, text):
        names = ", ".join(DATASETS)
        raise _refuse(
            f"`dataset` must be one of {names}, another name of tensorflow-datasets, an npz file or a folder", text
        )
    return _path(text)


def _number(text: str) -> float:
    try:
        number = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise _refuse("must be a number, as 0.1 or 8/255", text) from None
    if not math.isfinite(number):
        raise _refuse("must be a finite number, as 0.1 or 8/255", text)
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if number <= 0:
        raise _refuse("`eps` must be a positive number", text)
    return number


def _not_negative(text: str) -> float:
    number = _number(text)
    if number < 0:
        raise _refuse("`eps` must be a number >= 0", text)
    return number


def _several(one: Callable[[str], Any], each: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """Return the reader of one number, or of several with commas between them."""

    def read(text: str) -> Any:
        return tuple(map(each or one, text.split(","))) if "," in text else one(text)

    return read


def _mask(text: str) -> tuple[bool, ...]:
    parts = text.split(",")
    if not set(parts) <= {"0", "1"}:
        raise _refuse("must be 0 or 1 for each channel, as 0,0,1", text)
    return tuple(part == "1" for part in parts)


def _integer(at_least: int) -> Callable[[str], int]:
    """Return the reader of an integer that is not too small, and small enough for every backend."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -1
        if not at_least <= number <= LARGEST:
            raise _refuse(f"must be an integer from {at_least} to {LARGEST}", text)
        return number

    return read


def _norm(text: str) -> Any:
    norm = NORMS.get(text.lower().replace("-", "").replace("_", ""))
    if norm is None:
        raise _refuse("`norm` must be one of 'inf', 2, 1", text)
    return norm


def _suite(text: str) -> str:
    suite = ALIASES.get(text.lower(), text.lower())
    if suite not in SUITES:
        raise _refuse(f"`suite` must be one of {', '.join((*SUITES, *ALIASES))}", text)
    return suite


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = -1, -1
    if not 0 <= index < count <= LARGEST:
        raise _refuse("must be I/N, as 0/4, with 0 <= I < N", text)
    return index, count


if __name__ == "__main__":
    sys.exit(main())
