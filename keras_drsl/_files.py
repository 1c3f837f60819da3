"""Files that are either complete or absent."""

import contextlib
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from keras_drsl import _escape

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


Parsed = TypeVar("Parsed")


def check_new(name: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a file can be written without losing another, and delete what a killed process left beside it.

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
    try:
        _delete_leftovers(_real(path))
        probe = _temporary(_real(path))
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"`{name}` must lie in a folder that can be written to. Received: {name}={str(path)!r} ({error})"
        ) from error
    return path


@contextlib.contextmanager
def replace(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Provide a binary file that takes the place of `path` at the end. If that fails, the file that was there stays.

    Where `path` is a link, the file that it leads to is replaced.
    """
    path = _real(Path(path))
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # on a file system without locks
                lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file. If that fails, the file that was there stays."""
    with replace(path) as file:
        file.write(text.encode())


def to_json(self: Any, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Write everything to a file. If that fails, a file that was there stays as it is.

    Args:
        self: A result that has `to_dict`. Its class takes this function as a method.
        path: The file.
        overwrite: Whether to replace a file that exists, as `keras.Model.save` does.

    Raises:
        ValueError: If the file exists and `overwrite` is False, or its folder cannot be written to.
        OSError: If the file cannot be written, as on a full disk.
    """
    text = json.dumps(self.to_dict(), indent=1) + "\n"
    write(check_new("path", path, overwrite=overwrite), text)


def parse(path: str | os.PathLike[str], writer: str, read: Callable[[str], Parsed]) -> Parsed:
    """Return what a function reads in the text of a file.

    Args:
        path: The file.
        writer: The method that writes such files, for the error.
        read: The function. It raises `ValueError` for text that breaks a rule.

    Raises:
        ValueError: If the file cannot be read, or its text breaks a rule.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return read(file.read())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`path` must be a file written by `{writer}`. Received: path={str(path)!r} ({_escape.error_line(error)})"
        ) from error


def write_checked(path: str | os.PathLike[str], format_: str, content: dict[str, Any]) -> None:
    """Write content so that `read_checked` notices any damage.

    The file has two lines of JSON: the format with the SHA-256 of the second line, and the content.
    """
    body = json.dumps(content).encode()
    write(path, (_header(format_, body) + body + b"\n").decode())


def read_checked(path: str | os.PathLike[str], format_: str, earlier: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of a file of `write_checked`.

    Args:
        path: The file.
        format_: The format that it must have.
        earlier: The formats of earlier versions, with the last version that reads each.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged or has another format.
    """
    raw = Path(path).read_bytes()
    _, _, rest = raw.partition(b"\n")
    body = rest.removesuffix(b"\n")
    if raw != _header(format_, body) + body + b"\n":
        for name, version in earlier.items():
            if raw.startswith(json.dumps({"format": name})[:-1].encode()):
                raise ValueError(f"written by an earlier version; keras-drsl {version} is the last that reads it")
        raise ValueError("the file is damaged or no state: its checksum does not match")
    content: dict[str, Any] = json.loads(body)
    return content


def begin_state(path: str | os.PathLike[str], format_: str, content: dict[str, Any]) -> None:
    """Write the file of the argument `state_path` for the first time in a run, as `write_checked`.

    Raises:
        ValueError: If it cannot be written.
    """
    check_new("state_path", path, overwrite=Path(path).exists())
    try:
        write_checked(path, format_, content)
    except OSError as error:
        raise ValueError(
            f"`state_path` must be a path that can be written. Received: state_path={str(path)!r} ({error})"
        ) from error


def save_state(path: str | os.PathLike[str], format_: str, content: dict[str, Any]) -> None:
    """Write the progress of a run to its file, as `write_checked`.

    If that fails, as on a full disk, the file keeps what it held, and a warning says so.
    """
    try:
        write_checked(path, format_, content)
    except OSError as error:
        warnings.warn(
            f"The state could not be written, and {str(path)!r} keeps its earlier progress: {error}",
            RuntimeWarning,
            stacklevel=3,
        )


def _header(format_: str, body: bytes) -> bytes:
    return json.dumps({"format": format_, "sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def lock(file: IO[Any]) -> None:
    """Lock a file until it is closed or its process ends.

    Raises:
        BlockingIOError: If it is locked already.
        OSError: On a file system without locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _delete_leftovers(path: Path) -> None:
    """Delete the temporary files of `path` that no living process writes."""
    pattern = f".{path.name}."
    for entry in os.listdir(path.parent):
        token = entry.removeprefix(pattern).removesuffix(".tmp")
        if entry != f"{pattern}{token}.tmp" or len(token) != 8:
            continue
        # Another process may have deleted it meanwhile. On Windows, a file that is open cannot be deleted.
        with contextlib.suppress(OSError):
            with open(path.parent / entry, "r+b") as file:
                lock(file)
            (path.parent / entry).unlink()
