"""The perturbed inputs that an evaluation keeps: the worst point that was found for each example.

They are kept in memory, or in a file, which outlives a killed process.
"""

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from keras_drsl import _escape, _files
from keras_drsl._data import Examples
from keras_drsl._typing import Array
from keras_drsl.evaluation.context import EvaluationContext
from keras_drsl.evaluation.results import CLEAN, Check
from keras_drsl.models.classifier import compute_rounding, margins, num_predictions, severity

ARRAYS = ("x", "x_adv", "prediction", "confidence", "distance")
REPORT = "report.json"  # the member of a file that holds the report
CHUNK = 1024  # rows that are copied together


def check_argument(keep_examples: Any, state_path: Any) -> bool | Path:
    """Return the argument `keep_examples`, or raise `ValueError` if it is wrong or its file cannot be written."""
    if keep_examples is True and state_path is not None:
        raise ValueError(
            "`keep_examples` must name a file where `state_path` is given, so that examples outlive a killed process "
            "too. Received: keep_examples=True"
        )
    if isinstance(keep_examples, bool):
        return keep_examples
    if not isinstance(keep_examples, str | os.PathLike):
        raise ValueError(f"`keep_examples` must be True, False or a path. Received: keep_examples={keep_examples!r}")
    path = _files.check_new("keep_examples", os.fspath(keep_examples), overwrite=True)
    partial = _partial_of(path)
    if state_path is not None and os.path.realpath(state_path) in (os.path.realpath(path), os.path.realpath(partial)):
        raise ValueError(f"`keep_examples` and `state_path` must be different files. Received: {str(path)!r}")
    if partial.exists() and not _is_store(partial):
        raise ValueError(f"`keep_examples` needs the name {str(partial)!r} meanwhile, where another file exists")
    return path


def _partial_of(path: Path) -> Path:
    """Return the file that holds the points of a running evaluation."""
    return path.with_name(path.name + ".partial")


def is_unfinished(path: Path) -> bool:
    """Return whether an evaluation that runs, or was killed, will write its points to a file."""
    return _partial_of(path).exists()


class Store:
    """Keep the worst point of each row while attacks run.

    Args:
        path: The file that the points will be written to, or None to keep them in memory. Until then they are in a
            file beside it that ends in `.partial`.
        x: The clean inputs, shape `(rows, ...)`.
        identity: The SHA-256 of what must be equal for an evaluation to continue, 64 characters.
        resumes: Whether an earlier process has attacked some rows.

    Raises:
        ValueError: If the points of the earlier process are missing, another evaluation that runs now has the same
            file, or the disk is too small.
    """

    def __init__(self, path: Path | None, x: Array, identity: str, *, resumes: bool) -> None:
        self.path = path
        self.partial = None if path is None else _partial_of(path)
        size = x[0].size * 4
        if self.partial is None:
            self.x_adv, self._scores, is_new = np.empty_like(x), np.empty(len(x), "float32"), True
        else:
            header = identity.encode()
            is_new = not resumes
            if resumes and not (self.partial.exists() and _begins_with(self.partial, header)):
                raise ValueError(
                    "`keep_examples` must name the file that the evaluation in `state_path` began with, as "
                    f"{str(self.partial)!r} holds its examples until it ends. Received: keep_examples={str(path)!r}"
                )
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(open(self.partial, "ab"))
                with contextlib.suppress(OSError):  # on a file system without locks
                    _lock(file, path)
                if is_new:
                    _reserve(file, header, len(header) + len(x) * (4 + size))
                self._open = stack.pop_all()  # the lock lasts until the file is closed
            self._scores = np.memmap(self.partial, "float32", "r+", len(header), (len(x),))
            self.x_adv = np.memmap(self.partial, "float32", "r+", len(header) + 4 * len(x), x.shape)
        if is_new:
            for part in _parts(len(x)):
                self.x_adv[part] = x[part]
            self._scores[:] = -np.inf

    def update(self, rows: Array, x_adv: Array, scores: Array) -> None:
        """Keep points that are worse than those that are kept.

        Args:
            rows: Their rows, shape `(batch,)`.
            x_adv: The points, shape `(batch, ...)`.
            scores: How bad each is: infinity for one that misleads the model, otherwise its margin.
        """
        better = scores > self._scores[rows]
        self.x_adv[rows[better]], self._scores[rows[better]] = x_adv[better], scores[better]

    def scores_of(self, rows: Array) -> Array:
        """Return how bad the points of some rows are."""
        return np.asarray(self._scores[rows])

    def flush(self) -> None:
        """Hand what is kept to the operating system, which keeps it if the process is killed."""
        for array in (self._scores, self.x_adv):
            if isinstance(array, np.memmap):
                array.flush()

    def close(self, *, delete: bool) -> None:
        """Release the file of the points, and delete it or not."""
        if self.partial is not None:
            if delete:  # before another evaluation can lock it
                self.partial.unlink(missing_ok=True)
            self._open.close()


def _lock(file: IO[bytes], path: Path | None) -> None:
    try:
        _files.lock(file)
        if not os.path.exists(file.name) or os.fstat(file.fileno()).st_ino != os.stat(file.name).st_ino:
            raise BlockingIOError("it was deleted meanwhile")
    except BlockingIOError as error:
        raise ValueError(
            "`keep_examples` must be a file of this evaluation only, and another one that runs now has it. "
            f"Received: keep_examples={str(path)!r}"
        ) from error


def _reserve(file: IO[bytes], header: bytes, size: int) -> None:
    """Give a file its header and size, so that a full disk is known now and not when its pages are written."""
    try:
        file.truncate(0)
        file.write(header)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        Path(file.name).unlink(missing_ok=True)
        raise ValueError(
            f"`keep_examples` must lie on a disk with room for {size / 2**20:.0f} MiB. "
            f"Received: {file.name!r} ({error})"
        ) from error


def _is_store(path: Path) -> bool:
    """Return whether a file begins with the SHA-256 of an evaluation, as that of a `Store` does."""
    with open(path, "rb") as file:
        return bool(re.fullmatch(rb"[0-9a-f]{64}", file.read(64)))


def _begins_with(path: Path, header: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def score(context: EvaluationContext, x_adv: Array, rows: Array, is_broken: Array) -> Array:
    """Return how bad points are, as `Store.update` takes it; minus infinity outside the threat model.

    Args:
        context: The evaluation.
        x_adv: The points, shape `(batch, ...)`.
        rows: The rows that they belong to.
        is_broken: Which points count as misleading the model.
    """
    logits = context.model.classifier.logits_in_batches(x_adv, context.batch_size)
    scores = np.where(is_broken, np.inf, severity(logits, context.y[rows]))
    return np.where(context.threat.contains(x_adv, context.x[rows]), scores, -np.inf).astype("float32")


def finish(
    context: EvaluationContext, store: Store, broken_by: list[str | None], examples: Examples
) -> dict[str, Array]:
    """Return what is kept by name: clean inputs, points, predictions there, and sizes of the perturbations.

    Args:
        context: The evaluation.
        store: The points of its rows. Of an example with several rows, that of the row with the largest score is kept.
        broken_by: What broke each row.
        examples: The examples.
    """
    num_labels = examples.num_labels
    num_features = context.x.shape[-1] if examples.layout is None else examples.layout.shape[-1]
    count = len(context.x)
    context.model.seed(context.seed, "kept")  # of a random model
    is_clean = np.array([name == CLEAN for name in broken_by], bool)
    scores = np.where(is_clean, np.inf, store.scores_of(np.arange(count))).reshape(-1, num_labels)
    chosen = np.arange(0, count, num_labels) + scores.argmax(axis=1)
    predictions, confidences, sizes = [], [], []
    for part in _parts(len(chosen)):
        rows = chosen[part]
        x, x_adv = context.x[rows], np.asarray(store.x_adv[rows])
        sizes.append(context.threat.size(x_adv.astype("float64") - x))
        probabilities = _probabilities(context, x_adv, rows, num_labels, num_features)
        predictions.append(probabilities.argmax(axis=-1))
        confidences.append(probabilities.max(axis=-1))
    return {
        "x": (context.x if num_labels == 1 else context.x[chosen])[..., :num_features],
        "x_adv": store.x_adv[..., :num_features] if num_labels == 1 else store.x_adv[chosen][..., :num_features],
        "prediction": np.concatenate(predictions),
        "confidence": np.concatenate(confidences),
        "distance": np.concatenate(sizes),
    }


def _probabilities(context: EvaluationContext, x_adv: Array, rows: Array, num_labels: int, num_features: int) -> Array:
    """Return the probabilities of all classes for points, of each position or label, shape `(points, ..., C)`."""
    if num_labels == 1:
        return _of_outputs(context, x_adv)
    first = rows - rows % num_labels
    answers = []
    # The rows of one example differ in the features that say which label they are about.
    for label in range(num_labels):
        x = np.concatenate([x_adv[..., :num_features], context.x[first + label][..., num_features:]], axis=-1)
        answers.append(_of_outputs(context, x))
    return np.stack(answers, axis=1)


def _of_outputs(context: EvaluationContext, x: Array) -> Array:
    outputs = context.model.model.logits_in_batches(x, context.batch_size)
    if context.model.outputs != "logits":
        return outputs
    exponentials = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def try_again(context: EvaluationContext, store: Store, broken_by: list[str | None]) -> Check:
    """Check once more that each point that counts as misleading the model lies in the ball and does so."""
    broken = np.flatnonzero([name is not None for name in broken_by])
    # A check of a user may say what it broke without the points.
    is_clean = np.array([broken_by[row] == CLEAN for row in broken], bool)
    broken = broken[is_clean | (store.scores_of(broken) == np.inf)]
    failed: list[int] = []
    for part in _parts(len(broken)):
        rows = broken[part]
        x_adv, y = np.asarray(store.x_adv[rows]), context.y[rows]
        is_wrong = context.model.count_wrong(x_adv, y, context.batch_size) == num_predictions(y)
        if y.ndim == 1:
            # In a batch of another size, sums are rounded differently.
            logits = context.model.classifier.logits_in_batches(x_adv, context.batch_size)
            rounding = 4 * compute_rounding(context.model.classifier) * np.abs(logits).max(axis=1)
            is_wrong |= margins(logits, y) >= -rounding
        if context.model.expectation_draws > 1:
            is_wrong[:] = True  # another average may answer otherwise
        failed += rows[~(is_wrong & context.threat.contains(x_adv, context.x[rows]))].tolist()
    message = (
        f"points that count as misleading, of {len(broken)}, and do not mislead the model when they are tried again"
    )
    if failed:
        message += f"; the first is at position {context.ids[failed[0]]}, broken by {broken_by[failed[0]]}"
    return Check("kept_examples", "fail" if failed else "pass", float(len(failed)), message)


def write(file: IO[bytes], report: str, arrays: Mapping[str, Array]) -> None:
    """Write a report and its kept examples as an npz file, a part at a time.

    Args:
        file: The file.
        report: The JSON of the report.
        arrays: The arrays by name.
    """
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(REPORT, report)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in _parts(len(array)):
                    member.write(np.ascontiguousarray(array[part]).tobytes())


class _Arrays(Mapping[str, Array]):
    """The arrays of kept examples by name."""

    def __iter__(self) -> Iterator[str]:
        return iter(ARRAYS)

    def __len__(self) -> int:
        return len(ARRAYS)


class KeptFile(_Arrays):
    """Read the arrays of a file by name, each when it is asked for.

    Args:
        path: The file.

    Raises:
        ValueError: Where an array is asked for, if another file has taken its place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = _identity_of(path)

    def __getitem__(self, name: str) -> Array:
        if not self._path.exists() or _identity_of(self._path) != self._identity:
            raise ValueError(f"The kept examples are gone: {str(self._path)!r} was replaced since the report was read")
        with np.load(self._path, allow_pickle=False) as file:
            return np.asarray(file[name])


def _identity_of(path: Path) -> tuple[int, ...]:
    """Return numbers that change where another file takes the place of one."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class HeldArrays(dict[str, Array]):
    """The arrays of a file that could not be written, which keep the file of the points to themselves.

    Args:
        arrays: The arrays by name.
        store: The store that holds the points.
    """

    def __init__(self, arrays: Mapping[str, Array], store: Store) -> None:
        super().__init__(arrays)
        self.store = store


def read(path: Path) -> tuple[str, KeptFile]:
    """Return the JSON of the report in a file, and its arrays.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    with zipfile.ZipFile(path) as archive:
        names = [REPORT, *(f"{name}.npy" for name in ARRAYS)]
        if sorted(archive.namelist()) != sorted(names):
            raise ValueError(f"it holds {_escape.for_terminal(', '.join(archive.namelist()))}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed")  # a small file could fill the memory
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        return archive.read(REPORT).decode(), KeptFile(path)


def check_fit(arrays: Mapping[str, Array], num_examples: int) -> None:
    """Raise `ValueError` unless there is a finite value of each array for each example, of fitting types and shapes."""
    for name in ARRAYS:
        array = arrays[name]
        if array.dtype.kind not in "fiu" or len(array) != num_examples or not np.isfinite(array).all():
            raise ValueError(f"{name} must hold finite numbers for {num_examples} examples. Received: {array.shape}")
    if arrays["x"].shape != arrays["x_adv"].shape:
        raise ValueError("x and x_adv must have equal shapes")
    prediction = arrays["prediction"]
    if prediction.dtype.kind not in "iu" or prediction.shape != arrays["confidence"].shape or (prediction < 0).any():
        raise ValueError("prediction must hold class ids, one for each confidence")


class MergedArrays(_Arrays):
    """Join the kept examples of several reports by the order of their positions in the data set.

    Args:
        parts: The positions of each report, and its kept examples. Each array is joined when it is asked for.
    """

    def __init__(self, parts: Sequence[tuple[list[int], Mapping[str, Array]]]) -> None:
        self._order = np.argsort(np.concatenate([index for index, _ in parts]), kind="stable")
        self._parts = [arrays for _, arrays in parts]

    def __getitem__(self, name: str) -> Array:
        return np.asarray(np.concatenate([arrays[name] for arrays in self._parts])[self._order])


def merge(parts: Sequence[tuple[list[int], Mapping[str, Array] | None]]) -> MergedArrays | None:
    """Return the kept examples of several reports, or None if one has none."""
    some = [(index, arrays) for index, arrays in parts if arrays is not None]
    return MergedArrays(some) if len(some) == len(parts) else None
