"""SIGTERM and SIGINT during a batch job: the first lets the records in work end, the second has its usual effect.

Only the main thread can handle signals: in another one nothing changes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def draining() -> Iterator[threading.Event]:
    """An event that the first signal sets."""
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        stop.set()
        print("stopping after the records in work; the same signal again stops at once", file=sys.stderr, flush=True)

    with _handling(on_signal):
        yield stop


@contextmanager
def first_signal_ignored() -> Iterator[None]:
    """Leave the first signal to process 0."""

    def on_signal(number: int, frame: Any) -> None:
        print("process 0 ends the job; the same signal again stops at once", file=sys.stderr, flush=True)
        signal.signal(number, signal.SIG_DFL)

    with _handling(on_signal):
        yield


@contextmanager
def _handling(on_signal: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
