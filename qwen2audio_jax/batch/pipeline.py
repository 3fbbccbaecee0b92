"""Groups of records on their way through an answerer, two at a time."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from qwen2audio_jax.batch.parts import Row
from qwen2audio_jax.batch.records import Record

DRAIN_SECONDS = 20.0
"""Time that groups under way have after a signal to stop."""


class Pipeline:
    """Two groups at a time, so that the end of one does not leave the answerer idle.

    Leaving it early drops what is under way: an answerer with `close` is closed.
    """

    def __init__(self, answer: Callable[[Sequence[Record]], list[Row]], answerer: Any):
        self._answer, self._answerer = answer, answerer
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="answer")
        self._under_way: deque[tuple[Any, Future[list[Row]]]] = deque()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: object) -> None:
        if self._under_way and hasattr(self._answerer, "close"):
            self._answerer.close()
        self._pool.shutdown(cancel_futures=True)

    def run(
        self, chunks: Iterable[tuple[Any, Sequence[Record]]], *, stop: threading.Event
    ) -> Iterator[tuple[Any, list[Row]]]:
        """The rows of groups, in their order; after `stop` those that are answered within `DRAIN_SECONDS`."""
        waiting, end = iter(chunks), math.inf
        while True:
            while len(self._under_way) < 2 and not stop.is_set() and (chunk := next(waiting, None)) is not None:
                self._under_way.append((chunk[0], self._pool.submit(self._answer, chunk[1])))
            if not self._under_way:
                return
            place, future = self._under_way[0]
            while not future.done():
                if stop.is_set():
                    end = min(end, time.monotonic() + DRAIN_SECONDS)  # for all groups together
                if time.monotonic() > end:
                    return
                wait([future], timeout=0.1)
            self._under_way.popleft()
            yield place, future.result()
