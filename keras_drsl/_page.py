"""Pages in HTML: their templates, charts and lists of settings."""

import importlib
import importlib.resources
from collections.abc import Iterable, Sequence
from typing import Any

from keras_drsl import _escape


def check_installed(*modules: str) -> None:
    """Raise `ImportError` unless `jinja2`, or `PIL.Image` for pages with images, can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError("HTML reports need `pip install jinja2`, and those with images also `pillow`") from error


def render(template: str, values: dict[str, Any]) -> str:
    """Return a page.

    Args:
        template: The path of its template within the package.
        values: What the template asks for.

    Raises:
        ImportError: Without Jinja.
    """
    check_installed("jinja2")
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(name: str) -> str:
        return importlib.resources.files("keras_drsl").joinpath(name).read_text(encoding="utf-8")

    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, loader=FunctionLoader(read), **options)
    return environment.get_template(template).render(values)


def chart(
    radii: Sequence[float],
    shares: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    ticks: Iterable[float],
    dots: bool,
    marked: float | None = None,
) -> dict[str, Any]:
    """Return the places of a curve of shares by radius in a drawing of 640 x 300.

    Args:
        radii: The radii, in rising order.
        shares: The share at each radius, in [0, 1].
        intervals: Its interval.
        ticks: The radii to name on the axis.
        dots: Whether to draw each point.
        marked: A radius to mark, or None.
    """
    largest = max(radii) or 1.0

    def place(radius: float, share: float) -> tuple[float, float]:
        return round(56 + 564 * radius / largest, 1), round(250 - 234 * share, 1)

    points = [place(*pair) for pair in zip(radii, shares, strict=True)]
    lows, highs = zip(*intervals, strict=True)
    band = [place(*pair) for pair in zip(radii, highs, strict=True)]
    band += [place(*pair) for pair in reversed(list(zip(radii, lows, strict=True)))]
    return {
        "grid": [{"y": place(0, share)[1], "text": f"{100 * share:.0f} %"} for share in (0, 0.25, 0.5, 0.75, 1)],
        "ticks": [{"x": place(radius, 0)[0], "text": f"{radius:.3g}"} for radius in ticks],
        "points": [{"x": x, "y": y} for x, y in points] if dots else [],
        "line": " ".join(f"{x},{y}" for x, y in points),
        "band": " ".join(f"{x},{y}" for x, y in band),
        "marked": place(marked, 0)[0] if marked is not None and marked <= largest else None,
    }


def settings(settings: dict[str, Any], provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings and the provenance of a report as rows of a table."""
    names = ("model", "undefended", "data", "backend", "device")
    values = dict(settings) | {name: provenance[name] for name in names if name in provenance}
    values |= {f"version of {name}": value for name, value in provenance.get("versions", {}).items()}
    shown = {name: str(value) for name, value in values.items() if value is not None}
    return [
        (_escape.for_terminal(str(name)), _escape.for_terminal(text if len(text) <= 200 else text[:200] + "..."))
        for name, text in shown.items()
    ]
