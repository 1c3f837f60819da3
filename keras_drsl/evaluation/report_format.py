"""The JSON of a report, of this format and of earlier ones: how it is written, read and validated."""

import json
import math
from collections.abc import Iterator
from typing import Any

from keras_drsl import _schema
from keras_drsl._renamed import RENAMED, new_name
from keras_drsl._schema import Rule
from keras_drsl.evaluation.results import BY_SEVERITY, CLEAN, Check, EvaluationResults
from keras_drsl.threat import ThreatModel

FORMAT = 2
COST = ("gradients", "queries", "compile_seconds")  # of an attack; earlier reports lack them
DERIVED = ("cumulative", "alone")  # what a report computes from the rest


def _is_shard(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
    return is_pair and 0 <= value[0] < value[1]


POSITION = _schema.integer(at_least=0)
COUNT = _schema.integer(at_least=1)
SHARD = _schema.optional(Rule("[i, n] with 0 <= i < n", _is_shard))
NAME_OR_POSITION = Rule("a text or a position", lambda value: _schema.TEXT.obeys(value) or POSITION.obeys(value))
REPORT = {
    "format": Rule(str(FORMAT), lambda value: type(value) is int and value == FORMAT),
    "clean_accuracy": _schema.SHARE,
    "robust_accuracy": _schema.SHARE,
    "confidence_interval": _schema.list_of(_schema.SHARE),
    "num_examples": COUNT,
    "trustworthy": _schema.BOOL,
    "settings": _schema.DICT,
    "attacks": _schema.list_of(_schema.DICT),
    "checks": _schema.list_of(_schema.DICT),
    "provenance": _schema.DICT,
    "per_example": _schema.dict_of(_schema.LIST),
}
SETTINGS = {
    "eps": Rule(
        "a positive number, or nested lists of numbers",
        lambda value: _schema.NUMBERS.obeys(value) and (isinstance(value, list) or value > 0),
    ),
    "norm": Rule('"inf", 2 or 1', lambda value: value == "inf" or (type(value) is int and value in (1, 2))),
    "suite": _schema.NAME,
    "clip_min": _schema.NUMBERS,
    "clip_max": _schema.NUMBERS,
    "mask": Rule("nested lists of true and false", lambda value: _schema.is_nested(value, _schema.BOOL.obeys)),
    "preprocessing": _schema.NAME,
    "expectation_draws": COUNT,
    "output": NAME_OR_POSITION,
    "attack_input": NAME_OR_POSITION,
    "task": Rule('"multilabel" or "positions"', lambda value: value in ("multilabel", "positions")),
    "which": POSITION,
    "ignore_class": Rule("an integer", lambda value: type(value) is int),
    "checks": Rule(
        "a suite or a list of names",
        lambda value: _schema.TEXT.obeys(value) or _schema.list_of(_schema.TEXT).obeys(value),
    ),
    "seed": POSITION,
    "batch_size": COUNT,
    "max_samples": _schema.optional(COUNT),
    "outputs": _schema.TEXT,
    "precision": Rule("a number in (0, 0.5)", lambda value: _schema.SHARE.obeys(value) and 0 < value < 0.5),
    "at_least": Rule("a number in (0, 1]", lambda value: _schema.SHARE.obeys(value) and value > 0),
    "num_given": COUNT,
    "shard": SHARD,
    "shards": _schema.list_of(SHARD),
}
REQUIRED_SETTINGS = ("eps", "norm", "suite")
ATTACK = {
    "name": Rule(
        f"a text that is neither empty nor {CLEAN!r}", lambda value: _schema.NAME.obeys(value) and value != CLEAN
    ),
    "settings": _schema.DICT,
    "seconds": _schema.SECONDS,
    "compile_seconds": _schema.SECONDS,
    "gradients": POSITION,
    "queries": POSITION,
    "tried": POSITION,
    "cumulative": _schema.SHARE,
    "alone": _schema.optional(_schema.SHARE),
}
CHECK = {
    "name": _schema.NAME,
    "status": Rule(f"one of {', '.join(BY_SEVERITY)}", lambda value: value in BY_SEVERITY),
    "value": _schema.optional(_schema.NUMBER),
    "message": _schema.TEXT,
}
PROVENANCE = {
    "model": _schema.TEXT,
    "undefended": _schema.optional(_schema.TEXT),
    "data": _schema.TEXT,
    "pool": _schema.optional(_schema.DICT),
    "classes": _schema.list_of(_schema.TEXT),
    "versions": _schema.DICT,
}
LABELS = _schema.list_of(Rule("0 or 1", lambda value: type(value) is int and value in (0, 1)))
PER_EXAMPLE = {
    "file": _schema.list_of(_schema.TEXT),
    "prediction": _schema.list_of(POSITION),
    "index": _schema.list_of(POSITION),
    "label": Rule(
        "a list of class ids, or of lists of 0 and 1",
        lambda value: _schema.list_of(POSITION).obeys(value) or _schema.list_of(LABELS).obeys(value),
    ),
    "broken_by": _schema.list_of(_schema.optional(_schema.NAME)),
    "broken_by_label": _schema.list_of(_schema.list_of(_schema.optional(_schema.NAME))),
    "broken_rounded": _schema.list_of(_schema.BOOL),
    "positions": _schema.list_of(COUNT),
    "wrong": _schema.list_of(_schema.list_of(POSITION)),
}
OPTIONAL = ("file", "prediction", "label", "broken_rounded", "broken_by_label", "positions", "wrong")  # of PER_EXAMPLE


def to_json_values(value: Any) -> Any:
    """Return a value as JSON takes it, with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: to_json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_content(results: EvaluationResults) -> dict[str, Any]:
    """Return everything that a report holds and what follows from it, as JSON takes it."""
    content = {
        "format": FORMAT,
        "clean_accuracy": results.clean_accuracy,
        "robust_accuracy": results.robust_accuracy,
        "confidence_interval": list(results.confidence_interval),
        "num_examples": results.num_examples,
        "trustworthy": results.trustworthy,
        "settings": results.settings,
        "attacks": [
            {key: value for key, value in attack.items() if key != "tried"} | accuracy
            for attack, accuracy in zip(results.attacks, results.accuracy.values(), strict=True)
        ],
        "checks": [vars(check) for check in results.checks],
        "provenance": results.provenance,
        "per_example": results.per_example,
    }
    values: dict[str, Any] = to_json_values(content)
    return values


def read_results(text: str) -> EvaluationResults:
    """Return the results in the JSON of a report of any format.

    Raises:
        ValueError: If the text is no report, breaks a rule, or contradicts itself.
    """
    content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    _schema.check_value("report", content, _schema.DICT)
    if type(content.get("format")) is int and content["format"] == 1:
        try:
            content = _from_format_1(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no report of format 1: {type(error).__name__}: {error!r}") from error
    _check_structure(content)
    results = EvaluationResults(
        content["settings"],
        [{key: attack[key] for key in attack if key not in DERIVED} for attack in content["attacks"]],
        [
            Check(**check | {"value": math.nan if check["value"] is None else float(check["value"])})
            for check in content["checks"]
        ],
        content["per_example"],
        content["provenance"],
    )
    _check_robust_counts(results)
    _check_of_shards(results)
    _check_equal("report", to_content(results), content)
    return results


def shards_of(results: EvaluationResults) -> list[tuple[int, int] | None]:
    """Return the shards that results were merged from, or the only one; None stands for the whole data set."""
    shards = results.settings.get("shards", [results.settings.get("shard")])
    return [None if shard is None else (shard[0], shard[1]) for shard in shards]


def missing_shards(shards: list[tuple[int, int] | None]) -> tuple[int, Iterator[int]]:
    """Return how many shards are missing, and which, of shards of one data set."""
    present = {shard[0] for shard in shards if shard is not None}
    count = next((shard[1] for shard in shards if shard is not None), 0)
    return count - len(present), (index for index in range(count) if index not in present)


def _check_structure(content: Any) -> None:
    """Check every field by itself, and what fields say about each other, except for the accuracies."""
    _schema.check_fields("report", content, REPORT)
    settings, names = content["settings"], [attack.get("name") for attack in content["attacks"]]
    _schema.check_fields(
        "settings", settings, SETTINGS, may_lack=set(SETTINGS) - set(REQUIRED_SETTINGS), may_hold_more=True
    )
    _schema.check_fields("provenance", content["provenance"], PROVENANCE, may_lack=PROVENANCE, may_hold_more=True)
    _schema.check_fields("per_example", content["per_example"], PER_EXAMPLE, may_lack=OPTIONAL, may_hold_more=True)
    for position, attack in enumerate(content["attacks"]):
        _schema.check_fields(f"attacks[{position}]", attack, ATTACK, may_lack=COST)
    for position, check in enumerate(content["checks"]):
        _schema.check_fields(f"checks[{position}]", check, CHECK)
    _check_unique("attacks", names)
    _check_unique("checks", [check["name"] for check in content["checks"]])
    _check_examples(content["per_example"], [CLEAN, *names])
    names_of_classes = content["provenance"].get("classes")
    is_of_classes = all(isinstance(label, int) for label in content["per_example"].get("label", [None]))
    if names_of_classes is not None and not is_of_classes:
        raise ValueError("`provenance.classes` must be left out for examples of several labels or positions")
    if names_of_classes is not None and max(content["per_example"]["label"]) >= len(names_of_classes):
        raise ValueError("`provenance.classes` must name the class of each label. Received: too few names")
    _check_threat(settings)
    _check_shards(settings, content["per_example"]["index"])


def _check_unique(where: str, names: list[Any]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{where}` must have different names. Received: {twice!r} twice")


def _check_examples(per_example: dict[str, list[Any]], sources: list[str]) -> None:
    lengths = {name: len(values) for name, values in per_example.items()}
    if len(set(lengths.values())) != 1 or not lengths["index"]:
        raise ValueError(f"`per_example` must hold lists of one length of 1 or more. Received: lengths {lengths}")
    if len(set(per_example["index"])) < lengths["index"]:
        raise ValueError("`per_example.index` must hold each position once. Received: one twice")
    for name, rounded in zip(per_example["broken_by"], per_example.get("broken_rounded", []), strict=False):
        if rounded != (name is not None) and (name in (None, CLEAN)):
            raise ValueError(
                "`per_example.broken_rounded` must be true for an example that is misclassified without an attack, and "
                f"false for a robust one. Received: {rounded!r} where `broken_by` is {name!r}"
            )
    unknown = set(per_example["broken_by"]) - {None, *sources}
    if unknown:
        raise ValueError(f"`per_example.broken_by` must hold names of `attacks`. Received: {min(unknown)!r}")
    if ("label" in per_example) == ("wrong" in per_example) or ("wrong" in per_example) != ("positions" in per_example):
        raise ValueError("`per_example` must hold `label`, or both `wrong` and `positions`. Received: other fields")
    if "wrong" in per_example:
        _check_positions(per_example, len(sources))
    else:
        _check_labels(per_example, sources)


def _check_positions(per_example: dict[str, list[Any]], num_columns: int) -> None:
    """Check the numbers of wrong positions: one without an attack, one per attack, and one after the checks."""
    for row, count in zip(per_example["wrong"], per_example["positions"], strict=True):
        if len(row) != num_columns + 1 or row != sorted(row) or row[-1] > count:
            raise ValueError(
                f"`per_example.wrong` must hold {num_columns + 1} numbers for each example, none smaller than the one "
                f"before, and at most its `positions`. Received: {row} of {count}"
            )


def _check_labels(per_example: dict[str, list[Any]], sources: list[str]) -> None:
    """Check that what broke the labels of each example, if it has several, fits them and what broke the example."""
    rows = per_example.get("broken_by_label")
    are_lists = {isinstance(label, list) for label in per_example["label"]}
    if are_lists != {rows is not None}:
        raise ValueError("`per_example` must hold `broken_by_label` where `label` holds lists, and only there")
    if rows is None:
        return
    lengths = {len(row) for row in [*rows, *per_example["label"]]}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"`per_example.broken_by_label` must have one item per label. Received: {sorted(lengths)}")
    for row, name in zip(rows, per_example["broken_by"], strict=True):
        if name != next((source for source in sources if source in row), None) or not set(row) <= {None, *sources}:
            raise ValueError(
                "`per_example.broken_by` must be the first of `attacks` that broke a label. "
                f"Received: {name!r} where `broken_by_label` is {row!r}"
            )


def _check_threat(settings: dict[str, Any]) -> None:
    if ("clip_min" in settings) != ("clip_max" in settings):
        raise ValueError("`settings` must hold `clip_min` and `clip_max`, or neither. Received: one")
    if "clip_min" in settings:
        fields = {name: settings[name] for name in ("eps", "norm", "clip_min", "clip_max", "mask") if name in settings}
        try:
            ThreatModel(**fields)
        except ValueError as error:
            raise ValueError(f"`settings` must hold a threat model. {error}") from error


def _check_shards(settings: dict[str, Any], index: list[int]) -> None:
    """Check that the shards are different ones of one data set, and that each example lies in one of them."""
    if ("shard" in settings) == ("shards" in settings) or settings.get("shards") == []:
        raise ValueError("`settings` must hold either `shard` or `shards`. Received: both or none")
    shards = settings.get("shards", [settings.get("shard")])
    pairs = {None if shard is None else tuple(shard) for shard in shards}
    counts = {None if shard is None else shard[1] for shard in shards}
    if len(pairs) < len(shards) or len(counts) > 1:
        raise ValueError("`settings.shards` must hold different shards of one data set. Received: others")
    max_samples = settings.get("max_samples")
    if max_samples is not None and len(index) > max_samples:
        raise ValueError(f"`per_example` must hold at most `max_samples` examples. Received: {len(index)}")
    if None not in pairs:
        outside = [position for position in index if (position % shards[0][1], shards[0][1]) not in pairs]
        if outside:
            raise ValueError(f"`per_example.index` must lie in the shards. Received: {outside[0]!r:.20}")


def _check_robust_counts(results: EvaluationResults) -> None:
    """Check how many examples each attack was tried on."""
    if results.num_positions is not None:
        return
    robust = results.num_examples - results.per_example["broken_by"].count(CLEAN)
    limit = robust
    checks = {f"check:{check.name}" for check in results.checks}
    for attack in results.attacks:
        name, broken = attack["name"], results.per_example["broken_by"].count(attack["name"])
        # A check attacks some of the examples that are left. It may run before the attacks.
        least, most = (broken, limit) if name.startswith("check:") else (robust, robust)
        if name.startswith("check:") and name not in checks:
            raise ValueError(f"`attacks` must name checks of the report. Received: {name!r}")
        if not least <= attack["tried"] <= most:
            raise ValueError(f"`attacks` must have {name!r} tried on {least} to {most}. Received: {attack['tried']}")
        robust -= broken


def _check_of_shards(results: EvaluationResults) -> None:
    """Check that a merged report, and no other, says which shards are missing."""
    count = missing_shards(shards_of(results))[0] if "shards" in results.settings else 0
    if [check.value for check in results.checks if check.name == "shards"] != [count] * bool(count):
        raise ValueError("`checks` must hold `shards` if shards are missing, with their number. Received: another")


def _check_equal(where: str, expected: Any, received: Any) -> None:
    """Raise `ValueError` where a report says something else than what follows from its examples."""
    if isinstance(expected, dict) and isinstance(received, dict) and expected.keys() == received.keys():
        for key in expected:
            _check_equal(f"{where}.{key}", expected[key], received[key])
    elif isinstance(expected, list) and isinstance(received, list) and len(expected) == len(received):
        for position, pair in enumerate(zip(expected, received, strict=True)):
            _check_equal(f"{where}[{position}]", *pair)
    elif _schema.is_number(expected) and _schema.is_number(received):
        # Another version or processor may round differently.
        if not (expected == received or math.isclose(expected, received, rel_tol=1e-9, abs_tol=1e-12)):
            raise ValueError(f"`{where}` must be {expected}, as the examples say. Received: {received}")
    elif expected != received or type(expected) is not type(received):
        raise ValueError(f"`{where}` must be {expected!r:.60}, as the examples say. Received: {received!r:.60}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique("keys", [key for key, _ in pairs])
    return dict(pairs)


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
