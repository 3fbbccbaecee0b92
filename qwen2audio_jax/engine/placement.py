"""Placement: which request is in which slot, and what each slot's row still holds of the one before."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen2audio_jax.engine.work import Work
from qwen2audio_jax.generation.prefix import common_prefix_length

SHORTEST = 48
"""Fewest tokens that are copied from another slot: to compute so few again costs no more."""
RESTS = (16, 32, 64, 128, 256)
"""Widths in which the rest of a prompt is computed after a copied beginning; a longer one is computed whole."""


@dataclass(frozen=True)
class Beginning:
    """Where the beginning of a prompt is: in a slot's row, so many `tokens`; and the `width` to compute the rest in."""

    slot: int
    tokens: int
    width: int


@dataclass
class Plan:
    """How requests are admitted.

    Attributes:
        whole: prompts that are prefilled from their beginning.
        extended: prompts whose beginning is in a slot.
        later: requests that wait: for one before that will have their beginning, or for a slot to extend it in.
    """

    whole: list[Work] = field(default_factory=list)
    extended: dict[Work, Beginning] = field(default_factory=dict)
    later: list[Work] = field(default_factory=list)

    @property
    def works(self) -> list[Work]:
        """All that are admitted now."""
        return [*self.whole, *self.extended]


class Residents:
    """The slots' requests: those that run, and of free slots those whose keys and values are still there."""

    def __init__(self, slots: int, *, shared: bool, capacity: int):
        """Args: `shared`, whether beginnings are copied between slots; the largest `capacity` of the cache."""
        self.shared, self.capacity = shared, capacity
        self._running: list[Work | None] = [None] * slots
        self._last: list[Work | None] = [None] * slots
        self._released = list(range(slots))  # the next to be taken first

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self._running)

    @property
    def in_use(self) -> int:
        """Number of slots with a request that runs."""
        return len(self._running) - len(self._released)

    @property
    def free(self) -> int:
        """Number of the others."""
        return len(self._released)

    def works(self) -> list[Work]:
        """The requests that run, by slot."""
        return [work for work in self._running if work is not None]

    def take(self, work: Work, *, kept: Collection[int] = ()) -> int:
        """Give a request a free slot, the one released longest ago of those that are not `kept` for another's copy.

        A request that is still to be admitted keeps one at most, so there is always another one.
        """
        slot = next(slot for slot in self._released if slot not in kept)
        self._released.remove(slot)
        self._running[slot] = self._last[slot] = work
        work.slot = slot
        return slot

    def release(self, work: Work) -> bool:
        """Free a request's slot; False if it has none any more."""
        if work.slot is None or self._running[work.slot] is not work:
            return False
        self._running[work.slot] = None
        self._released.append(work.slot)
        return True

    def cut(self, capacity: int) -> None:
        """Forget rows of free slots that fill a cache of this capacity, whose last position is written on and on."""
        for slot in self._released:
            last = self._last[slot]
            if last is not None and last.length + last.issued > capacity:
                self._last[slot] = None

    def plan(self, works: Sequence[Work], *, ahead: Sequence[Work] = ()) -> Plan:
        """How to admit requests.

        Args:
            works: the requests, in order; none goes before one that waits for a slot.
            ahead: those that were admitted whole before and are in no slot yet.
        """
        plan = Plan()
        if not self.shared:
            plan.whole += works
            return plan
        for index, work in enumerate(works):
            beginning = self._longest(work)
            if beginning is not None and len(plan.extended) == self.free:
                plan.later += works[index:]
                break
            if beginning is not None:
                plan.extended[work] = beginning
            elif any(_shares(work.key, other.key) for other in [*plan.works, *ahead]):
                plan.later.append(work)
            else:
                plan.whole.append(work)
        return plan

    def _longest(self, work: Work) -> Beginning | None:
        """The slot that holds most of a prompt's beginning; None if none holds enough, or the rest is too long."""
        slot, tokens = 0, 0
        for index, last in enumerate(self._last):
            if last is not None and _shares(work.key, last.key):
                common = min(common_prefix_length(work.key, last.held()), work.length - 1)
                if common > tokens:
                    slot, tokens = index, common
        width = next((width for width in RESTS if width >= work.length - tokens), None)
        if tokens < SHORTEST or width is None or tokens + width > self.capacity:
            return None
        return Beginning(slot, tokens, width)


def _shares(key: np.ndarray, other: np.ndarray) -> bool:
    """Whether two prompts have a beginning in common that is worth a copy."""
    if min(len(key), len(other)) <= SHORTEST or (key[SHORTEST - 1] != other[SHORTEST - 1]).any():
        return False
    return common_prefix_length(key, other) >= max(SHORTEST, len(key) // 2)
