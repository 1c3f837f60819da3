"""The style of all figures: one size, one colour per loss, one way to write a norm.

Matplotlib is optional. It is imported when a figure is made.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_drsl import _files
from keras_drsl._typing import Norm

# Colours that readers with colour blindness can tell apart, after Okabe and Ito. Brown, red, purple and grey complete
# them.
LOSS_COLORS = {
    "cross-entropy": "#E69F00",
    "DRSLoss": "#0072B2",
    "label smoothing": "#56B4E9",
    "PRSLoss": "#CC79A7",
    "Squentropy": "#009E73",
    "guided complement entropy": "#5C3A1E",
    "complement objective": "#C9B800",
    "probabilistically compact loss": "#999999",
    "logit squeezing": "#C1272D",
    "z-loss": "#6A3D9A",
}


def loss_color(label: str) -> str:
    """Return the colour of a loss from a label that contains its name, such as "DRSLoss, lam 0.3".

    A label without a known loss is black.
    """
    return next((color for name, color in LOSS_COLORS.items() if name.lower() in label.lower()), "#000000")


def norm_label(norm: Norm) -> str:
    """Return a norm as axes and titles show it."""
    return "L∞" if norm == "inf" else f"L{norm}"


def new_figure(width: float = 6.4, height: float = 4.0, *, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """Return an empty figure that no window shows, and its axes.

    The background is white and opaque, so that the figure can be read on a dark page.

    Args:
        width: The width in inches. At 150 dots per inch, 6.4 inches are 960 pixels.
        height: The height in inches.
        columns: How many axes, side by side.
        rows: How many axes, one below the other.

    Returns:
        `(figure, axes)`, or `(figure, array of axes)` for several columns or rows.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need `pip install matplotlib`") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns)
    for drawn in figure.axes:
        drawn.spines[["top", "right"]].set_visible(False)
        drawn.grid(alpha=0.25)
        drawn.set_axisbelow(True)
    return figure, axes


def begin_axes(
    path: str | os.PathLike[str] | None, ax: Any, *, overwrite: bool, height: float = 4.0
) -> tuple[Path | None, Any]:
    """Check the path of a figure, and return it with the axes to draw in.

    Args:
        path: The file of the figure, or None for no file.
        ax: The axes that a user gave, or None for a figure of its own.
        overwrite: Whether a file may be replaced.
        height: The height of a new figure in inches.

    Raises:
        ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
        ImportError: Without matplotlib.
    """
    checked = None if path is None else _files.check_new("path", path, overwrite=overwrite)
    return checked, new_figure(height=height)[1] if ax is None else ax


def draw_shares(axes: Any, x: Any, shares: Any, intervals: Any, label: str | None, style: str = "-") -> None:
    """Draw shares in percent, with their intervals as a band.

    Args:
        axes: The axes to draw in.
        x: Where the shares lie, shape `(count,)`.
        shares: Numbers in [0, 1], shape `(count,)`.
        intervals: Their intervals, shape `(count, 2)`.
        label: The name in the legend, or None.
        style: The style of the line, as Matplotlib takes it.
    """
    low, high = 100 * np.array(intervals).T
    (line,) = axes.plot(x, np.multiply(shares, 100), style, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)


def finish_axes(axes: Any, path: str | os.PathLike[str] | None, *, is_own: bool, columns: int = 0) -> Any:
    """Add a legend, write the figure, and return its axes.

    Args:
        axes: The axes that were drawn in.
        path: The file of the figure, or None for no file.
        is_own: Whether the figure has no other axes, so that the legend may stand below them.
        columns: The number of columns of the legend, or 0 for no legend.
    """
    if columns and is_own:
        axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    elif columns:
        axes.legend(frameon=False)
    if path is not None:
        save_figure(axes.figure, path)
    return axes


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, whose ending names the kind of figure. If that fails, a file that was there stays."""
    with _files.replace(path) as file:
        figure.savefig(file, dpi=150, format=Path(path).suffix[1:].lower() or None)
