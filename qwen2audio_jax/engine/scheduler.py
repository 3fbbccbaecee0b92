"""Scheduling: which requests go next, and how many at a time. Pure Python; what it decides on is given as numbers."""

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_POSITIONS = 8192
"""Prompt positions that are computed between two steps at most, unless one prompt alone has more: the rows that are
being decoded wait for them."""


class Waiting(Generic[T]):
    """Requests that wait for a slot: of a higher priority first, then in the order in which they came.

    Any thread may call its methods.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._numbers = itertools.count()
        self._earlier = itertools.count(-1, -1)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, item: T, *, priority: int) -> None:
        """Put an item behind those of its priority."""
        with self._lock:
            heapq.heappush(self._heap, (-priority, next(self._numbers), item))

    def put_back(self, taken: Sequence[tuple[T, int]]) -> None:
        """Put items that were taken, with their priorities, before all others of theirs, in this order."""
        with self._lock:
            for item, priority in reversed(taken):
                heapq.heappush(self._heap, (-priority, next(self._earlier), item))

    def take(self, most: int) -> list[T]:
        """Remove the first `most` items, in order."""
        with self._lock:
            return [heapq.heappop(self._heap)[2] for _ in range(min(most, len(self._heap)))]

    def first(self, most: int) -> list[T]:
        """The first `most` items, in order, which stay."""
        with self._lock:
            return [item for _, _, item in heapq.nsmallest(most, self._heap)]

    def drop(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Remove all unwanted items."""
        with self._lock:
            gone = [entry[2] for entry in self._heap if unwanted(entry[2])]
            if gone:
                self._heap = [entry for entry in self._heap if not unwanted(entry[2])]
                heapq.heapify(self._heap)
            return gone


@dataclass
class Admission:
    """The rule for when waiting prompts are prefilled.

    A prefill of few positions takes as long as one of `reading` positions: that of reading the weights. Where more
    requests are on their way to fill it, a free slot can wait for them; but a step of which slots are empty is wasted
    in part. So a prefill that would not fill the device starts when the empty slots have cost as much as its start
    would: when they add up to all slots for one step. At that the waste is at most twice the least possible.

    Attributes:
        slots: of the engine.
        reading: see `grouping.plan_groups`, times the parts that rows are split over.
    """

    slots: int
    reading: int
    _idle: int = 0

    def stepped(self, free: int) -> None:
        """Count a step in which so many slots were empty while requests waited."""
        self._idle += free

    def choose(self, lengths: Sequence[int], *, free: int, running: int) -> int:
        """How many of the waiting prompts (their lengths in order) to prefill now."""
        count, positions = 0, 0
        for length in lengths[:free]:
            if count and positions + length > MOST_POSITIONS:
                break
            count, positions = count + 1, positions + length
        if running and positions < self.reading and self._idle < self.slots:
            return 0
        self._idle = 0
        return count
