"""Files that are whole or not there at all."""

import os
import tempfile
from pathlib import Path


def check_new(name: str, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The path if a file can be written there and none is lost by it, or `ValueError`."""
    path = Path(path)
    if path.exists() and not (overwrite and path.is_file()):
        raise ValueError(f"`{name}` must be a path where nothing is yet. Received: {name}={str(path)!r}, which exists")
    folder = path.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"`{name}` must lie in a folder that can be written to. Received: {name}={str(path)!r}")
    return path


def write(path: str | os.PathLike, text: str) -> None:
    """Write a whole file or, if that fails, leave what was there."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
