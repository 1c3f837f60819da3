"""The progress of an evaluation: a bar on a terminal, a line per minute elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

INTERVAL = 60.0  # seconds between two lines


class Progress:
    """Show what an evaluation does, how far it is and how long the rest may take.

    On a terminal one bar moves several times per second. Elsewhere, as in a log file, a line is printed every minute.

    Args:
        enabled: Whether to show anything.
        stream: Where to, by default `sys.stderr`.
        interval: The seconds between two lines where there is no terminal.
    """

    def __init__(self, *, enabled: bool, stream: TextIO | None = None, interval: float = INTERVAL) -> None:
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._interval = interval
        self._done, self._total = 0.0, 1.0
        self._title = ""
        self._stop = threading.Event()
        self._bar: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if not self._enabled:
            return self
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._print_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()

    def update(self, title: str, *, done: float, total: float) -> None:
        """Say what is being done and how far the whole evaluation is.

        Args:
            title: What is being done, a few words.
            done: The work that is done, in any unit.
            total: The work of the whole evaluation, as estimated now.
        """
        self._title, self._done, self._total = title, done, max(total, done, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, description=title, completed=self._done / self._total)

    def line(self) -> str:
        """Return the present state as a line of text."""
        elapsed, share = time.monotonic() - self._began, self._done / self._total
        text = f"after {duration(elapsed)}: {self._title}, {share:.0%} of the work"
        return text + (f", about {duration(elapsed * (1 - share) / share)} left" if share > 0 else "")

    def _print_lines(self) -> None:
        while not self._stop.wait(self._interval):
            print(self.line(), file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Return a time for readers, such as "50 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _make_bar(stream: TextIO) -> Any:
    # Keras depends on rich. It is imported here because most evaluations in programs show no bar.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return RichProgress(*columns, *times, console=Console(file=stream), transient=True)
