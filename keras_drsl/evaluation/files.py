"""Files that are whole or not there at all."""

import os
from pathlib import Path


def check_new(name: str, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The path if a file can be written there and none is lost by it, or `ValueError`."""
    path = Path(path)
    if path.exists() and not (overwrite and path.is_file()):
        raise ValueError(
            f"`{name}` must be a path where nothing is yet. Received: {name}={str(path)!r}, which exists (to replace "
            "it, say so by `overwrite`)"
        )
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"`{name}` must lie in a folder that can be written to. Received: {name}={str(path)!r} ({error})"
        ) from error
    return path


def write(path: str | os.PathLike, text: str) -> None:
    """Write a whole file or, if that fails, leave what was there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
