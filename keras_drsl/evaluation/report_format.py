"""The JSON of a report, of this format and of earlier ones."""

import math
from typing import Any

from keras_drsl._renamed import RENAMED, new_name

FORMAT = 2
DERIVED = ("cumulative", "alone")  # what a report computes from the rest


def to_json_values(value: Any) -> Any:
    """Return a value as JSON takes it, with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: to_json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_content(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a report of any format, as a report holds it.

    Raises:
        ValueError: If the format is unknown.
    """
    if content["format"] == 1:
        content = _from_format_1(content)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}")
    checks = [check | {"value": math.nan if check["value"] is None else check["value"]} for check in content["checks"]]
    attacks = [{key: attack[key] for key in attack if key not in DERIVED} for attack in content["attacks"]]
    return content | {"checks": checks, "attacks": attacks}


def _from_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys and the checks of format 1."""
    renamed = {new_name("report", key): value for key, value in content.items()}
    checks = [
        {RENAMED["report.checks"].get(key, key): value for key, value in check.items()} for check in content["checks"]
    ]
    per_example = content["per_example"] | {
        "broken_by": [new_source(name) for name in content["per_example"]["broken_by"]]
    }
    return renamed | {
        "format": FORMAT,
        "checks": [check | {"name": new_name("check", check["name"])} for check in checks],
        "attacks": [attack | {"name": new_source(attack["name"])} for attack in content["attacks"]],
        "per_example": per_example,
    }


def new_source(name: str | None) -> str | None:
    """Return the present name of what broke an example: an attack, or a check in the form `check:NAME`."""
    if name is None or not name.startswith("check:"):
        return name
    return "check:" + new_name("check", name.removeprefix("check:"))
