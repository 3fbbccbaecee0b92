"""Preparation of requests ahead of the device: clips decoded, text encoded, in processes that may die.

A decoder is handed files that anyone may have made. In a worker process it has a limit on memory and on time, and if it
aborts, hangs or is killed, that costs one request. No jax here: a worker has the processor alone.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import dataclass
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool

from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.engine.request import Request, RequestError, as_request_error
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

THREADS = 8
"""Most requests that are prepared at a time without worker processes."""


@dataclass(frozen=True)
class Prepared:
    """A request as the model takes it: one row, its clips without the padding that the encoder ignores.

    Attributes:
        ids: [T] int32.
        features: of each clip [M, L] float32, its valid frames and at least two of silence.
        frames: valid frames of each clip.
        truncated_clips: those that were heard in part, and what is missing of them.
        seconds: what preparing it took.
    """

    ids: np.ndarray
    features: tuple[np.ndarray, ...]
    frames: tuple[int, ...]
    truncated_clips: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """How requests are heard: `allow_special` is for their text, the others are the processor's for their clips."""

    truncation: bool = False
    allow_truncated: bool = False
    track: int | None = None
    allow_private_urls: bool = False
    allow_special: bool = False


def prepare(request: Request, *, processor: Qwen2AudioProcessor, hearing: Hearing) -> Prepared:
    """A request's arrays.

    Raises:
        AudioError, ValueError, TypeError: as the processor.
    """
    began = time.monotonic()
    inputs = request.inputs if request.inputs is not None else request_inputs(request, processor, hearing)
    ids = np.atleast_2d(np.asarray(inputs["input_ids"]))
    if len(ids) != 1:
        raise ValueError(f"a request is one prompt, and its inputs have {len(ids)} rows: make a request of each")
    mask = inputs.get("attention_mask")
    ids = ids[0] if mask is None else ids[0][np.atleast_2d(np.asarray(mask))[0].astype(bool)]
    if inputs.get("input_features") is None:
        return Prepared(ids, (), (), (), time.monotonic() - began)
    features = np.asarray(inputs["input_features"])
    frames = [int(count) for count in np.asarray(inputs["feature_attention_mask"]).sum(axis=1)]
    kept = tuple(
        np.ascontiguousarray(clip[:, : min(count + 2 + count % 2, clip.shape[1])])
        for clip, count in zip(features, frames, strict=True)
    )
    truncated = getattr(inputs, "truncated_clips", ())
    return Prepared(ids, kept, tuple(frames), truncated, time.monotonic() - began)


def request_inputs(request: Request, processor: Qwen2AudioProcessor, hearing: Hearing) -> Mapping[str, Any]:
    """What the processor makes of a request."""
    audio = {name: value for name, value in vars(hearing).items() if name != "allow_special"}
    clips = [open_clip(clip) for clip in request.clips]
    if request.prompt is not None and processor.audio_token in request.prompt:
        return processor(text=request.prompt, audio=clips or None, **audio)
    messages: list[Any]
    if request.messages is not None:
        messages = list(_filled(request.messages, clips) if clips else request.messages)
    else:
        content: list[dict[str, Any]] = [{"type": "audio", "audio": clip} for clip in clips]
        content += [{"type": "text", "text": request.prompt}] if request.prompt else []
        messages = [{"role": "user", "content": content}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, allow_special=hearing.allow_special, **audio
    )


def _filled(messages: Any, clips: list[Any]) -> list[Any]:
    """The messages with the clips in their audio items, in order."""
    rest = iter(clips)

    def item(content: Any) -> Any:
        return {"type": "audio", "audio": next(rest)} if content.get("type") == "audio" else content

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [item(content) for content in message["content"]]}
        for message in messages
    ]


class Preparation:
    """A pool that prepares requests; `workers` processes, or threads of this process if that is 0.

    With processes the calling program must guard its main module (`if __name__ == "__main__":`), as they import it.
    """

    def __init__(
        self,
        processor: Qwen2AudioProcessor,
        *,
        hearing: Hearing,
        workers: int,
        seconds: float = LIMITS.prepare_seconds,
        memory: int = LIMITS.worker_bytes,
    ):
        self._seconds, self._memory = seconds, memory
        self._local = (processor, hearing)
        self._threads: ThreadPoolExecutor | None = None
        self._processes: ProcessPool | None = None
        if workers:
            self._processes = ProcessPool(
                max_workers=workers,
                initializer=_start,
                initargs=(processor, hearing, memory),
                context=multiprocessing.get_context("spawn"),
            )
        else:
            self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS), thread_name_prefix="prepare")

    def submit(self, request: Request, done: Callable[[Prepared | RequestError], None]) -> Callable[[], Any]:
        """Prepare a request; `done` is called once, in this thread or another. Returns what cancels it."""
        future: Future[Prepared | RequestError]
        if self._processes is not None and request.inputs is None:
            future = self._processes.schedule(_in_worker, args=[request], timeout=self._seconds)
        elif self._threads is not None:
            future = self._threads.submit(_settled, request, *self._local)
        else:
            done(_settled(request, *self._local))
            return lambda: False
        future.add_done_callback(lambda over: done(self._result(over)))
        return future.cancel

    def _result(self, future: "Future[Prepared | RequestError]") -> Prepared | RequestError:
        try:
            return future.result()
        except CancelledError:
            return RequestError("it was cancelled", kind="cancelled")
        except TookTooLong:
            return RequestError(
                f"loading its clips took longer than {self._seconds:g} s: they are damaged, or far too long; convert "
                "them to WAV",
                kind="time",
            )
        except ProcessExpired:
            return RequestError(
                "a decoder ended its process while loading its clips: they are damaged, or take more than "
                f"{self._memory / 2**30:g} GiB of memory; convert them to WAV",
                kind="crash",
            )
        except Exception as error:  # e.g. a request that cannot be sent to another process
            return as_request_error(error)

    def close(self) -> None:
        """End the workers; what they were doing is dropped."""
        if self._processes is not None:
            self._processes.stop()
            self._processes.join()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


def _settled(request: Request, processor: Qwen2AudioProcessor, hearing: Hearing) -> Prepared | RequestError:
    try:
        return prepare(request, processor=processor, hearing=hearing)
    except Exception as error:  # one request's fault is its own, whichever library noticed it
        return as_request_error(error)


_mine: tuple[Qwen2AudioProcessor, Hearing] | None = None
"""What a worker process works with."""


def _start(processor: Qwen2AudioProcessor, hearing: Hearing, memory: int) -> None:
    global _mine
    _mine = processor, hearing
    # What decoders written in C say of damaged files is in no answer, and between the lines of a job's progress.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _in_worker(request: Request) -> Prepared | RequestError:
    assert _mine is not None
    return _settled(request, *_mine)
