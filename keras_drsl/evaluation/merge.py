"""The results of shards, joined."""

from collections.abc import Sequence
from typing import Any

from keras_drsl.evaluation.results import BY_SEVERITY, Check, EvaluationResults


def merge_results(reports: Sequence[EvaluationResults]) -> dict[str, Any]:
    """Join the results of disjoint shards of one data set, and return the arguments of the whole.

    `RobustnessReport.merge` explains the rules and the errors.
    """
    if not reports:
        raise ValueError("`reports` must hold at least one report. Received: none")
    _check_one_evaluation(reports)
    first = reports[0]
    rows = [
        dict(zip(report.per_example, row, strict=True))
        for report in reports
        for row in zip(*report.per_example.values(), strict=True)
    ]
    rows.sort(key=lambda row: row["index"])
    if len({row["index"] for row in rows}) < len(rows):
        raise ValueError("`reports` must be of different examples. Received: two that share some")
    shards = [shard for report in reports for shard in report.settings.get("shards", [report.settings["shard"]])]
    checks = _merge_checks(reports)
    count = shards[0] and shards[0][1]
    missing = [f"{index}/{count}" for index in range(count or 0) if [index, count] not in shards]
    if missing:
        message = f"shards are missing, {', '.join(missing)}: this report is on the others"
        checks.append(Check("shards", "warn", len(missing), message))
    settings = _without_shard(first.settings) | {"shards": shards}
    per_example = {name: [row[name] for row in rows] for name in first.per_example}
    return {
        "settings": settings,
        "attacks": _merge_attacks(reports),
        "checks": checks,
        "per_example": per_example,
        "provenance": first.provenance,
    }


def _check_one_evaluation(reports: Sequence[EvaluationResults]) -> None:
    first = reports[0]
    for other in reports[1:]:
        for key in ("model", "undefended", "data"):
            if first.provenance.get(key) != other.provenance.get(key):
                raise ValueError(f"`reports` must be of one evaluation. Received: two of different {key}")
        if _common(first) != _common(other):
            raise ValueError("`reports` must be of one evaluation. Received: two of different settings or attacks")


def _merge_attacks(reports: Sequence[EvaluationResults]) -> list[dict[str, Any]]:
    """Add up the times and numbers of each attack. A check is among the attacks only where it broke an example."""
    attacks: dict[str, dict[str, Any]] = {}
    for report in reports:
        for attack in report.attacks:
            known = attacks.setdefault(attack["name"], attack | {"seconds": 0.0, "tried": 0})
            known["seconds"] += attack["seconds"]
            known["tried"] += report.accuracy[attack["name"]]["tried"]
    return sorted(attacks.values(), key=lambda attack: attack["name"].startswith("check:"))


def _merge_checks(reports: Sequence[EvaluationResults]) -> list[Check]:
    """Return the worst outcome of each check."""
    worst: dict[str, Check] = {}
    for report in reports:
        for check in report.checks:
            if check.name == "shards":  # is made anew for the reports that are merged
                continue
            known = worst.get(check.name)
            if known is None or BY_SEVERITY.index(check.status) < BY_SEVERITY.index(known.status):
                message = f"{check.message} (the worst of {len(reports)} shards)"
                worst[check.name] = Check(check.name, check.status, check.value, message)
    return list(worst.values())


def _without_shard(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("shard", "shards")}


def _common(report: EvaluationResults) -> tuple[Any, ...]:
    """Return what the reports of all shards of one evaluation have in common."""
    shard = report.settings.get("shard")
    attacks = [
        (attack["name"], attack["settings"]) for attack in report.attacks if not attack["name"].startswith("check:")
    ]
    return _without_shard(report.settings), attacks, shard and shard[1]
