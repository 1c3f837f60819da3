"""The progress of certificates, saved so that a killed run goes on where it was."""

import json
import os
import time
from pathlib import Path
from typing import Any

from keras_drsl import _files, _schema

FORMAT = "keras-drsl certificates 1"
EVERY = 5.0  # seconds between two writes
ROW = {
    "prediction": _schema.optional(_schema.integer(at_least=-1)),
    "radius": _schema.NOT_NEGATIVE,
    "hits": _schema.integer(at_least=0),
    "draws": _schema.integer(at_least=1),
}


class State:
    """Keep the rows of finished examples, in a file or in memory.

    Args:
        path: The file to keep them in, or None to keep them in memory only.
        identity: What must be equal for a run to continue from a file.

    Attributes:
        rows: The row of each finished example by its position in the data set, as text.

    Raises:
        ValueError: If the file is damaged, holds another run or none, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self._written = time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if Path(path).exists():
            self.rows = self._read(path)
        _files.begin_state(path, FORMAT, self._content())

    def add(self, index: int, row: dict[str, Any]) -> None:
        """Add the row of an example, and write the file if that is some time ago."""
        self.rows[str(index)] = row
        if time.monotonic() - self._written > EVERY:
            self.save()

    def save(self) -> None:
        """Write all rows to the file. If that fails, the file keeps what it held, and a warning says so."""
        if self._path is not None:
            _files.save_state(self._path, FORMAT, self._content())
        self._written = time.monotonic()

    def _content(self) -> dict[str, Any]:
        return {"identity": self._identity, "rows": self.rows}

    def _read(self, path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
        received = f"Received: state_path={str(path)!r}"
        try:
            content = _files.read_checked(path, FORMAT, {})
            _schema.check_fields("state", content, {"identity": _schema.DICT, "rows": _schema.DICT})
            for index, row in content["rows"].items():
                _schema.check_fields(f"rows.{index}", row, ROW)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                "`state_path` must hold the state of `certify`, or be a path where nothing exists. "
                f"{received} ({error})"
            ) from error
        different = [key for key, value in self._identity.items() if content["identity"].get(key) != value]
        if different:
            raise ValueError(
                "`state_path` must hold the state of this run, but it holds that of another one. Different: "
                f"{', '.join(different)}. {received}"
            )
        rows: dict[str, dict[str, Any]] = content["rows"]
        return rows
