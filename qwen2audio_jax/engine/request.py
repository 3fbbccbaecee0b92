"""Requests and answers of the engine: plain frozen values."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_OWN = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued; it has `messages`, a `prompt`, or `inputs`.

    Attributes:
        prompt: text; with audio placeholders in it a raw prompt, else one turn of a chat, after its clips.
        messages: a conversation, as `apply_chat_template` takes it.
        system: system message of a request that is no conversation.
        clips: the clips in the order of the placeholders or of the audio items without a source; each is what
            `load_audio` takes, a `FilePiece` or a bucket URL.
        inputs: what the processor returned for one row, instead of all the above.
        options: any field of `GenerationConfig` but `num_return_sequences`.
        seed: of its draws, 0..2**32-1; None draws one.
        priority: requests of a higher one go first.
        id: of the caller's; it comes back in the answer.
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    system: str | None = None
    clips: tuple[Any, ...] = ()
    inputs: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    priority: int = 0
    id: str = ""

    def __post_init__(self) -> None:
        if self.inputs is not None and (self.prompt is not None or self.messages is not None or self.clips):
            raise ValueError("a request has either inputs, or a prompt or messages with their clips")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("a request has either messages or a prompt")
        if self.inputs is None and not self.prompt and self.messages is None and not self.clips:
            raise ValueError("a request needs a prompt, messages, clips or inputs")


@dataclass(frozen=True)
class Timings:
    """Seconds of an answer, from `submit` on unless said otherwise.

    Attributes:
        load: what loading its clips and encoding its text took, by itself.
        queued: until the model began with it.
        first_token: until its first token was known.
        total: until its last one was.
    """

    load: float
    queued: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        id: the request's.
        text: of the new tokens, special ones left out.
        token_ids: [n] int32, the stop token included.
        log_probs: [n] float32, as in `GenerateOutput`.
        finish_reason: "eos", "stop_string", "time" (`max_time`, from when the model began with it), "length" or
            "cancelled".
        prompt_tokens: audio tokens included.
        audio_tokens: of the prompt.
        reused_tokens: those of them whose keys and values another request had left.
        audio_seconds: of all clips, to 10 ms.
        truncated_clips: those that were heard in part (`allow_truncated`), and what is missing of them.
        seconds: see `Timings`.
    """

    id: str
    text: str
    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: str
    prompt_tokens: int
    audio_tokens: int
    reused_tokens: int
    audio_seconds: float
    truncated_clips: tuple[str, ...]
    seconds: Timings


class RequestError(ValueError):
    """Error: a request has no answer. `kind` says why, for programs.

    The kinds are those of `AudioError`, "input" (an option or a prompt that cannot be used), "time" and "memory" (its
    clips took more than they may), "crash" (a decoder ended its process), "logits" (these are not numbers), "device",
    and "failed" (a library raised an error of its own).
    """

    def __init__(self, message: str, *, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return _request_error, (str(self), self.kind)


def _request_error(message: str, kind: str) -> RequestError:
    return RequestError(message, kind=kind)


class EngineFull(RuntimeError):
    """Error: as many requests wait as may."""


def as_request_error(error: BaseException) -> RequestError:
    """An error in our words: its own if this package raised it, else its type alone, as libraries tell addresses."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, MemoryError):
        return RequestError("its clips take more memory than they may: shorten or convert them", kind="memory")
    if not is_own(error):
        return RequestError(f"the processor or the model failed ({type(error).__name__})", kind="failed")
    return RequestError(str(error), kind=getattr(error, "kind", "input"))


def is_own(error: BaseException) -> bool:
    """Return True for an error of input that a module of this package raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return (
        isinstance(error, ValueError | TypeError) and bool(frames) and frames[-1][0].f_code.co_filename.startswith(_OWN)
    )
