"""The loop: one turn after the other, waiting prompts into free slots, a step for all slots, tokens to requests.

On one CPU device, which can run two programs at a time, prompts are prefilled in a thread beside the steps, a few of
them ahead of free slots; elsewhere between the steps, as slots become free.
"""

import concurrent.futures
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from qwen2audio_jax.engine.placement import Plan, Residents
from qwen2audio_jax.engine.prompts import Prompts
from qwen2audio_jax.engine.request import Answer, RequestError
from qwen2audio_jax.engine.scheduler import Admission, Waiting
from qwen2audio_jax.engine.slots import Choice, First, Row, Slots
from qwen2audio_jax.engine.stats import Counts
from qwen2audio_jax.engine.work import Work
from qwen2audio_jax.generation.decoding import logits_fault
from qwen2audio_jax.generation.grammars import GrammarError
from qwen2audio_jax.generation.guides import Guide
from qwen2audio_jax.generation.padded_shapes import padded_capacity, prompt_counts, prompt_groups
from qwen2audio_jax.generation.run import prefill_embedded
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampling import NextToken
from qwen2audio_jax.model.cache_pieces import PIECE, Piece
from qwen2audio_jax.parallel.process_rows import own_rows

FEW_STEPS = 4
"""Fewest steps that one of a few rows has to go, for these rows to be computed apart: what their copies cost."""
CALM_STEPS = 32
"""Steps for which a smaller cache would have been enough, before it is made smaller."""
AHEAD = 3
"""Prompts that are prefilled beside steps, or about to be, beyond those that free slots wait for; at most the slots."""
POSITIONS_TOGETHER = 128
"""Most positions of prompts that are prefilled together beside steps, unless one alone has more."""


@dataclass(frozen=True)
class _Issued:
    """Tokens that were issued and not read yet: the row of each request among them."""

    tokens: NextToken
    rows: list[tuple[int, Work]]


@dataclass(frozen=True)
class _Prefilled:
    """Prompts that were prefilled together: their first tokens, and the keys and values of all in pieces."""

    works: list[Work]
    first: First
    parts: tuple[Piece, ...]


class Loop:
    """What an engine does in its thread; no other one calls anything here, but `_prefill` where that is beside steps.

    Args:
        runtime: of the model.
        slots: the state on the device.
        residents: which request is in which slot.
        prompts: encoder and embedding.
        waiting: requests that are ready to begin; other threads add to it.
        admission: when they begin.
        counts: statistics.
        decode: ids to text.
        on_begin: called when a request leaves `waiting`.
        on_end: called with a request and its outcome.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        slots: Slots,
        residents: Residents,
        prompts: Prompts,
        waiting: Waiting[Work],
        admission: Admission,
        counts: Counts,
        decode: Callable[..., str],
        on_begin: Callable[[], None],
        on_end: Callable[[Work, Answer | RequestError], None],
    ):
        self._runtime, self._state, self._residents, self._prompts = runtime, slots, residents, prompts
        self._waiting, self._admission, self._counts = waiting, admission, counts
        self._decode, self._on_begin, self._on_end = decode, on_begin, on_end
        self._issued: deque[_Issued] = deque()
        self._beginning: list[Work] = []  # those that the present turn takes from `waiting`
        self._ready: deque[tuple[Work, _Prefilled, int]] = deque()  # prefilled, and the row; they wait for a slot
        beside = two_at_a_time(runtime)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefill") if beside else None
        self._prefilling: deque[tuple[list[Work], Future[list[_Prefilled]]]] = deque()  # in that thread, in order
        self._calm = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        begun = self._prefilling or self._ready or self._residents.in_use or self._issued
        return bool(begun or len(self._waiting))

    def fail(self, error: RequestError) -> None:
        """End all requests with an error."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        running = {id(work): work for issued in self._issued for _, work in issued.rows}
        begun = [*self._residents.works(), *self._beginning, *self._ahead()]
        running |= {id(work): work for work in begun}
        for left in (self._issued, self._ready, self._prefilling):
            left.clear()
        waiting = self._waiting.drop(lambda work: True)
        for _ in waiting:
            self._on_begin()
        for work in [*running.values(), *waiting]:
            if not work.handle.done:
                self._on_end(work, error)

    def turn(self) -> None:
        """One turn: cancel, admit, step, read."""
        self._drop_cancelled()
        self._admit()
        running = self._residents.works()
        step = bool(running) and not self._better_wait(len(running))
        if step:
            self._step(running)
        while len(self._issued) > (1 if step else 0):
            self._read(self._issued.popleft())
            self._counts.read(left=bool(self._issued or self._prefilling))
        if self._prefilling and not step:
            concurrent.futures.wait([self._prefilling[0][1]])

    def _better_wait(self, running: int) -> bool:
        """Whether all slots should be in use before the next step, which costs the same with fewer.

        The prefill beside it goes on faster without it. Where nobody waits, the rows that run do not wait either.
        """
        return bool(self._prefilling and len(self._waiting)) and running < self._residents.slots

    def _drop_cancelled(self) -> None:
        dropped = self._waiting.drop(lambda work: work.handle.cancelled)
        for _ in dropped:
            self._on_begin()
        for work in [*dropped, *(work for work in self._residents.works() if work.handle.cancelled)]:
            self._finish(work, "cancelled")

    def _admit(self) -> None:
        """Prefill waiting prompts, as many as it is time for, and put those that are ready into free slots."""
        while self._prefilling and self._prefilling[0][1].done():
            prefilled = self._prefilling[0][1].result()  # if it failed, the requests are still there to be told
            self._prefilling.popleft()
            self._take(prefilled)
        self._place()
        room, ahead, slots = self._residents.free, self._ahead(), self._residents.slots
        if self._thread is not None:
            room = min(room + min(AHEAD, slots) - len(ahead), slots)
        lengths = [work.length for work in self._waiting.first(room)]
        if self._thread is not None:
            lengths = lengths[: _few(lengths)]
        count = self._admission.choose(lengths, free=room, running=self._residents.in_use)
        if not count:
            return
        self._beginning = self._waiting.take(count)
        plan = self._residents.plan(self._beginning, ahead=ahead)
        self._waiting.put_back([(work, work.handle.request.priority) for work in plan.later])
        self._beginning = plan.works
        now = time.monotonic()
        for work in plan.works:
            work.began = now
            self._on_begin()
        if plan.works:
            self._counts.issued()
        self._extend(plan)
        if plan.whole and self._thread is not None:
            self._prefilling.append((plan.whole, self._thread.submit(self._prefill, plan.whole, wait=True)))
        elif plan.whole:
            self._take(self._prefill(plan.whole))
            self._place()
        self._beginning = []

    def _ahead(self) -> list[Work]:
        """The requests that have left `waiting` and are in no slot yet."""
        return [work for works, _ in self._prefilling for work in works] + [work for work, _, _ in self._ready]

    def _prefill(self, works: list[Work], *, wait: bool = False) -> list[_Prefilled]:
        """Whole prompts, those of similar length together; `wait` until it is computed."""
        heard = self._prompts.hear(works, [0] * len(works))
        lengths, prefilled = [work.length for work in works], []
        for group in prompt_groups(lengths, config=self._runtime.config, mesh=self._runtime.mesh):
            members = [works[index] for index in group.members]
            starts = [0] * len(members)
            embedded = self._prompts.embed(members, starts, heard, count=group.count, width=group.width)
            with jax.set_mesh(self._runtime.mesh):
                logits, parts = prefill_embedded(self._runtime, embedded)
            prefilled.append(_Prefilled(members, self._first(members, logits, embedded), parts))
        if wait:
            jax.block_until_ready([(each.first.last, each.parts) for each in prefilled])
        return prefilled

    def _take(self, prefilled: Sequence[_Prefilled]) -> None:
        """Have the first tokens read, and the rows wait for slots."""
        for each in prefilled:
            self._issue_first(each.works, each.first)
            self._ready += [(work, each, row) for row, work in enumerate(each.works) if work.budget > 1]

    def _place(self) -> None:
        """Put prompts that are ready into free slots."""
        gone = [work for work, _, _ in self._ready if work.handle.cancelled and not work.handle.done]
        for work in gone:
            self._finish(work, "cancelled")
        self._ready = deque(row for row in self._ready if not row[0].handle.done)
        if self._ready and self._residents.free:
            self._fit(max(work.length for work, _, _ in list(self._ready)[: self._residents.free]))
        while self._ready and self._residents.free:
            work, prefilled, source = self._ready.popleft()
            needed = prefilled.parts[: math.ceil(work.length / PIECE)]
            self._state.insert(prefilled.first, needed, source=source, slot=self._residents.take(work))

    def _extend(self, plan: Plan) -> None:
        """Prompts whose beginnings are in slots; as few at a time as the mesh allows, as each takes a row's copy."""
        most, left = prompt_counts(1, mesh=self._runtime.mesh)[0], dict(plan.extended)
        if left:
            self._fit(max(beginning.tokens + beginning.width for beginning in left.values()))
        while left:
            # One call has one width, for which each of them has room behind its beginning.
            width = next(iter(left.values())).width
            part = [work for work, beginning in left.items() if beginning.width == width][:most]
            found = [left.pop(work) for work in part]
            starts = [beginning.tokens for beginning in found]
            heard = self._prompts.hear(part, starts)
            embedded = self._prompts.embed(part, starts, heard, count=most, width=width)
            logits, rows = self._state.extend(embedded, sources=[beginning.slot for beginning in found], starts=starts)
            first = self._first(part, logits, embedded)
            self._issue_first(part, first)
            kept = {beginning.slot for beginning in left.values()}
            for source, (work, start) in enumerate(zip(part, starts, strict=True)):
                work.reused = start
                if work.budget > 1:
                    self._state.insert_row(first, rows, source=source, slot=self._residents.take(work, kept=kept))

    def _first(self, works: list[Work], logits: jax.Array, embedded: Any) -> First:
        rows = [Row(work.ids, work.seed, work.config, work.guide) for work in works]
        return self._state.first_tokens(logits, embedded, rows)

    def _issue_first(self, works: list[Work], first: First) -> None:
        self._issued.append(_Issued(first.last, list(enumerate(works))))
        for work in works:
            work.issued, work.inputs = 1, None

    def _step(self, running: list[Work]) -> None:
        self._fit(max(work.length + work.issued for work in running), calm=True)
        self._narrow(running)
        choice = Choice.of([work.config for work in running])
        self._state.forward()
        if any(work.guide is not None for work in running):
            tokens = self._state.choose(choice, self._guides(running))
        else:
            tokens = self._state.choose(choice)
        rows = [(self._state.row(work.slot), work) for work in running if work.slot is not None]
        self._issued.append(_Issued(tokens, rows))
        free = self._residents.slots - len(running)
        self._counts.issued()
        self._counts.add(steps=1)
        if len(self._waiting):
            self._admission.stepped(free)
            self._counts.add(full_steps=self._residents.slots, full_row_steps=len(running))
        for work in running:
            work.issued += 1
            if work.issued == work.budget:
                self._residents.release(work)

    def _narrow(self, running: list[Work]) -> None:
        """Compute as few rows as the requests need, while no other is about to come into a slot."""
        if len(self._waiting) or self._prefilling or self._ready:
            return
        slots = [work.slot for work in running if work.slot is not None]
        rows = self._state.fewest(slots)
        if rows < self._state.stepped and max(work.budget - work.issued for work in running) >= FEW_STEPS:
            self._state.narrow(slots, rows=rows)

    def _guides(self, running: list[Work]) -> dict[int, Guide]:
        """The guides of slots, told the last tokens: the host reads these while the device appends them."""
        while self._issued:
            self._read(self._issued.popleft())
        guides: dict[int, Guide] = {}
        for work in running:
            if work.guide is not None and work.slot is not None and not work.handle.done:
                guides[work.slot] = work.guide
        return guides

    def _fit(self, needed: int, *, calm: bool = False) -> None:
        """Give the cache room for the longest row; in `calm` steps a smaller one, once that would have done for long.

        A step reads the whole cache, so its capacity is what the rows of now need, not what they may come to need, and
        one position more: a row that has ended goes on writing, in the end to the last position.
        """
        lengths = [work.length + work.issued for work in self._residents.works()]
        most = min(max([needed, *lengths]) + 1, self._residents.capacity)
        wanted = padded_capacity(most, config=self._runtime.config)
        if calm:
            self._calm = self._calm + 1 if wanted < self._state.capacity else 0
        if calm and wanted < self._state.capacity and self._calm > CALM_STEPS:
            self._residents.cut(wanted)
            self._state.resize(wanted)
            self._calm = 0
        elif wanted > self._state.capacity:
            self._state.resize(wanted)

    def _read(self, issued: _Issued) -> None:
        """Tokens that have arrived, to their requests; what a request had after its end is dropped."""
        read = (issued.tokens.tokens, issued.tokens.log_probs, issued.tokens.state.finished)
        tokens, log_probs, finished = own_rows(self._runtime.mesh, read)
        now, count = time.monotonic(), 0
        for row, work in issued.rows:
            if work.handle.done:
                continue
            fault = logits_fault(log_probs[row], token=len(work.tokens) + 1, dtype=self._runtime.config.dtype)
            if fault is not None:
                self._finish(work, RequestError(fault, kind="logits"))
                continue
            token, count = int(tokens[row]), count + 1
            work.tokens.append(token)
            work.log_probs.append(float(log_probs[row]))
            if not work.first:
                work.first = now
                self._counts.first_token(now - work.submitted)
            work.handle._push(token, work.log_probs[-1])
            if finished[row]:
                self._finish(work, "eos")
            elif work.guide is not None and (error := _refused(work.guide, token)):
                self._finish(work, error)
            elif work.matcher is not None and work.matcher.push(token):
                self._finish(work, "stop_string")
            elif work.config.max_time is not None and now - work.began > work.config.max_time:
                self._finish(work, "time")
            elif len(work.tokens) == work.budget:
                self._finish(work, "length")
        self._counts.add(tokens=count)

    def _finish(self, work: Work, outcome: str | RequestError) -> None:
        if self._residents.release(work):
            assert work.slot is not None
            self._state.stop(work.slot)
        work.inputs = None
        if isinstance(outcome, RequestError):
            self._on_end(work, outcome)
            return
        if outcome != "cancelled":
            self._counts.add(prompt_tokens=work.length, reused_tokens=work.reused, audio_seconds=work.audio_seconds)
        self._on_end(work, work.answer(outcome, decode=self._decode))


def _refused(guide: Guide, token: int) -> RequestError | None:
    """Tell a guide a token; the error of a grammar that has become too complex."""
    try:
        guide.advance(token)
    except GrammarError as error:
        return RequestError(str(error), kind="input")
    return None


def two_at_a_time(runtime: Runtime) -> bool:
    """Whether programs of two threads run side by side: not on accelerators, nor where they have collectives."""
    return runtime.mesh.size == 1 and runtime.mesh.devices.flat[0].platform == "cpu"


def _few(lengths: Sequence[int]) -> int:
    """How many of the first prompts, by their lengths, have `POSITIONS_TOGETHER` at most; at least one."""
    sums = itertools.accumulate(lengths)
    return max(sum(positions <= POSITIONS_TOGETHER for positions in sums), 1)
