"""The progress of an evaluation, saved so that a killed one continues where it was."""

import json
import os
from pathlib import Path
from typing import Any

from keras_drsl import _files

FORMAT = "keras-drsl evaluation 2"
# The formats of earlier versions, with the last version that reads each.
EARLIER_FORMATS = {"keras-drsl evaluation 1": "0.1.0"}


class State:
    """Keep the progress of an evaluation, in a file or in memory.

    Args:
        path: The file to keep it in, or None to keep it in memory only.
        identity: What must be equal for an evaluation to continue from a file.
        count: The number of examples.

    Attributes:
        broken_by: For each example the attack that broke it, or None.
        done: By attack, the number of batches that it has finished.
        seconds: By attack, the time that it took.
        audit: The fields of `keras_drsl.evaluation.context.Audit`.
        checks: By check, its outcome.

    Raises:
        ValueError: If the file holds another evaluation or none, or cannot be written.
    """

    FIELDS = ("broken_by", "done", "seconds", "audit", "checks")

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, Any], count: int) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self.broken_by: list[str | None] = [None] * count
        self.done: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.audit: dict[str, Any] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if Path(path).exists():
            self._load(Path(path))
        else:
            _files.check_new("state_path", path)
        self.save()

    def save(self) -> None:
        """Write everything that is known now to the file."""
        if self._path is not None:
            content = {"format": FORMAT, "identity": self._identity}
            content |= {name: getattr(self, name) for name in self.FIELDS}
            _files.write(self._path, json.dumps(content))

    def _load(self, path: Path) -> None:
        received = f"Received: state_path={str(path)!r}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] in EARLIER_FORMATS:
                version = EARLIER_FORMATS[content["format"]]
                raise ValueError(f"written by an earlier version; keras-drsl {version} is the last that reads it")
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            known = {name: content[name] for name in self.FIELDS}
            identity = content["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`state_path` must hold the state of an evaluation, or be a path where nothing exists. {received} "
                f"({type(error).__name__}: {error})"
            ) from error
        different = [key for key in self._identity if identity.get(key) != self._identity[key]]
        if different or len(known["broken_by"]) != len(self.broken_by):
            raise ValueError(
                "`state_path` must hold the state of this evaluation, but it holds that of another one. Different: "
                f"{', '.join(different) or 'number of examples'}. {received}"
            )
        vars(self).update(known)
