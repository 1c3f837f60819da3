"""The progress of an evaluation, saved so that a killed one continues where it was."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from keras_drsl import _files, _schema
from keras_drsl.evaluation.results import BY_SEVERITY, Check

FORMAT = "keras-drsl evaluation 2"
# The formats of earlier versions, with the last version that reads each.
EARLIER_FORMATS = {"keras-drsl evaluation 1": "0.1.0"}


def _is_outcome(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in dataclasses.fields(Check)}
        and value["status"] in BY_SEVERITY
        and isinstance(value["value"], float)  # NaN included
        and isinstance(value["name"], str)
        and isinstance(value["message"], str)
    )


FIELDS = {
    "broken_by": _schema.list_of(_schema.optional(_schema.NAME)),
    "broken_rounded": _schema.list_of(_schema.BOOL),
    "wrong": _schema.dict_of(_schema.list_of(_schema.integer(at_least=0))),
    "done": _schema.dict_of(_schema.integer(at_least=0)),
    "seconds": _schema.dict_of(_schema.SECONDS),
    "compile_seconds": _schema.dict_of(_schema.SECONDS),
    "gradients": _schema.dict_of(_schema.integer(at_least=0)),
    "queries": _schema.dict_of(_schema.integer(at_least=0)),
    "audit": _schema.dict_of(_schema.NOT_NEGATIVE),
    "checks": _schema.dict_of(_schema.Rule("the outcome of a check", _is_outcome)),
}


class State:
    """Keep the progress of an evaluation, in a file or in memory.

    Args:
        path: The file to keep it in, or None to keep it in memory only.
        identity: What must be equal for an evaluation to continue from a file, the order of attacks included.
        count: The number of examples.

    Attributes:
        broken_by: For each example the attack that broke it, or None.
        broken_rounded: For each example whether it was also broken by an image of integer values.
        wrong: For a model of positions, by attack: for each example, how many are wrong at the worst point so far.
            Under `"clean"`, how many are without an attack; under `"checks_before"` and `"checks"`, after the checks.
        done: By attack, the number of batches that it has finished.
        seconds: By attack, the time that it took.
        compile_seconds: By attack, how much of it programs were compiled.
        gradients: By attack, the number of gradients that it computed.
        queries: By attack, the number of inputs that it evaluated the model on without a gradient.
        audit: The fields of `keras_drsl.evaluation.context.Audit`.
        checks: By check, its outcome.

    Raises:
        ValueError: If the file is damaged, holds another evaluation or none, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, Any], count: int) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self.broken_by: list[str | None] = [None] * count
        self.broken_rounded = [False] * count
        self.wrong: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.compile_seconds: dict[str, float] = {}
        self.gradients: dict[str, int] = {}
        self.queries: dict[str, int] = {}
        self.audit: dict[str, Any] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if Path(path).exists():
            self._load(Path(path))
        _files.begin_state(path, FORMAT, self._content())

    def save(self) -> None:
        """Write everything that is known now to the file.

        If that fails, as on a full disk, the file keeps what it held, and a warning says so.
        """
        if self._path is not None:
            _files.save_state(self._path, FORMAT, self._content())

    def _content(self) -> dict[str, Any]:
        return {"identity": self._identity} | {name: getattr(self, name) for name in FIELDS}

    def _load(self, path: Path) -> None:
        content = read_state(path)
        received = f"Received: state_path={str(path)!r}"
        identity = content.pop("identity")
        # As text, so that another order of attacks is another evaluation.
        different = [key for key in self._identity if json.dumps(identity.get(key)) != json.dumps(self._identity[key])]
        lengths = {len(content[name]) for name in ("broken_by", "broken_rounded")}
        if different or lengths != {len(self.broken_by)}:
            raise ValueError(
                "`state_path` must hold the state of this evaluation, but it holds that of another one. Different: "
                f"{', '.join(different) or 'number of examples'}. {received}"
            )
        vars(self).update(content)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the identity and the progress that a file holds.

    Raises:
        ValueError: If the file is damaged or holds no state.
    """
    try:
        content = _files.read_checked(path, FORMAT, EARLIER_FORMATS)
        _schema.check_fields("state", content, {"identity": _schema.DICT} | FIELDS)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            "`state_path` must hold the state of an evaluation, or be a path where nothing exists. "
            f"Received: state_path={str(path)!r} ({error})"
        ) from error
    return content
