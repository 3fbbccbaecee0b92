"""Transcripts of uploads that are longer than a clip: made in a thread, and left when nobody waits any more."""

import asyncio
import threading
from typing import Any

from qwen2audio_jax.engine import Engine
from qwen2audio_jax.serve.errors import STATUS, ApiError
from qwen2audio_jax.serve.transcription import SUBTITLES, Transcription
from qwen2audio_jax.tasks.checks import compression_ratio
from qwen2audio_jax.tasks.transcribe import Transcribing, transcribe
from qwen2audio_jax.tasks.transcript import Segment, Transcript


class _Gone(Exception):
    """Nobody waits for the transcript."""


def windows_of(asked: Transcription) -> Transcribing:
    """How an upload that is longer than a clip is transcribed: window by window, by the same prompt."""
    return Transcribing(task=asked.task, options=asked.request.options, retry=asked.retry or "loops", apart=True)


async def transcribe_upload(
    engine: Engine, sound: bytes, how: Transcribing, *, deadline: float | None = None
) -> Transcript:
    """The transcript of a sound of any length; cancelling it ends what is under way at the next window.

    Args:
        engine: of the server.
        sound: a file's content.
        how: as `windows_of` says.
        deadline: by the loop's clock.

    Raises:
        ApiError: it cannot be heard or answered, or not in time.
        RuntimeError: the engine is closed, or its device failed.
    """
    gone = threading.Event()

    def check(name: str, segment: Segment) -> None:
        if gone.is_set():
            raise _Gone

    def run() -> Transcript | None:
        try:
            return next(transcribe(engine, [("", sound)], how, on_segment=check))
        except _Gone:
            return None

    try:
        async with asyncio.timeout_at(deadline):
            found = await asyncio.to_thread(run)
    except TimeoutError:
        raise ApiError(408, "the transcript was not whole in time; send the sound in parts") from None
    finally:
        gone.set()
    assert found is not None
    if found.error is not None:
        kind = getattr(found.error, "kind", "input")
        raise ApiError(STATUS.get(kind, 400), str(found.error), code=kind)
    return found


def formatted(transcript: Transcript, form: str) -> tuple[str | dict[str, Any], str]:
    """A transcript in a format of OpenAI's protocol, and that one's media type."""
    if form in SUBTITLES:
        return transcript.format(form), SUBTITLES[form]
    if form == "text":
        return transcript.text + "\n", "text/plain"
    usage = {"type": "duration", "seconds": round(transcript.seconds)}
    if form == "json":
        return {"text": transcript.text, "usage": usage}, "application/json"
    found = {
        "task": transcript.task,
        "language": transcript.language.rpartition("-")[2],
        "duration": round(transcript.seconds, 2),
        "text": transcript.text,
        "segments": [_segment(number, segment) for number, segment in enumerate(transcript.spoken)],
        "usage": usage,
    }
    return found, "application/json"


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": round(segment.start * 100),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": segment.mean_log_prob,
        "compression_ratio": round(compression_ratio(segment.text), 3),
        "no_speech_prob": None,
        "flags": list(segment.flags),
    }
