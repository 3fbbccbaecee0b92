"""What goes on before the first word of an answer: a line on stderr that says what, and for how long."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 15.0
"""Seconds until the first line; on a terminal it is then renewed every second, elsewhere written anew now and then."""


@contextmanager
def status(what: str, *, quiet: bool = False, alone: bool = True) -> Iterator[None]:
    """Say on stderr what takes long inside, and for how long.

    Args:
        what: the words.
        quiet: say nothing.
        alone: whether nothing else writes to stderr inside: a terminal then gets a line that is renewed and goes again
            at the end; else one at the beginning and one at the end. What is no terminal gets a line now and then, and
            none where the work is quick.
    """
    if quiet:
        yield
        return
    if not alone and sys.stderr.isatty():
        began = time.monotonic()
        print(what, file=sys.stderr, flush=True)
        yield
        print(f"{what}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        return
    done = threading.Event()
    thread = threading.Thread(target=_tell, args=(what, done, sys.stderr.isatty()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tell(what: str, done: threading.Event, terminal: bool) -> None:
    began, wait = time.monotonic(), TERMINAL_SECONDS if terminal else LOG_SECONDS
    shown = False
    while not done.wait(wait):
        line = f"{what}: {time.monotonic() - began:.0f} s"
        print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
        wait = 1.0 if terminal else 2 * wait
        shown = True
    if shown and terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
