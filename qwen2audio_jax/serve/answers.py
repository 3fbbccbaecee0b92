"""Answers of the engine as OpenAI's objects."""

import time
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

from qwen2audio_jax.engine.request import Answer
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

REASONS = {"eos": "stop", "stop_string": "stop", "length": "length", "time": "length", "cancelled": "stop"}


class Trimmer:
    """Text in pieces, up to the first of some stop strings; the end that might begin one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.over = tuple(stops), "", False

    def push(self, piece: str) -> str:
        """What is certain to be part of the answer now."""
        if self.over:
            return ""
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.over, self._held = True, ""
            return text[: min(places)]
        kept = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :] if kept else ""
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back after all."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of the text that begins a stop string."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def trimmed(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    trimmer = Trimmer(stops)
    return trimmer.push(text) + trimmer.finish()


def new_id(kind: str) -> str:
    """A new identifier."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """The numbers of tokens; answers to the same prompt count it once."""
    made = sum(len(answer.token_ids) for answer in answers)
    prompt = answers[0].prompt_tokens
    details = {"audio_tokens": answers[0].audio_tokens, "cached_tokens": answers[0].reused_tokens}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": details,
    }


def token_logprobs(ids: Sequence[int], log_probs: Sequence[float], *, processor: Qwen2AudioProcessor) -> list[Any]:
    """Tokens with their log-probabilities."""
    found = []
    for token, log_prob in zip(ids, log_probs, strict=True):
        text = processor.decode([int(token)])
        found.append({"token": text, "logprob": float(log_prob), "bytes": list(text.encode()), "top_logprobs": []})
    return found


def completion(
    answers: Sequence[Answer], *, model: str, stops: Sequence[str], logprobs: bool, processor: Qwen2AudioProcessor
) -> dict[str, Any]:
    """A chat.completion object."""
    choices = []
    for index, answer in enumerate(answers):
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": trimmed(answer.text, stops), "refusal": None},
            "finish_reason": REASONS[answer.finish_reason],
            "logprobs": None,
        }
        if logprobs:
            choice["logprobs"] = {
                "content": token_logprobs(answer.token_ids.tolist(), answer.log_probs.tolist(), processor=processor),
                "refusal": None,
            }
        choices.append(choice)
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage(answers),
    }


def transcript(answer: Answer, *, form: str, task: str, language: str) -> tuple[str | dict[str, Any], str]:
    """A transcript in a format, and its media type; of one window its times are the clip's."""
    text, seconds = answer.text.strip(), answer.audio_seconds
    if form == "json":
        return {"text": text, "usage": {"type": "duration", "seconds": round(seconds)}}, "application/json"
    if form == "verbose_json":
        data = text.encode()
        segment = {
            "id": 0,
            "seek": 0,
            "start": 0.0,
            "end": seconds,
            "text": text,
            "tokens": answer.token_ids.tolist(),
            "avg_logprob": float(answer.log_probs.mean()),
            "compression_ratio": round(len(data) / len(zlib.compress(data)), 3) if data else 0.0,
        }
        found = {"task": task, "language": language, "duration": seconds, "text": text, "segments": [segment]}
        return found, "application/json"
    if form == "srt":
        return f"1\n{_clock(0, ',')} --> {_clock(seconds, ',')}\n{text}\n", "text/plain"
    if form == "vtt":
        return f"WEBVTT\n\n{_clock(0, '.')} --> {_clock(seconds, '.')}\n{text}\n", "text/plain"
    return text + "\n", "text/plain"


def _clock(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    return (
        f"{thousandths // 3_600_000:02d}:{thousandths // 60_000 % 60:02d}:{thousandths // 1000 % 60:02d}{point}"
        f"{thousandths % 1000:03d}"
    )
