"""Parts of the figures: the names that readers see, bars, legends, titles."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from keras_drsl.plotting import LOSS_COLORS, loss_color

Bar = tuple[str, str, Sequence[float]]  # label, colour, one value per seed in %

SMALL = 9  # points: 12 pixels in a picture of 600
DATASETS = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}
BARS_LABEL = "robust accuracy (%); bar: mean, dot: one seed"

# Names of losses, by the names in the records.
FIT_LOSSES = {"ce": "cross-entropy", "drs": "DRSLoss"}
TRAINED_LOSSES = {"ce": "cross-entropy", "ls": "label smoothing", "drs": "DRSLoss"}
COMPARED_LOSSES = {
    "cross_entropy": "cross-entropy",
    "label_smoothing": "label smoothing",
    "DRSLoss": "DRSLoss",
    "PRSLoss": "PRSLoss",
    "Squentropy": "Squentropy",
    "GuidedComplementEntropy": "guided complement entropy",
    "ComplementObjective": "complement objective",
    "ProbabilisticallyCompactLoss": "probabilistically compact loss",
    "LogitSqueezing": "logit squeezing",
    "ZLoss": "z-loss",
    "copies": "DRSLoss, consistency",
    "copies_ce": "cross-entropy, consistency",
    "copies_apart": "DRSLoss, consistency, beta 0",
}
DIVERSITY_LOSSES = {
    "ce": "cross-entropy",
    "ls": "label smoothing",
    "squentropy": "Squentropy",
    "cot": "complement objective",
    "pc": "probabilistically compact loss",
    "prs": "PRSLoss",
    "zloss": "z-loss",
    "gce": "guided complement entropy",
    "squeezing": "logit squeezing",
    "drs_0.1": "DRSLoss, lam 0.1",
    "drs_0.3": "DRSLoss, lam 0.3",
    "drs_1": "DRSLoss, lam 1",
    "drs_3": "DRSLoss, lam 3",
}
# Names of trainings: the method, and the variant after the first underscore.
METHODS = {"clean": "usual training", "fgsm": "FGSM", "pgd": "PGD", "trades": "TRADES"}
VARIANTS = {
    "margin": "attack on the margin",
    "loss": "attack on the whole loss",
    "attacked": "DRSLoss on attacked images",
    "both": "clean and attacked images",
    "rising": "lam rises",
}
TIMED_LOSSES = {
    "drs_xla": "DRSLoss, XLA",
    "prs_xla": "PRSLoss, XLA",
    "drs": "DRSLoss, default",
    "prs": "PRSLoss, default",
}


def method_label(method: str) -> str:
    """Return a reader's name of a training, such as "PGD, attack on the whole loss" for `pgd_loss`."""
    base, _, variant = method.partition("_")
    return METHODS[base] + (f", {VARIANTS[variant]}" if variant else "")


def diversity_marker(label: str) -> dict[str, Any]:
    """Return a marker per strength of `DRSLoss`, all in the colour of the loss."""
    shapes = {"lam 0.1": "^", "lam 0.3": "s", "lam 1": "D", "lam 3": "P"}
    return {"marker": shapes.get(label.rpartition(", ")[2], "o"), "ls": "", "ms": 6, "color": loss_color(label)}


def draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    """Draw horizontal bars, the highest mean first, with a dot per value and the mean as text."""
    bars = sorted(bars, key=lambda bar: -fmean(bar[2]))
    means = [fmean(values) for _, _, values in bars]
    axes.barh(range(len(bars)), means, color=[color for _, color, _ in bars])
    for place, (mean, (_, _, values)) in enumerate(zip(means, bars, strict=True)):
        axes.plot(values, [place] * len(values), "o", ms=3.5, color="black", mec="white", mew=0.6)
        axes.annotate(
            f"{mean:.1f}", (max(values), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=SMALL)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.15 * max(max(values) for _, _, values in bars))
    axes.set_ylim(len(bars) - 0.4, -0.6)


def eps_label(eps: float) -> str:
    """Return an eps as readers write it: 0.15, or 8/255 for a value without a short decimal."""
    text = f"{eps:g}"
    return text if len(text) <= 5 else f"{255 * eps:.3g}/255"


def count_seeds(seeds: set[int]) -> str:
    """Return the numbers of seeds in a figure as its title says them."""
    low, high = min(seeds), max(seeds)
    if low == high:
        return "one seed" if low == 1 else f"{low} seeds"
    return f"{low} to {high} seeds"


def set_title(axes: Any, text: str) -> None:
    """Write the title in a size that fits the width."""
    axes.set_title(text, fontsize=10)


def add_legend(figure: Any, columns: int = 2) -> None:
    """Put the legend below the axes, where it covers no data."""
    figure.legend(loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)


def add_color_legend(figure: Any, losses: Sequence[str]) -> None:
    """Name the colours of bars below the axes."""
    from matplotlib.patches import Patch

    handles = [Patch(color=LOSS_COLORS[loss], label=loss) for loss in losses]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(losses), fontsize=SMALL, frameon=False)
