"""A report as text, as Markdown and as a figure."""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

from keras_drsl import _escape
from keras_drsl.evaluation.results import BY_SEVERITY, UPPER_BOUND, Check, EvaluationResults
from keras_drsl.plotting import finish_axes, new_figure, norm_label
from keras_drsl.threat import describe_radius

WIDTH = 80
LOSS_LABELS = {"ce": "cross-entropy", "margin": "margin", "dlr": "logit ratio"}
OUTCOMES = {"fail": "failed", "warn": "with a warning", "skipped": "skipped"}
# What to do about a check that warns or fails.
ADVICE = {
    "clean_accuracy": "Check labels, input range and preprocessing before anything else.",
    "outputs": "Give the model that returns logits, without a softmax or sigmoid.",
    "deterministic": "Give `expectation_draws` for a random model, and a model without a state otherwise.",
    "independent_rows": "Give the model at inference, with moving statistics in place of those of the batch.",
    "gradients": "Remove what stops the gradient, and rely on attacks without gradients until then.",
    "logit_scale": "Believe attacks on the margin only.",
    "perturbations": "Repair the attack: it must stay within eps and the valid range.",
    "many_steps_beat_one": "Suspect masked gradients. Attack with more steps, restarts and Square.",
    "losses_agree": "Compare models by the worst case only.",
    "larger_eps": "Suspect masked gradients. Attack with other losses and with Square.",
    "unbounded": "Suspect masked gradients. Attack with other losses and with Square.",
    "converged": "Attack with more steps.",
    "restarts": "Attack with more restarts.",
    "noise": "Suspect masked gradients: a random point should not beat an attack.",
    "black_box": "Suspect masked gradients. Do not trust the attacks with gradients.",
    "attack_self_test": "Suspect the attacks or the backend. Do not use the numbers.",
    "undefended": "Check the attacks: they fail on a model without a defense.",
    "transfer": "Suspect masked gradients. Add a `Transfer` attack.",
    "units": "Give `eps`, `clip_min` and `clip_max` in the units of the inputs.",
    "kept_examples": "Look for a model that is random, keeps a state, or mixes the inputs of a batch.",
    "shards": "Merge the reports of all shards.",
}


def to_text(report: EvaluationResults, *, verbose: bool = False) -> str:
    """Return the report as text of 80 columns, with figure and message of the checks that did not pass, or of all."""
    low, high = report.confidence_interval
    bound = "upper bound; " if report.settings["suite"] in UPPER_BOUND else ""
    lines = [
        *([] if report.trustworthy else ["NOT TRUSTWORTHY: a check failed. The robust accuracy is an upper bound."]),
        f"robust accuracy  {report.robust_accuracy:7.1%}   {bound}95 % interval {low:.1%} to {high:.1%}",
        *_rounded_line(report),
        f"clean accuracy   {report.clean_accuracy:7.1%}   {_examples(report)}",
        *_early_lines(report),
        *_wrap(f"attacked with    {_threat(report)}", indent=17),
        *_class_lines(report),
        *_shards_line(report),
        "",
        f"{'attack':<24}{'tried on':>10}{'withstood':>11}{'robust after':>14}{'seconds':>10}",
    ]
    for attack in report.attacks:
        accuracy, name = report.accuracy[attack["name"]], _escape.for_terminal(attack["name"])
        if len(name) > 24:
            lines += _wrap(name)
            name = ""
        lines.append(
            f"{name:<24}{accuracy['tried']:>10}{_percent(accuracy['alone']):>11}"
            f"{accuracy['cumulative']:>14.1%}{attack['seconds']:>10.1f}"
        )
    if verbose:
        starts = "\n" + "cost".ljust(17), " " * 17
        lines += [f"{start}{cost}" for start, cost in zip(starts, _cost(report), strict=False)]
    return "\n".join([*lines, *_check_lines(report, verbose)])


def _early_lines(report: EvaluationResults) -> list[str]:
    """Return the lines on a rule that could end the evaluation early: how far it came, and what it decided."""
    lines = []
    if report.stopped_early:
        lines.append(f"stopped early    after {report.num_examples} of {report.settings['num_given']} examples")
    share = report.settings.get("at_least")
    if share is not None:
        low, high = report.confidence_interval
        answer = "yes" if low >= share else "no" if high < share else "undecided"
        lines.append(f"at least {share:.1%}".ljust(17) + answer)
    return lines


def _check_lines(report: EvaluationResults, verbose: bool) -> list[str]:
    """Return the checks that warn or fail, with advice, and the number of those that passed or all of them."""
    if not report.checks:
        return ["", "no check ran"]
    lines, rest = [""], []
    for check in by_severity(report):
        name, message = _escape.for_terminal(check.name), _escape.for_terminal(check.message)
        is_bad = check.status in ("fail", "warn")
        figure = "" if math.isnan(check.value) else f" = {check.value:.4g}"
        title = f"{check.status.upper() if is_bad else check.status}: {name}{figure}"
        described = [*_wrap(title), *_wrap(f"    {message}")]
        if is_bad:
            lines += described + _wrap(f"    {ADVICE.get(check.name, '')}")
        elif verbose:
            rest += described
    return [*lines, count_checks(report), *rest]


def count_checks(report: EvaluationResults) -> str:
    """Return how many checks passed, and how many did not: "16 of 17 checks passed (1 with a warning)"."""
    statuses: list[str] = [check.status for check in report.checks]
    others = ", ".join(f"{statuses.count(status)} {word}" for status, word in OUTCOMES.items() if status in statuses)
    return f"{statuses.count('pass')} of {len(statuses)} checks passed{others and f' ({others})'}"


def summarize(report: EvaluationResults, files: Sequence[str]) -> str:
    """Return the last lines of the command: verdict, trust, and the files that were written.

    Args:
        report: The report.
        files: The paths of the files.
    """
    verdict = f"{report.robust_accuracy:.1%} robust, {report.clean_accuracy:.1%} without an attack"
    trust = count_checks(report) if report.checks else "no check ran"
    doubt = "" if report.trustworthy else "NOT TRUSTWORTHY: "
    lines = {"verdict": verdict, "trust": doubt + trust, "files": ", ".join(files)}
    return "\n".join(f"{name:<9}{_escape.for_terminal(text)}" for name, text in lines.items())


def _examples(report: EvaluationResults) -> str:
    """Return how many examples of how many classes, labels or positions were evaluated."""
    if report.num_positions is not None:
        return f"{report.num_examples} examples of {report.num_positions} positions, which are counted one by one"
    by_label = report.robust_accuracy_by_label
    if by_label is not None:
        return f"{report.num_examples} examples of {len(by_label)} labels, correct if all of them are"
    counts = report.class_counts.values()
    low, high = min(counts), max(counts)
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{report.num_examples} examples, {each} of each of {len(counts)} classes"


def _rounded_line(report: EvaluationResults) -> list[str]:
    """Return the robust accuracy against images of integer values, where the inputs had such values."""
    share = report.robust_accuracy_8bit
    return [] if share is None else [f"as 8-bit images  {share:7.1%}   upper bound; what attacks found, rounded"]


def _class_lines(report: EvaluationResults) -> list[str]:
    """Return the robust accuracy of each label, or of each class where the classes have names."""
    by_label = report.robust_accuracy_by_label
    if by_label is not None:
        parts = [f"{label} {share:.1%}" for label, share in by_label.items()]
        return _wrap(f"robust by label  {', '.join(parts)}", indent=17)
    names = report.provenance.get("classes")
    if not names:
        return []
    parts = [
        f"{_escape.for_terminal(names[label])} {found.robust_accuracy:.1%}" for label, found in report.by_class.items()
    ]
    return _wrap(f"robust by class  {', '.join(parts)}", indent=17)


def _threat(report: EvaluationResults) -> str:
    """Return norm, radius, range and suite, escaped for a terminal."""
    settings = report.settings
    suite = _escape.for_terminal(settings["suite"])
    return f"norm {settings['norm']}, {describe_radius(settings)}, suite {suite}"


def _shards_line(report: EvaluationResults) -> list[str]:
    shards = [shard for shard in report.settings.get("shards", []) if shard is not None]
    if not shards:
        return []
    return [f"merged from      {len(shards)} of {shards[0][1]} shards: each check has its worst outcome"]


def _cost(report: EvaluationResults) -> list[str]:
    """Return what the attacks cost, where it was counted."""
    gradients, queries = report.num_gradients, report.num_queries
    if gradients is None or queries is None:
        return []
    lines = [f"{gradients:,} gradients and {queries:,} further queries by attacks"]
    if report.compile_seconds is not None:
        lines.append(f"{report.compile_seconds:.1f} seconds to compile attacks")
    return lines


def _wrap(text: str, indent: int = 4) -> list[str]:
    start = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.lstrip(), WIDTH, initial_indent=start, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def to_markdown(report: EvaluationResults) -> str:
    """Return the report as Markdown: a summary line, a table of attacks, a table of checks with failures first."""
    eight = report.robust_accuracy_8bit
    low, high = report.confidence_interval
    bound = ", an upper bound" if report.settings["suite"] in UPPER_BOUND else ""
    lines = [
        f"Robust accuracy **{report.robust_accuracy:.1%}**{bound} (95 % interval {low:.1%} to {high:.1%}), clean "
        f"{report.clean_accuracy:.1%}, on {report.num_examples} examples, {_escape.for_markdown(_threat(report))}"
        f"{'' if report.trustworthy else ' - **not trustworthy: a check failed**'}",
        *(f"{' '.join(line.split())}." for line in _early_lines(report)),
        *([] if eight is None else [f"Against images rounded to 8 bits: **{eight:.1%}**, an upper bound."]),
        *(f"Cost: {cost}." for cost in _cost(report)),
        "",
        "| attack | tried on | withstood | robust after it | seconds |",
        "|---|---|---|---|---|",
    ]
    for attack in report.attacks:
        accuracy = report.accuracy[attack["name"]]
        cells = [
            _escape.for_markdown(attack["name"]),
            str(accuracy["tried"]),
            _percent(accuracy["alone"]),
            f"{accuracy['cumulative']:.1%}",
            f"{attack['seconds']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if report.checks:
        lines += ["", "| check | outcome | figure | message |", "|---|---|---|---|"]
    for check in by_severity(report):
        name, message = _escape.for_markdown(check.name), _escape.for_markdown(check.message)
        lines.append(f"| {name} | {check.status} | {check.value:.4g} | {message} |")
    return "\n".join(lines) + "\n"


def to_model_card(report: EvaluationResults, name: str, dataset: str) -> str:
    """Return metadata in the form of Hugging Face's `model-index`, and a section of text, for a model card."""
    low, high = report.confidence_interval
    bound = "at most " if report.settings["suite"] in UPPER_BOUND else ""
    metrics = [
        {"type": "accuracy", "name": "accuracy", "value": report.clean_accuracy},
        {"type": "accuracy", "name": f"robust accuracy, {_threat(report)}", "value": report.robust_accuracy},
    ]
    # The names of Hugging Face for tasks; which kind of input or position it is, a report does not say.
    task = "other" if report.settings.get("task", "multiclass") != "multiclass" else "image-classification"
    results = [{"task": {"type": task}, "dataset": {"name": dataset, "type": dataset}, "metrics": metrics}]
    # JSON on one line is YAML, whatever the names hold.
    lines = [
        "---",
        f"model-index: {json.dumps([{'name': name, 'results': results}], ensure_ascii=False)}",
        "---",
        "",
        "## Robustness",
        "",
    ]
    lines.append(
        f"Of {report.num_examples} test examples of {_escape.for_markdown(dataset)}, the model gets "
        f"{report.clean_accuracy:.1%} right. Against attacks ({_escape.for_markdown(_threat(report))}) it keeps "
        f"{bound}{report.robust_accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}). "
        f"{'' if report.trustworthy else '**Not trustworthy: a check failed.** '}Measured with keras-drsl: "
        f"{count_checks(report) if report.checks else 'no check ran'}."
    )
    return "\n".join(lines) + "\n"


def waterfall(report: EvaluationResults) -> list[tuple[str, float]]:
    """Return the accuracy without an attack, and after each attack and check that took some away, by label."""
    stages = [("no attack", report.clean_accuracy)]
    stages += [(attack_label(name), accuracy["cumulative"]) for name, accuracy in report.accuracy.items()]
    # Of a model of positions, `accuracy` holds attacks only.
    return stages + ([("checks", report.robust_accuracy)] if report.robust_accuracy < stages[-1][1] else [])


def plot(report: EvaluationResults, path: str | os.PathLike[str] | None, ax: Any = None) -> Any:
    """Draw a waterfall: the accuracy without an attack, and after each attack the share that it took away."""
    names, shares = zip(*waterfall(report), strict=True)
    # A name that is too long would leave no room for the bars.
    labels = [names[0], *(f"after {_escape.for_figure(name[:40])}" for name in names[1:])]
    left = [100 * share for share in shares]
    taken = [before - after for before, after in zip([left[0], *left], left, strict=False)]
    axes = new_figure(height=1.4 + 0.45 * len(labels))[1] if ax is None else ax
    rows = range(len(labels))  # two attacks may have one label
    axes.barh(rows, left, color="#0072B2", label="still correct")
    axes.barh(rows, taken, left=left, color="#0072B2", alpha=0.25, label="misled by this attack")
    axes.set_yticks(rows, labels)
    for row, share, loss in zip(rows, left, taken, strict=True):
        # Beyond both bars, so that no edge crosses the number.
        axes.annotate(f"{share:.1f}", (share + loss, row), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="accuracy (%)", xlim=(0, 115), xticks=range(0, 101, 20))
    settings = report.settings
    doubt = "\nan upper bound" if settings["suite"] in UPPER_BOUND else ""
    doubt += "" if report.trustworthy else "\nNOT TRUSTWORTHY: a check failed"
    axes.set_title(
        f"suite {_escape.for_figure(settings['suite'])}, {norm_label(settings['norm'])}, "
        f"{describe_radius(settings, limits=False)}, {report.num_examples} examples{doubt}",
        fontsize=10,
    )
    return finish_axes(axes, path, is_own=ax is None, columns=2)


def attack_label(name: str) -> str:
    """Return a reader's name of an attack, such as "targeted APGD on the margin" for `apgd_t_margin`."""
    if name.startswith("check:"):
        return f"the check {name.removeprefix('check:').replace('_', ' ')}"
    parts = name.split("_")
    if parts[0] not in ("fgsm", "pgd", "apgd", "cleverhans"):
        return name.replace("_", " ").capitalize()
    library = "cleverhans's " if parts[0] == "cleverhans" else ""
    parts = parts[1:] if library else parts
    loss = next((LOSS_LABELS[part] for part in parts[1:] if part in LOSS_LABELS), "cross-entropy")
    return f"{'targeted ' if 't' in parts[1:] else ''}{library}{parts[0].upper()} on the {loss}"


def by_severity(report: EvaluationResults) -> list[Check]:
    """Return the checks, failures first."""
    return sorted(report.checks, key=lambda check: BY_SEVERITY.index(check.status))


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
