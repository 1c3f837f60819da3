"""Files that are either complete or absent."""

import os
from pathlib import Path


def check_new(name: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a file can be written without losing another.

    Args:
        name: The name of the argument that holds the path, for the error.
        path: Where the file will be written.
        overwrite: Whether it may replace a file.

    Raises:
        ValueError: If something exists there, or the folder cannot be written to.
    """
    path = Path(path)
    if path.exists() and not (overwrite and path.is_file()):
        raise ValueError(
            f"`{name}` must be a path where nothing exists. Received: {name}={str(path)!r}, which exists "
            "(`overwrite` replaces a file)"
        )
    probe = _temporary(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"`{name}` must lie in a folder that can be written to. Received: {name}={str(path)!r} ({error})"
        ) from error
    return path


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file. If that fails, the file that was there stays."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
