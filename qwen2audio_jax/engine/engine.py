"""The engine: requests in, answers out, continuously batched in the slots of one cache.

    with Engine(model, processor, slots=16) as engine:
        handles = [engine.submit(Request(prompt="What is said?", clips=(path,))) for path in paths]
        answers = [handle.result() for handle in handles]

A thread of its own takes turns: put waiting prompts into free slots, issue a step for all slots, read the tokens of the
step before. So the device has the next step when it ends one, and a row's end is seen one step late; what was computed
after it is dropped. A slot whose row ends by its budget is free at once.

On one CPU device another thread prefills beside the steps, a few prompts ahead of free slots.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2audio_jax.engine.handle import Handle
from qwen2audio_jax.engine.loop import Loop
from qwen2audio_jax.engine.placement import Residents
from qwen2audio_jax.engine.prepare import Hearing, Preparation, Prepared
from qwen2audio_jax.engine.prompts import Prompts
from qwen2audio_jax.engine.request import Answer, EngineFull, Request, RequestError, as_request_error
from qwen2audio_jax.engine.scheduler import Admission, Waiting
from qwen2audio_jax.engine.slots import Slots
from qwen2audio_jax.engine.stats import Counts
from qwen2audio_jax.engine.warmup import warm_up
from qwen2audio_jax.engine.work import Bounds, Work, make_work
from qwen2audio_jax.generation.guides import Guide, make_guides
from qwen2audio_jax.generation.memory import cache_bytes, check_fits, free_bytes
from qwen2audio_jax.generation.padded_shapes import (
    padded_capacity,
    reading_positions,
    step_rows,
)
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampling_params import EOS_SLOTS
from qwen2audio_jax.generation.warmup import OnProgress, make_bounds
from qwen2audio_jax.parallel.process_rows import data_indices_per_group, share_of
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration

POSITIONS = 2048
"""Positions of a slot, unless a number is given: a prompt with two clips of 30 s, and an answer."""
SLOTS_ON_CPU = 8
MOST_SLOTS = 256
CACHE_SHARE = 0.8
"""Share of an accelerator's free memory that the cache may take."""


class Engine:
    """An engine of one model on one mesh, in one process. `submit` and the handles may be used from any thread.

    Greedy answers (in float32, with an unquantised cache) are those of `generate` with that prompt alone, whatever
    else runs; drawn ones depend on the request's seed.
    """

    def __init__(
        self,
        model: "Qwen2AudioForConditionalGeneration",
        processor: Qwen2AudioProcessor,
        *,
        slots: int | None = None,
        positions: int | None = None,
        queue: int | None = None,
        workers: int = 0,
        clips_kept: int = 32,
        share_prefixes: bool = True,
        truncation: bool = False,
        allow_truncated: bool = False,
        track: int | None = None,
        allow_private_urls: bool = False,
        allow_special: bool = False,
    ):
        """Allocate the slots and start the engine's thread.

        Args:
            model: it keeps its weights; `generate` may be used beside the engine.
            processor: of the same checkpoint.
            slots: rows that are decoded at a time. Default: 8 on CPUs, elsewhere what fits the memory, up to 256.
            positions: most tokens of a prompt and its answer together. Default: 2048, or the model's if it has fewer.
            queue: most requests that are not in a slot yet; default: four for each slot.
            workers: processes that load clips, each with limits on time and memory, so that no file can end or stall
                this process. The program's main module must be guarded (`if __name__ == "__main__":`). 0: threads.
            clips_kept: clips whose audio vectors are kept, for further requests on them.
            share_prefixes: copy the keys and values of a prompt's beginning from the slot of an earlier request with
                the same beginning (several questions on one clip; the turns of a chat).
            truncation: keep the beginning of clips that are too long instead of refusing them.
            allow_truncated: hear files that are shorter than they say, as far as they go; the answers say so.
            track: number, from 0, of the audio track of files that have several.
            allow_private_urls: also fetch clips from addresses that are not public.
            allow_special: let messages write control tokens.

        Raises:
            ValueError: a number out of range, a cache beyond the devices' memory, or a mesh over several processes.
        """
        runtime = model.runtime
        if not share_of(runtime.mesh).alone:
            raise ValueError("an engine runs in one process, and this model's mesh spans several: use generate")
        limit = runtime.config.text_config.max_position_embeddings
        positions = min(POSITIONS, limit) if positions is None else positions
        if not 1 <= positions <= limit:
            raise ValueError(f"positions={positions}: a slot has 1 to {limit}, as the model")
        slots = _default_slots(model, positions) if slots is None else slots
        queue = 4 * slots if queue is None else queue
        workers = workers or 0
        for name, value, least in (("slots", slots, 1), ("queue", queue, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: at least {least}")
        rows = step_rows(slots, mesh=runtime.mesh, dtype=runtime.config.dtype)[-1]
        largest = padded_capacity(positions, config=runtime.config)
        check_fits(
            runtime.config.text_config,
            rows=_cache_rows(runtime, slots),
            capacity=largest,
            dtype=np.dtype(runtime.cache_dtype),
            mesh=runtime.mesh,
        )
        self.slots, self.positions = slots, positions
        self._model, self._runtime, self._processor = model, runtime, processor
        stops = max(EOS_SLOTS, len(model.generation_config.eos_token_id))
        self._bounds = Bounds(positions, stops)
        self._state = Slots(runtime, rows=rows, capacity=padded_capacity(1, config=runtime.config), stops=stops)
        self._prompts = Prompts(runtime, kept=clips_kept, together=slots)
        # An int8 cache gives a prompt's beginning rounded, where a whole prefill has it exact.
        self._residents = Residents(slots, shared=share_prefixes and runtime.cache_dtype != "int8", capacity=largest)
        self._waiting: Waiting[Work] = Waiting()
        self._counts = Counts()
        self._loop = Loop(
            runtime,
            slots=self._state,
            residents=self._residents,
            prompts=self._prompts,
            waiting=self._waiting,
            admission=Admission(slots, reading_positions(runtime.mesh) * data_indices_per_group(runtime.mesh)),
            counts=self._counts,
            decode=processor.decode,
            on_begin=self._unqueue,
            on_end=lambda work, outcome: self._end(work.handle, outcome),
        )
        self._lock = threading.Condition()
        self._turning = threading.Lock()  # held for a turn, and by what else needs the slots
        self._queue, self._queued, self._open = queue, 0, 0
        self._closing = False
        self._broken: Exception | None = None
        hearing = Hearing(
            truncation=truncation,
            allow_truncated=allow_truncated,
            track=track,
            allow_private_urls=allow_private_urls,
            allow_special=allow_special,
        )
        self._preparation = Preparation(processor, hearing=hearing, workers=workers)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        *,
        block: bool = True,
        timeout: float | None = None,
        on_change: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Queue a request.

        Args:
            request: what is wrong with it is its handle's error.
            block: wait while the queue is full; False: raise at once.
            timeout: seconds to wait at most.
            on_change: called with the handle after each token and at the end, in the engine's thread; quick.

        Raises:
            EngineFull: the queue is full.
            RuntimeError: the engine is closed, or its device failed.
        """
        handle = Handle(request, decode=self._decode, on_change=on_change)
        with self._lock:
            free = self._lock.wait_for(self._has_room, timeout) if block else self._has_room()
            if self._broken is not None:
                raise RuntimeError(str(self.end())) from self._broken
            if self._closing:
                raise RuntimeError("the engine is closed")
            if not free:
                raise EngineFull(f"{self._queued} requests wait already: try again later, or raise queue")
            self._queued += 1
            self._open += 1
        self._counts.add(submitted=1)
        try:
            work = make_work(
                handle,
                defaults=self._model.generation_config,
                processor=self._processor,
                bounds=self._bounds,
                vocab_size=self._runtime.config.text_config.vocab_size,
            )
        except RequestError as error:
            self._unqueue()
            self._end(handle, error)
            return handle
        handle._wake = self._wake
        cancel = self._preparation.submit(request, lambda prepared: self._prepared(work, prepared))

        def wake() -> None:
            cancel()
            self._wake()

        handle._wake = wake
        return handle

    @property
    def failure(self) -> Exception | None:
        """The device's error, after which no request is answered any more; None while all is well."""
        return self._broken

    @property
    def model(self) -> "Qwen2AudioForConditionalGeneration":
        """The model that answers."""
        return self._model

    def end(self) -> RequestError:
        """The error of requests that an engine which failed or was closed does not answer."""
        if self._broken is not None:
            return RequestError(f"the model's device failed ({type(self._broken).__name__})", kind="device")
        return RequestError("the engine was closed before the answer was whole", kind="closed")

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer | RequestError]:
        """The answers to requests, in their order, with no more of them under way than slots and queue hold."""
        handles: deque[Handle] = deque()
        for request in requests:
            handles.append(self.submit(request))
            while handles and (handles[0].done or len(handles) > self._queue + self.slots):
                yield _outcome(handles.popleft())
        while handles:
            yield _outcome(handles.popleft())

    def stats(self) -> dict[str, Any]:
        """Counts and rates as plain data; see `Counts.figures`."""
        with self._lock:
            now = {"queued": self._queued, "slots": self.slots, "slots_in_use": self._residents.in_use}
        return {
            **now,
            "capacity": self._state.capacity,
            "clips_encoded": self._prompts.encoded,
            "clips_reused": self._prompts.reused,
            **self._counts.figures(),
        }

    def warmup(
        self,
        *,
        tokens: int | None = None,
        seconds: float | None = None,
        on_progress: OnProgress | None = None,
        threads: int | None = None,
    ) -> list[str]:
        """Compile ahead what requests within bounds need, whatever their lengths and options.

        Args:
            tokens: of the longest prompt, its audio tokens included; default: `positions`.
            seconds: of the longest clip; 0 for text alone; default: what so many tokens can hold.
            on_progress: as for `Qwen2AudioForConditionalGeneration.warmup`; so is `threads`.
            threads: see there.

        Returns:
            The shapes that were compiled for, in words.

        Raises:
            ValueError: a bound out of range.
            RuntimeError: requests are under way.
        """
        tokens = self.positions if tokens is None else tokens
        if not 1 <= tokens <= self.positions:
            raise ValueError(f"tokens={tokens}: a prompt has 1 to {self.positions} here")
        if seconds is None:
            seconds = min(0.01 * self._runtime.config.audio_config.max_frames, 0.04 * tokens)
        bounds = make_bounds(
            self._runtime,
            self._model.generation_config,
            rows=self.slots,
            clips=None,
            seconds=seconds,
            tokens=tokens,
            max_new_tokens=1,
            do_sample=False,
            top_k=None,
        )
        with self._turning:
            if self._open:
                raise RuntimeError(f"{self._open} requests are under way: warm up before the first")
            return warm_up(
                self._runtime,
                self._state,
                bounds=bounds,
                positions=self.positions,
                share_prefixes=self._residents.shared,
                on_progress=on_progress,
                threads=threads,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every request has its answer; False if they do not within `timeout` seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: self._open == 0, timeout)

    def close(self) -> None:
        """End the engine; requests without an answer get an error."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._preparation.close()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _has_room(self) -> bool:
        return self._queued < self._queue or self._closing or self._broken is not None

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids, skip_special_tokens=True)

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _unqueue(self) -> None:
        with self._lock:
            self._queued -= 1
            self._lock.notify_all()

    def _prepared(self, work: Work, prepared: Prepared | RequestError) -> None:
        """Take what the preparation has made of a request; called in its threads."""
        error = prepared if isinstance(prepared, RequestError) else None
        if isinstance(prepared, Prepared):
            try:
                work.take(prepared, config=self._runtime.config, bounds=self._bounds)
                work.guide = self._guide(work)  # here, as it may take a second, which whoever submits has not
            except Exception as fault:  # one request's fault is its own
                error = as_request_error(fault)
        with self._lock:
            if self._closing or self._broken is not None:
                error = self.end()
            elif error is None:
                self._waiting.add(work, priority=work.handle.request.priority)
                self._lock.notify_all()
                return
        self._unqueue()
        if work.handle.cancelled:
            self._end(work.handle, work.answer("cancelled", decode=self._processor.decode))
        else:
            self._end(work.handle, error)

    def _guide(self, work: Work) -> Guide | None:
        vocab_size = self._runtime.config.text_config.vocab_size
        found = make_guides(work.config, self._processor, rows=1, vocab_size=vocab_size)
        return found[0] if found else None

    def _end(self, handle: Handle, outcome: Answer | RequestError) -> None:
        if isinstance(outcome, RequestError):
            self._counts.add(failed=1)
        elif outcome.finish_reason == "cancelled":
            self._counts.add(cancelled=1)
        else:
            self._counts.add(answered=1)
        handle._finish(outcome)
        with self._lock:
            self._open -= 1
            self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or self._loop.busy)
                if self._closing:
                    break
            try:
                with self._turning:
                    self._loop.turn()
            except Exception as error:  # of the device: nothing that runs can go on
                with self._lock:
                    self._broken = error
                    self._lock.notify_all()
                self._loop.fail(self.end())
                return
        self._loop.fail(self.end())


def _outcome(handle: Handle) -> Answer | RequestError:
    try:
        return handle.result()
    except RequestError as error:
        return error


def _default_slots(model: "Qwen2AudioForConditionalGeneration", positions: int) -> int:
    runtime = model.runtime
    free = free_bytes(runtime.mesh.local_devices)
    parts = data_indices_per_group(runtime.mesh)
    if free is None:
        return max(SLOTS_ON_CPU, parts)
    one = cache_bytes(
        runtime.config.text_config,
        rows=parts,
        capacity=padded_capacity(positions, config=runtime.config),
        dtype=np.dtype(runtime.cache_dtype),
        mesh=runtime.mesh,
    )
    room = parts * (int(CACHE_SHARE * free) // one)
    listed = range(parts * max(MOST_SLOTS // parts, 1), parts, -parts)
    return next((slots for slots in listed if _cache_rows(runtime, slots) <= room), parts)


def _cache_rows(runtime: Runtime, slots: int) -> int:
    """Rows of the slots, and of the copies of a few of them beside."""
    *few, rows = step_rows(slots, mesh=runtime.mesh, dtype=runtime.config.dtype)
    return rows + max(few, default=0)
