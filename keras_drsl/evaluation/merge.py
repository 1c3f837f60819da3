"""The results of shards, joined.

Every rule here is associative and commutative, so that merging in any order and in several levels gives equal reports.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from keras_drsl._data import join_rows
from keras_drsl.evaluation.report_format import COST, missing_shards, shards_of
from keras_drsl.evaluation.results import BY_SEVERITY, Check, EvaluationResults


def merge_results(reports: Sequence[EvaluationResults]) -> dict[str, Any]:
    """Join the results of disjoint shards of one data set, and return the arguments of the whole.

    `RobustnessReport.merge` explains the rules and the errors.
    """
    if not reports:
        raise ValueError("`reports` must hold at least one report. Received: none")
    _check_one_evaluation(reports)
    first = reports[0]
    per_example = join_rows([report.per_example for report in reports])
    shards = [shard for report in reports for shard in shards_of(report)]
    if len(set(shards)) < len(shards):
        raise ValueError("`reports` must be of different shards. Received: two of one shard")
    shards.sort(key=lambda shard: shard or ())
    return {
        "settings": _without_shard(first.settings) | {"shards": [shard and [*shard] for shard in shards]},
        "attacks": _merge_attacks(reports),
        "checks": _merge_checks(reports) + _missing_shards_check(shards),
        "per_example": per_example,
        "provenance": _merge_facts([report.provenance for report in reports]),
    }


def _check_one_evaluation(reports: Sequence[EvaluationResults]) -> None:
    first = reports[0]
    if any(report.may_stop_early for report in reports):
        raise ValueError("`reports` must be of whole shards. Received: one that could end early")
    for other in reports[1:]:
        for key in ("model", "undefended", "data", "pool"):
            if first.provenance.get(key) != other.provenance.get(key):
                raise ValueError(f"`reports` must be of one evaluation. Received: two of different {key}")
        if _common(first) != _common(other):
            raise ValueError("`reports` must be of one evaluation. Received: two of different settings or attacks")


def _common(report: EvaluationResults) -> tuple[Any, ...]:
    """Return what the reports of all shards of one evaluation have in common."""
    attacks = [
        (attack["name"], attack["settings"]) for attack in report.attacks if not attack["name"].startswith("check:")
    ]
    counts = {shard and shard[1] for shard in shards_of(report)}
    return _without_shard(report.settings), attacks, counts, list(report.per_example)


def _without_shard(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("shard", "shards")}


def _merge_attacks(reports: Sequence[EvaluationResults]) -> list[dict[str, Any]]:
    """Add up the times and numbers of each attack. A check is among the attacks only where it broke an example."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        for attack in report.attacks:
            tried = {"tried": int(report.accuracy[attack["name"]]["tried"])}
            by_name.setdefault(attack["name"], []).append(attack | tried)
    # All reports have the same attacks in the same order. Only checks may differ, and have an order of their own.
    names = sorted(by_name, key=lambda name: (name.startswith("check:"), name if name.startswith("check:") else ""))
    return [_add_up(by_name[name]) for name in names]


def _add_up(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the records of one attack. Numbers that one of them lacks are left out."""
    keys = [key for key in ("seconds", "tried", *COST) if all(key in record for record in records)]
    return {
        "name": records[0]["name"],
        "settings": records[0]["settings"],
        **{key: _total([record[key] for record in records]) for key in keys},
    }


def _total(numbers: list[Any]) -> Any:
    """Add up integers, or seconds as integers: a sum of floats depends on their order."""
    if all(isinstance(number, int) for number in numbers):
        return sum(numbers)
    return sum(round(1e6 * number) for number in numbers) / 1e6


def _merge_checks(reports: Sequence[EvaluationResults]) -> list[Check]:
    """Return the worst outcome of each check, by name. Of equally bad ones it is that of the largest figure."""

    def badness(check: Check) -> tuple[Any, ...]:
        figure = (True, 0.0) if math.isnan(check.value) else (False, -check.value)
        return BY_SEVERITY.index(check.status), figure, check.message

    by_name: dict[str, list[Check]] = {}
    for report in reports:
        for check in report.checks:
            if check.name != "shards":  # is made again for the reports that are merged
                by_name.setdefault(check.name, []).append(check)
    return [min(by_name[name], key=badness) for name in sorted(by_name)]


def _missing_shards_check(shards: list[tuple[int, int] | None]) -> list[Check]:
    """Return a warning if shards are missing, which names the first ones."""
    count, missing = missing_shards(shards)
    if not count:
        return []
    total = count + len(shards)
    named = [f"{index}/{total}" for index in itertools.islice(missing, 10)]
    rest = f" and {count - len(named)} more" if count > len(named) else ""
    message = f"shards are missing, {', '.join(named)}{rest}: this report is on the others"
    return [Check("shards", "warn", float(count), message)]


def _merge_facts(facts: Sequence[Any]) -> Any:
    """Return what several reports record of one thing: the value on which all agree, or a list of the different ones.

    Dictionaries are merged by key.
    """
    if all(fact == facts[0] for fact in facts):
        return facts[0]
    if any(isinstance(fact, dict) for fact in facts):
        dicts = [fact for fact in facts if isinstance(fact, dict)]
        keys = sorted({key for fact in dicts for key in fact})
        return {key: _merge_facts([fact[key] for fact in dicts if key in fact]) for key in keys}
    different = {json.dumps(part) for fact in facts for part in (fact if isinstance(fact, list) else [fact])}
    values = [json.loads(text) for text in sorted(different)]
    return values[0] if len(values) == 1 else values
