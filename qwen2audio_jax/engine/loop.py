"""The loop: one turn after the other, waiting prompts into free slots, a step for all slots, tokens to requests."""

import math
import time
from collections import deque
from collections.abc import Callable
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
from qwen2audio_jax.model.cache_pieces import PIECE

CALM_STEPS = 32
"""Steps for which a smaller cache would have been enough, before it is made smaller."""


@dataclass(frozen=True)
class _Issued:
    """Tokens that were issued and not read yet: the row of each request among them."""

    tokens: NextToken
    rows: list[tuple[int, Work]]


class Loop:
    """What an engine does in its thread; no other thread calls anything here.

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
        self._calm = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(len(self._waiting) or self._residents.in_use or self._issued)

    def fail(self, error: RequestError) -> None:
        """End all requests with an error."""
        running = {id(work): work for issued in self._issued for _, work in issued.rows}
        running |= {id(work): work for work in [*self._residents.works(), *self._beginning]}
        self._issued.clear()
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
        if running:
            self._step(running)
        while len(self._issued) > (1 if running else 0):
            self._read(self._issued.popleft())
            self._counts.read(left=bool(self._issued))

    def _drop_cancelled(self) -> None:
        dropped = self._waiting.drop(lambda work: work.handle.cancelled)
        for _ in dropped:
            self._on_begin()
        for work in [*dropped, *(work for work in self._residents.works() if work.handle.cancelled)]:
            self._finish(work, "cancelled")

    def _admit(self) -> None:
        """Prefill waiting prompts into free slots, as many as it is time for."""
        free = self._residents.free
        if not free:
            return
        lengths = [work.length for work in self._waiting.first(free)]
        count = self._admission.choose(lengths, free=free, running=self._residents.in_use)
        if not count:
            return
        self._beginning = self._waiting.take(count)
        plan = self._residents.plan(self._beginning)
        for work in plan.later:
            self._waiting.add(work, priority=work.handle.request.priority)
        now = time.monotonic()
        for work in plan.works:
            work.began = now
            self._on_begin()
        rests = [beginning.tokens + beginning.width for beginning in plan.extended.values()]
        self._fit(max([work.length for work in plan.works] + rests))
        self._counts.issued()
        self._extend(plan)
        self._prefill(plan.whole)
        self._beginning = []

    def _prefill(self, works: list[Work]) -> None:
        """Whole prompts, those of similar length together."""
        if not works:
            return
        heard = self._prompts.hear(works, [0] * len(works))
        lengths = [work.length for work in works]
        for group in prompt_groups(lengths, config=self._runtime.config, mesh=self._runtime.mesh):
            members = [works[index] for index in group.members]
            starts = [0] * len(members)
            embedded = self._prompts.embed(members, starts, heard, count=group.count, width=group.width)
            with jax.set_mesh(self._runtime.mesh):
                logits, parts = prefill_embedded(self._runtime, embedded)
            first = self._first(members, logits, embedded)
            for source, work in enumerate(members):
                if work.budget > 1:
                    needed = parts[: math.ceil(work.length / PIECE)]
                    self._state.insert(first, needed, source=source, slot=self._residents.take(work))

    def _extend(self, plan: Plan) -> None:
        """Prompts whose beginnings are in slots; as few at a time as the mesh allows, as each takes a row's copy."""
        most, left = prompt_counts(1, mesh=self._runtime.mesh)[0], dict(plan.extended)
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
            kept = {beginning.slot for beginning in left.values()}
            for source, (work, start) in enumerate(zip(part, starts, strict=True)):
                work.reused = start
                if work.budget > 1:
                    self._state.insert_row(first, rows, source=source, slot=self._residents.take(work, kept=kept))

    def _first(self, works: list[Work], logits: jax.Array, embedded: Any) -> First:
        rows = [Row(work.ids, work.seed, work.config, work.guide) for work in works]
        first = self._state.first_tokens(logits, embedded, rows)
        self._issued.append(_Issued(first.last, list(enumerate(works))))
        for work in works:
            work.issued, work.inputs = 1, None
        return first

    def _step(self, running: list[Work]) -> None:
        self._fit(max(work.length + work.issued for work in running), calm=True)
        choice = Choice.of([work.config for work in running])
        if any(work.guide is not None for work in running):
            tokens = self._guided_step(running, choice)
        else:
            tokens = self._state.step(choice)
        self._issued.append(_Issued(tokens, [(work.slot, work) for work in running if work.slot is not None]))
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

    def _guided_step(self, running: list[Work], choice: Choice) -> NextToken:
        """A step in two programs: while the device appends the last tokens, the host reads them."""
        self._state.forward()
        while self._issued:
            self._read(self._issued.popleft())
        guides: dict[int, Guide] = {}
        for work in running:
            if work.guide is not None and work.slot is not None and not work.handle.done:
                guides[work.slot] = work.guide
        return self._state.choose(choice, guides)

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
        tokens, log_probs, finished = jax.device_get(
            (issued.tokens.tokens, issued.tokens.log_probs, issued.tokens.state.finished)
        )
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
