"""Transcription of sound of any length: cut at silence, windows answered side by side in the engine, results in order.

Memory does not grow with the sound: no more windows are cut than the engine has room for.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.audio.stream import stream_audio
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.engine.request import Answer, RequestError
from qwen2audio_jax.engine.stream_process import stream_apart
from qwen2audio_jax.generation.hotwords import check_hotwords
from qwen2audio_jax.tasks.checks import Checks
from qwen2audio_jax.tasks.detectors import check_detector
from qwen2audio_jax.tasks.task import Gate, Task, cutting_of, gate_of
from qwen2audio_jax.tasks.transcript import Segment, Transcript
from qwen2audio_jax.tasks.windows import Cutting, Window, cut

if TYPE_CHECKING:
    from qwen2audio_jax.engine import Engine, Handle

RETRIED = {"none": (), "loops": ("loop",), "all": ("not_heard", "invented", "loop", "cut")}
"""What may be asked again -> the flags of windows that are."""


@dataclass(frozen=True, kw_only=True)
class Transcribing:
    """How sound is transcribed or translated.

    Attributes:
        task: "transcribe" or "translate", for a kind of model and a language.
        detector: of voice, one of `detectors.DETECTORS`.
        cutting: how sound is cut; default: as suits the kind of model.
        gate: the question by which the model says whether there is speech; default: that of the kind of model.
        gated: whether it is asked at all.
        checks: thresholds of doubt.
        retry: a key of `RETRIED`.
        options: of generation, before the task's own.
        hotwords: words that are expected, see `generation.hotwords`; they are no part of the prompt.
        seed: of what is drawn; window i of a sound has seed + i.
        hearing: other arguments of `stream_audio`: allow_truncated, track, allow_private_urls.
        apart: whether each sound is decoded in a process of its own, as `stream_apart` does: for what strangers send.
    """

    task: Task
    detector: str = "energy"
    cutting: Cutting | None = None
    gate: Gate | None = None
    gated: bool = True
    checks: Checks = field(default_factory=Checks.read)
    retry: str = "loops"
    options: Mapping[str, Any] = field(default_factory=dict)
    hotwords: Sequence[str] = ()
    seed: int = 0
    hearing: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False

    def __post_init__(self) -> None:
        check_detector(self.detector)
        if self.retry not in RETRIED:
            raise ValueError(f"retry={self.retry!r} is none of {', '.join(RETRIED)}")
        if self.hotwords:
            object.__setattr__(self, "options", {**self.options, "hotwords": check_hotwords(self.hotwords)})
        if self.cutting is None:
            object.__setattr__(self, "cutting", Cutting(**cutting_of(self.task.kind)))
        if self.gate is None and self.gated:
            object.__setattr__(self, "gate", gate_of(self.task.kind))


@dataclass
class _Pending:
    """A window under way; without one, the end of a sound."""

    name: str
    window: Window | None = None
    handle: "Handle | None" = None
    gate: "Handle | None" = None
    seed: int = 0
    seconds: float = 0.0
    error: ValueError | None = None


def transcribe(
    engine: "Engine",
    sounds: Iterable[tuple[str, Any]],
    how: Transcribing,
    *,
    priority: int = 0,
    on_segment: Callable[[str, Segment], None] | None = None,
) -> Iterator[Transcript]:
    """Transcribe sounds of any length.

    Args:
        engine: it may be used by others at the same time.
        sounds: names, and sources as `stream_audio` takes them (also bucket URLs and pieces of files); one is opened
            when those before it have been cut.
        how: see `Transcribing`.
        priority: of the requests.
        on_segment: called with a sound's name and each of its segments, in order, as they become known.

    Yields:
        The transcript of each sound, in order. A sound that cannot be heard to its end has an `error`, and the segments
        until there. Whoever leaves the iterator early cancels what is under way.

    Raises:
        RuntimeError: the engine is closed, or its device failed.
    """
    pending: deque[_Pending] = deque()
    coming = _submitted(engine, sounds, how, priority)
    segments: list[Segment] = []
    error: ValueError | None = None
    try:
        while item := _next(pending, coming, most=2 * engine.slots):
            if item.window is None:
                language, failure = how.task.language or "", error or item.error
                yield Transcript(item.name, how.task.name, language, item.seconds, tuple(segments), failure)
                segments, error = [], None
                continue
            try:
                segments.append(_segment(engine, item, how, priority))
            except RequestError as fault:
                error = error or fault
                continue
            if on_segment is not None:
                on_segment(item.name, segments[-1])
    finally:
        coming.close()
        for item in pending:
            for handle in filter(None, (item.handle, item.gate)):
                handle.cancel()


def _next(pending: deque[_Pending], coming: Iterator[_Pending], *, most: int) -> _Pending | None:
    """The first of what is under way, after as much more was submitted as may be."""
    while len(pending) < most and (item := next(coming, None)) is not None:
        pending.append(item)
    return pending.popleft() if pending else None


def _submitted(
    engine: "Engine", sounds: Iterable[tuple[str, Any]], how: Transcribing, priority: int
) -> Generator[_Pending, None, None]:
    """The windows of all sounds, each submitted when it is asked for, and the end of each sound."""
    assert how.cutting is not None
    for name, source in sounds:
        end = _Pending(name)
        blocks = _counted(_blocks(source, how), end)
        try:
            for number, window in enumerate(cut(blocks, detector=how.detector, cutting=how.cutting)):
                item = _Pending(name, window, seed=(how.seed + number) % 2**32)
                item.handle = engine.submit(
                    how.task.request(window.samples, options=how.options, seed=item.seed, priority=priority)
                )
                if how.gate is not None and how.gate.always:
                    item.gate = engine.submit(how.gate.task.request(window.samples, priority=priority))
                yield item
        except ValueError as error:
            end.error = error
        yield end


def _blocks(source: Any, how: Transcribing) -> Iterator[np.ndarray]:
    """The samples of a sound; nothing is opened before the first are asked for."""
    if how.apart and not isinstance(source, np.ndarray):
        yield from stream_apart(source, **how.hearing)
    else:
        yield from stream_audio(open_clip(source), **how.hearing)


def _counted(blocks: Iterable[np.ndarray], end: _Pending) -> Iterator[np.ndarray]:
    for block in blocks:
        end.seconds += len(block) / SAMPLING_RATE
        yield block


def _segment(engine: "Engine", item: _Pending, how: Transcribing, priority: int) -> Segment:
    """The segment of a window: its answer checked, asked again if need be, and dropped if there is no speech."""
    window, handle = item.window, item.handle
    assert window is not None
    assert handle is not None
    answer, tries = handle.result(), 1
    flags = _flags(answer, window, how)
    for options in how.checks.retry if set(flags) & set(RETRIED[how.retry]) else ():
        tries += 1
        request = how.task.request(
            window.samples, options={**how.options, **options}, seed=(item.seed + tries) % 2**32, priority=priority
        )
        other = engine.submit(request).result()
        found = _flags(other, window, how)
        if len(found) < len(flags):
            answer, flags = other, found
        if not flags:
            break
    text = how.task.clean(answer.text)
    mean = float(np.mean(answer.log_probs)) if len(answer.log_probs) else None
    doubtful = bool(flags) or (mean is not None and how.checks.is_unsure(mean))
    if text and not _is_speech(engine, item, how, priority, doubtful=doubtful):
        text, flags = "", ()
    return Segment(window.start, window.end, text, mean, len(answer.token_ids), flags, tries)


def _flags(answer: Answer, window: Window, how: Transcribing) -> tuple[str, ...]:
    text = how.task.clean(answer.text)
    return how.checks.judge(text, voiced=window.voiced, prompt=how.task.prompt, finish_reason=answer.finish_reason)


def _is_speech(engine: "Engine", item: _Pending, how: Transcribing, priority: int, *, doubtful: bool) -> bool:
    """The model's own word on whether there is speech in a window; True where it is not asked."""
    assert item.window is not None
    if how.gate is None or not (how.gate.always or doubtful):
        return True
    handle = item.gate or engine.submit(how.gate.task.request(item.window.samples, priority=priority))
    return how.gate.accepts(handle.result().text)
