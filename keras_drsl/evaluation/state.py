"""The progress of an evaluation, saved so that a killed one goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from keras_drsl.evaluation import files

FORMAT = "keras-drsl evaluation 1"


class State:
    """What an evaluation has found so far.

    Args:
        path: the file to keep it in, or None to keep it in memory only.
        identity: what must be the same for an evaluation to go on from a file.
        count: the number of examples.

    Attributes:
        broken_by: for each example the attack that broke it, or None.
        done: by attack, the number of batches it has finished.
        seconds: by attack, the time it took.
        audit: the largest perturbation and the like.
        checks: by check, its outcome.

    Raises:
        ValueError: for a file that holds another evaluation or none, or cannot be written.
    """

    FIELDS = ("broken_by", "done", "seconds", "audit", "checks")

    def __init__(self, path: str | os.PathLike | None, identity: dict[str, Any], count: int) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self.broken_by: list[str | None] = [None] * count
        self.done: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.audit: dict[str, float] = {}
        self.checks: dict[str, dict] = {}
        if path is None:
            return
        if Path(path).exists():
            self._load(Path(path))
        else:
            files.check_new("state_path", path)
        self.save()

    def save(self) -> None:
        """Replace the file by one with all that is known now."""
        if self._path is not None:
            content = {"format": FORMAT, "identity": self._identity}
            content |= {name: getattr(self, name) for name in self.FIELDS}
            files.write(self._path, json.dumps(content))

    def _load(self, path: Path) -> None:
        received = f"Received: state_path={str(path)!r}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            known = {name: content[name] for name in self.FIELDS}
            identity = content["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`state_path` must hold the state of an evaluation, or be a path where nothing is yet. {received} "
                f"({type(error).__name__}: {error})"
            ) from error
        different = [key for key in self._identity if identity.get(key) != self._identity[key]]
        if different or len(known["broken_by"]) != len(self.broken_by):
            raise ValueError(
                f"`state_path` must hold the state of this evaluation, but it holds one of another "
                f"{', '.join(different) or 'number of examples'}. {received}"
            )
        vars(self).update(known)
