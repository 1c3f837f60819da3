"""What the `keras-drsl` command does once its arguments are read. `keras_drsl_command` reads them and describes it."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_drsl import _escape, _files, _page, datasets
from keras_drsl.evaluation import RobustnessReport, compare, evaluate_robustness, robustness_curve
from keras_drsl.evaluation.reading import image_shape
from keras_drsl.evaluation.rendering import summarize
from keras_drsl.evaluation.results import in_report
from keras_drsl.evaluation.state import read_state
from keras_drsl.plotting import new_figure
from keras_drsl.threat import ThreatModel
from keras_drsl_command import main as main

CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # the radii of --plot, in units of --eps


def run(args: argparse.Namespace) -> int:
    """Run the command with arguments that were read, and return its exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal or file of few characters must not lose the report.
        sys.stdout.reconfigure(errors="backslashreplace")
    commands = {"evaluate": _evaluate, "merge": _merge, "compare": _compare, "show": _show}
    try:
        return commands[args.command](args)
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except ValueError as error:
        _complain(error)
    except Exception as error:
        # Backends have exceptions of their own, for example for a model that does not fit the memory.
        _complain(_escape.error_line(error))
    return 2


def _evaluate(args: argparse.Namespace) -> int:
    threat = ThreatModel(args.eps, args.norm, args.clip_min, args.clip_max, args.mask)
    _check_outputs(args)
    model = _load(args.model)
    undefended = None if args.undefended is None else _load(args.undefended, "undefended")
    preprocessing = None if args.preprocessing is None else _load(args.preprocessing, "preprocessing")
    data: Any
    shape = image_shape(preprocessing or model)
    if args.dataset.endswith(".npz"):
        data = datasets.load_npz(args.dataset)
    elif args.dataset not in datasets.NAMES and os.path.isdir(args.dataset):
        data = (datasets.load_folder(args.dataset, shape), None)
    else:
        data = datasets.load_test(args.dataset, args.data_dir, shape)
    x, y = data if data[1] is not None else data[0][:2]
    options: dict[str, Any] = {
        "threat": threat,
        "suite": args.suite,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "output": args.output,
        "preprocessing": preprocessing,
        "expectation_draws": args.expectation_draws,
        "attack_input": args.attack_input,
        "task": args.task,
        "which": args.which,
        "ignore_class": args.ignore_class,
        "verbose": int(not args.quiet),
    }
    report = evaluate_robustness(
        model,
        *data,
        max_samples=args.max_samples,
        shard=args.shard,
        undefended=undefended,
        state_path=args.state,
        keep_examples=args.keep or False,
        workers=args.workers,
        precision=args.precision,
        at_least=args.at_least,
        **options,
    )
    problems = _deliver(report, args)
    if args.state is not None:
        with _collect(problems, f"The state in {args.state!r} does not hold the result"):
            if in_report(read_state(args.state)["broken_by"]) != report.broken_by_row:
                raise ValueError("it could not be written to the end")
    _write_html(report, args, Path(args.model).name, problems)
    if args.plot is not None:
        with _collect(problems, "The curve could not be drawn"):
            largest = _largest_eps(threat, x, args.attack_input)
            radii = [factor * threat.radius for factor in CURVE if factor * threat.radius <= largest]
            index = report.per_example["index"]
            chosen = keras.tree.map_structure(lambda values: values[index], x)
            # The pool of the report, so that the curve meets it at its radius.
            curve = robustness_curve(model, chosen, y[index], x_pool=(x, y), eps=radii, **options)
            curve.plot(args.plot, overwrite=args.overwrite)
            if args.html is not None and not problems:
                report.to_html(args.html, title=Path(args.model).name, curve=curve)
    if problems and args.state is not None and not any("does not hold the result" in text for text in problems):
        problems.append(
            f"The state in {args.state!r} holds the result: the same command with --overwrite and other outputs in "
            "place of those that failed writes them"
        )
    paths = [path for name in ("out", "keep", "html", "plot") if (path := getattr(args, name)) is not None]
    if paths and not problems:
        with _collect(problems, "The summary could not be printed"):
            _print("\n" + summarize(report, paths))
    return _status(report.trustworthy, args, problems)


def _largest_eps(threat: ThreatModel, x: Any, attack_input: str | None) -> float:
    """Return the largest radius that a curve may have."""
    attacked = x.get(attack_input) if isinstance(x, dict) else x
    if attacked is not None and (isinstance(x, dict) or attack_input is None):
        return threat.largest_eps(attacked.shape[1:])
    # How many numbers an embedding layer gives is not known here.
    return float(np.min(threat.span)) if threat.norm == "inf" else math.inf


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise `ValueError` for an output that cannot be written, before the attacks rather than after them."""
    for name in ("out", "keep", "html", "plot"):
        if getattr(args, name, None) is not None:
            _files.check_new(name, getattr(args, name), overwrite=args.overwrite)
    if getattr(args, "html", None) is not None:
        _page.check_installed("jinja2", "PIL.Image")
    if getattr(args, "plot", None) is not None:
        figure, _ = new_figure()
        if args.plot.rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"`plot` must end in a kind of figure, such as .png. Received: {args.plot!r}")


def _merge(args: argparse.Namespace) -> int:
    _check_outputs(args)
    report = RobustnessReport.merge([_read(path) for path in args.reports])
    if args.keep is not None and report.kept is None:
        raise ValueError(
            "`keep` needs the examples of all shards: files that `evaluate --keep` wrote. Received: others"
        )
    problems = _deliver(report, args)
    if args.keep is not None:
        with _collect(problems, f"The examples could not be written to {args.keep!r}"):
            report.to_npz(args.keep, overwrite=args.overwrite)
    incomplete = args.strict and any(check.name == "shards" for check in report.checks)
    return _status(report.trustworthy, args, problems) or (3 if incomplete else 0)


def _compare(args: argparse.Namespace) -> int:
    _check_outputs(args)
    (first, name), *others = map(_read_side, args.sides)
    comparisons, problems = [compare(first, side, names=(name, other)) for side, other in others], list[str]()
    with _collect(problems, "The comparison could not be printed"):
        _print("\n\n".join(map(str, comparisons)))
    for name in ("out", "plot"):
        path = getattr(args, name)
        if path is not None:
            write = comparisons[0].to_json if name == "out" else comparisons[0].plot
            with _collect(problems, f"The comparison could not be written to {path!r}"):
                write(path, overwrite=args.overwrite)
    return _status(all(comparison.trustworthy for comparison in comparisons), args, problems)


def _show(args: argparse.Namespace) -> int:
    _check_outputs(args)
    report, problems = _read(args.report), list[str]()
    with _collect(problems, "The report could not be printed"):
        _print(report.to_markdown() if args.markdown else report.to_text(verbose=args.verbose))
    name = Path(args.report).stem
    comparisons = [compare(report, side, names=(name, other)) for side, other in map(_read_side, args.compare or [])]
    _write_html(report, args, name, problems, comparison=comparisons)
    return _status(report.trustworthy, args, problems)


def _read(path: str) -> RobustnessReport:
    return RobustnessReport.from_npz(path) if path.endswith(".npz") else RobustnessReport.from_json(path)


def _read_side(paths: list[str]) -> tuple[list[RobustnessReport], str]:
    """Return the reports of one side of a comparison, and what it is called."""
    return [_read(path) for path in paths], ", ".join(Path(path).stem for path in paths)


def _deliver(report: RobustnessReport, args: argparse.Namespace) -> list[str]:
    """Print a report and write it, each also if the other fails, and return what failed."""
    problems: list[str] = []
    with _collect(problems, "The report could not be printed"):
        _print(report.to_text(verbose=args.verbose))
    if args.out is not None:
        with _collect(problems, f"The report could not be written to {args.out!r}"):
            report.to_json(args.out, overwrite=args.overwrite)
    return problems


def _write_html(
    report: RobustnessReport, args: argparse.Namespace, title: str, problems: list[str], **sections: Any
) -> None:
    if args.html is not None:
        with _collect(problems, f"The page could not be written to {args.html!r}"):
            report.to_html(args.html, title=title, overwrite=args.overwrite, **sections)


@contextlib.contextmanager
def _collect(problems: list[str], what: str) -> Iterator[None]:
    """Add an error to a list instead of raising it."""
    try:
        yield
    except Exception as error:
        problems.append(f"{what} ({_escape.error_line(error)})")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:
        # Python flushes once more at its end, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _complain(message: object) -> None:
    for line in str(message).splitlines():
        print(f"keras-drsl: {_escape.for_terminal(line)}", file=sys.stderr)


def _status(trustworthy: bool, args: argparse.Namespace, problems: list[str]) -> int:
    for problem in problems:
        _complain(problem)
    if problems:
        return 2
    return 3 if args.strict and not trustworthy else 0


def _load(path: str, name: str = "MODEL") -> keras.Model:
    try:
        # Keras's safe mode is on: a file cannot make it run code of its own.
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(
            f"`{name}` must be a file that Keras can load. Received: {path!r} ({_escape.error_line(error)})"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
