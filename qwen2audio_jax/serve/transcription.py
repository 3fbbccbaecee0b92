"""Transcriptions in OpenAI's protocol: the form that asks for one, and the formats of its answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.engine.request import Answer, Request
from qwen2audio_jax.generation.hotwords import check_hotwords
from qwen2audio_jax.serve.errors import bad
from qwen2audio_jax.serve.protocol import check_model
from qwen2audio_jax.tasks.checks import Checks, compression_ratio
from qwen2audio_jax.tasks.task import Task, find_task
from qwen2audio_jax.tasks.transcribe import RETRIED
from qwen2audio_jax.tasks.transcript import Segment, Transcript

SUBTITLES = {"srt": "application/x-subrip", "vtt": "text/vtt"}
"""Formats that are those of transcripts -> their media types."""
FORMATS = ("json", "text", *SUBTITLES, "verbose_json")
FIELDS = (
    *("model", "language", "prompt", "response_format", "temperature", "timestamp_granularities[]", "stream"),
    *("hotwords", "retry"),
)


@dataclass(frozen=True)
class Transcription:
    """A request for a transcript.

    Attributes:
        request: of the engine, for sound that is one clip.
        form: one of `FORMATS`.
        task: "transcribe" or "translate", for the model's kind.
        language: of the transcript.
        retry: which doubtful windows are asked again, a key of `RETRIED`; None: sound of one clip is not cut.
    """

    request: Request
    form: str
    task: Task
    language: str
    retry: str | None


def read_transcription(
    fields: Mapping[str, str], sound: bytes, *, model: str, kind: str, translate: bool
) -> Transcription:
    """Check the fields of /v1/audio/transcriptions or translations; `kind` is the model's.

    Raises:
        ApiError: a value that cannot be used, or an unknown name.
    """
    if unknown := set(fields) - set(FIELDS):
        raise bad(f"unknown field {sorted(unknown)[0][:100]!r}; known are {', '.join(FIELDS)}")
    check_model(fields.get("model"), model=model)
    form = fields.get("response_format", "json")
    if form not in FORMATS:
        raise bad(f"response_format={form[:40]!r} is none of {', '.join(FORMATS)}", param="response_format")
    task = _task(fields.get("language"), kind=kind, translate=translate)
    retry = fields.get("retry")
    if retry is not None and retry not in RETRIED:
        raise bad(f"retry={retry[:40]!r} is none of {', '.join(RETRIED)}", param="retry")
    if fields.get("prompt"):
        raise bad(
            "prompt: its words would come into the transcript; leave it out, or name expected ones in hotwords",
            param="prompt",
        )
    if fields.get("timestamp_granularities[]") not in (None, "segment"):
        raise bad("timestamp_granularities: the model tells no times of words; leave it out")
    if fields.get("stream", "false").lower() not in ("false", "0"):
        raise bad("stream: transcriptions come whole; use chat completions to stream", param="stream")
    options = _temperature(fields.get("temperature", "0"))
    if fields.get("hotwords"):
        options["hotwords"] = _hotwords(fields["hotwords"])
    request = task.request(sound, options=options)
    return Transcription(request, form, task, "en" if translate else str(task.language), retry)


def _task(language: str | None, *, kind: str, translate: bool) -> Task:
    """The task of an upload: into English, or in the language of the speech."""
    name = "translate" if translate else "transcribe"
    spoken = None if language is None else f"{language[:40]}-en" if translate else language[:40]
    try:
        return find_task(name, kind=kind, language=spoken)
    except ValueError as error:
        raise bad(str(error), param="language" if language else None) from None


def _hotwords(text: str) -> tuple[str, ...]:
    """Words between commas or line breaks."""
    try:
        return check_hotwords([word for word in re.split(r"[,\n]", text) if word.strip()])
    except ValueError as error:
        raise bad(str(error), param="hotwords") from None


def _temperature(text: str) -> dict[str, Any]:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise bad(f"temperature={text[:40]!r}: a number from 0 to 2", param="temperature")
    return {"do_sample": True, "temperature": value} if value > 0 else {"do_sample": False}


def transcript(answer: Answer, asked: Transcription) -> tuple[str | dict[str, Any], str]:
    """A transcript in its format, and that one's media type; of one window its times are the clip's."""
    text, seconds = asked.task.clean(answer.text), answer.audio_seconds
    if asked.form == "json":
        return {"text": text, "usage": _usage(answer)}, "application/json"
    if asked.form == "verbose_json":
        content = {
            "task": asked.task.name,
            "language": asked.language,
            "duration": seconds,
            "text": text,
            "segments": [_segment(answer, text, asked)],
            "usage": {"type": "duration", "seconds": round(seconds)},
        }
        return content, "application/json"
    if asked.form in SUBTITLES:
        found = Transcript("", asked.task.name, asked.language, seconds, (Segment(0.0, seconds, text),))
        return found.format(asked.form), SUBTITLES[asked.form]
    return text + "\n", "text/plain"


def _usage(answer: Answer) -> dict[str, Any]:
    made = len(answer.token_ids)
    audio = answer.audio_tokens
    return {
        "type": "tokens",
        "input_tokens": answer.prompt_tokens,
        "output_tokens": made,
        "total_tokens": answer.prompt_tokens + made,
        "input_token_details": {"audio_tokens": audio, "text_tokens": answer.prompt_tokens - audio},
    }


def _segment(answer: Answer, text: str, asked: Transcription) -> dict[str, Any]:
    # Nobody has listened for voice here: without it "not_heard" is no more than a pause, and the clip is all voice.
    flags = Checks.read().judge(
        text, voiced=answer.audio_seconds, prompt=asked.task.prompt, finish_reason=answer.finish_reason
    )
    return {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": answer.audio_seconds,
        "text": text,
        "tokens": answer.token_ids.tolist(),
        "temperature": asked.request.options.get("temperature", 0.0),
        "avg_logprob": float(answer.log_probs.mean()),
        "compression_ratio": round(compression_ratio(text), 3),
        "flags": [flag for flag in flags if flag != "not_heard"],
    }
