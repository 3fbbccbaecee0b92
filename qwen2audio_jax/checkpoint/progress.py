"""Progress reports: callbacks for Python, a bar for terminals, a line per minute for logs; all on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

LINE_SECONDS = 60.0
"""Seconds between lines of a log."""

_silences: list[None] = []


@contextmanager
def silence() -> Iterator[None]:
    """Inside, nothing is said of what goes on, in no thread: for commands that are told to be quiet."""
    _silences.append(None)
    try:
        yield
    finally:
        _silences.pop()


def tell(text: str) -> None:
    """Say on stderr what is done on the way to what was asked for."""
    if not _silences:
        print(text, file=sys.stderr)


class Report:
    """Byte counter that reports to a `Progress`."""

    def __init__(self, on_progress: Progress | None, total: int, *, done: int = 0):
        self._tell = on_progress
        self._total = total
        self._done = done
        self.add(0)

    def add(self, count: int) -> None:
        """Count `count` more bytes as done."""
        self._done += count
        if self._tell is not None:
            self._tell(self._done, self._total)

    def finish(self) -> None:
        """Report that all bytes are done and safely stored."""
        if self._tell is not None:
            self._tell(self._total, self._total)


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """A progress callback for `convert`: bytes, rate and time left on stderr.

    On a terminal it is a bar; elsewhere a line every `LINE_SECONDS`. With `quiet`, nothing is shown.
    """
    if quiet or _silences:
        yield None
        return
    if not sys.stderr.isatty():
        yield _Lines(label).show
        return
    with tqdm(desc=label, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:

        def show(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
                bar.initial = bar.n = bar.last_print_n = done  # earlier work does not count towards the rate
            bar.update(done - bar.n)

        yield show


class _Lines:
    """Progress as a line on stderr every `LINE_SECONDS`."""

    def __init__(self, label: str):
        self._label = label
        self._start: tuple[float, int] | None = None
        self._last = time.monotonic()
        self._total = 0

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._start is None or total != self._total:  # another total: a following stage, such as the upload
            self._start, self._total = (now, done), total
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        began, before = self._start
        rate = (done - before) / max(now - began, 1e-9)
        left = tqdm.format_interval(round((total - done) / rate)) if rate > 0 else "?"
        print(f"{self._label}: {size(done)} of {size(total)}, {size(rate)}/s, {left} left", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """A number of bytes in readable form: "1.68GB"."""
    return tqdm.format_sizeof(count, "B")


class Clock:
    """Timer for the closing summary: bytes, time, rate."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before: int | None = None
        self._done = 0

    def watch(self, on_progress: Progress | None) -> Progress:
        """An `on_progress` that counts and forwards."""

        def show(done: int, total: int) -> None:
            if self._before is None:
                self._before = done
            self._done = done
            if on_progress is not None:
                on_progress(done, total)

        return show

    def summary(self) -> str:
        """The summary, for example "16.8GB in 01:43, 163MB/s"."""
        seconds = time.monotonic() - self._began
        before = self._before or 0
        rate = (self._done - before) / max(seconds, 1e-9)
        earlier = f" ({size(before)} of it were there already)" if before else ""
        return f"{size(self._done)}{earlier} in {tqdm.format_interval(round(seconds))}, {size(rate)}/s"
