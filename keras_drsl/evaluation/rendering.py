"""A report as text, as Markdown and as a figure."""

import math
import os
import textwrap

from keras_drsl.evaluation.results import BY_SEVERITY, Check, EvaluationResults
from keras_drsl.plotting import new_figure, norm_label

WIDTH = 80
LOSS_LABELS = {"ce": "cross-entropy", "margin": "margin", "dlr": "logit ratio"}


def to_text(report: EvaluationResults) -> str:
    """Return the report as text of 80 columns, with the message of each check that did not pass."""
    lines = [] if report.trustworthy else ["NOT TRUSTWORTHY: a check failed. The robust accuracy is an upper bound."]
    low, high = report.confidence_interval
    settings = report.settings
    lines += [
        f"robust accuracy  {report.robust_accuracy:7.1%}   95 % interval {low:.1%} to {high:.1%}",
        f"clean accuracy   {report.clean_accuracy:7.1%}   {report.num_examples} examples, norm {settings['norm']}, "
        f"eps {settings['eps']:.4g}, suite {settings['suite']}",
        "",
        f"{'attack':<24}{'tried on':>10}{'withstood':>11}{'robust after':>14}{'seconds':>10}",
    ]
    for attack in report.attacks:
        accuracy = report.accuracy[attack["name"]]
        lines.append(
            f"{attack['name']:<24}{accuracy['tried']:>10}{_percent(accuracy['alone']):>11}"
            f"{accuracy['cumulative']:>14.1%}{attack['seconds']:>10.1f}"
        )
    return "\n".join([*lines, *_check_lines(report)])


def _check_lines(report: EvaluationResults) -> list[str]:
    """Return lines on the checks: those that warn or fail with figure and message, and the names of the others."""
    lines = [""] if report.checks else []
    for status in BY_SEVERITY:
        checks = [check for check in report.checks if check.status == status]
        if status in ("fail", "warn"):
            for check in checks:
                lines.append(f"{status.upper()}: {check.name} = {check.value:.4g}")
                lines += textwrap.wrap(check.message, WIDTH, initial_indent="    ", subsequent_indent="    ")
        elif checks:
            names = f"{'passed' if status == 'pass' else status}: {', '.join(check.name for check in checks)}"
            lines += textwrap.wrap(names, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return lines


def to_markdown(report: EvaluationResults) -> str:
    """Return the report as Markdown: a summary line, a table of attacks, a table of checks with failures first."""
    low, high = report.confidence_interval
    lines = [
        f"Robust accuracy **{report.robust_accuracy:.1%}** (95 % interval {low:.1%} to {high:.1%}), clean "
        f"{report.clean_accuracy:.1%}, on {report.num_examples} examples, norm {report.settings['norm']}, "
        f"eps {report.settings['eps']:.4g}{'' if report.trustworthy else ' - **not trustworthy: a check failed**'}",
        "",
        "| attack | tried on | withstood | robust after it | seconds |",
        "|---|---|---|---|---|",
    ]
    for attack in report.attacks:
        accuracy = report.accuracy[attack["name"]]
        cells = [attack["name"], str(accuracy["tried"]), _percent(accuracy["alone"]), f"{accuracy['cumulative']:.1%}"]
        lines.append(f"| {' | '.join(cells)} | {attack['seconds']:.1f} |")
    if report.checks:
        lines += ["", "| check | outcome | figure | message |", "|---|---|---|---|"]
        lines += [
            f"| {check.name} | {check.status} | {check.value:.4g} | {check.message} |" for check in _by_severity(report)
        ]
    return "\n".join(lines) + "\n"


def plot(report: EvaluationResults, path: str | os.PathLike[str]) -> None:
    """Draw a waterfall: the accuracy without an attack, and after each attack the share that it took away."""
    steps = {"no attack": report.clean_accuracy} | {
        f"after {attack_label(name)}": accuracy["cumulative"] for name, accuracy in report.accuracy.items()
    }
    left = [100 * share for share in steps.values()]
    taken = [before - after for before, after in zip([left[0], *left], left, strict=False)]
    figure, axes = new_figure(height=1.4 + 0.45 * len(steps))
    axes.barh(list(steps), left, color="#0072B2", label="still correct")
    axes.barh(list(steps), taken, left=left, color="#0072B2", alpha=0.25, label="misled by this attack")
    for index, (share, loss) in enumerate(zip(left, taken, strict=True)):
        # Beyond both bars, so that no edge crosses the number.
        axes.annotate(f"{share:.1f}", (share + loss, index), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="accuracy (%)", xlim=(0, 115), xticks=range(0, 101, 20))
    settings = report.settings
    doubt = "" if report.trustworthy else "\nNOT TRUSTWORTHY: a check failed"
    axes.set_title(
        f"suite {settings['suite']}, {norm_label(settings['norm'])}, eps {settings['eps']:.4g}, "
        f"{report.num_examples} examples{doubt}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


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


def _by_severity(report: EvaluationResults) -> list[Check]:
    return sorted(report.checks, key=lambda check: BY_SEVERITY.index(check.status))


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
