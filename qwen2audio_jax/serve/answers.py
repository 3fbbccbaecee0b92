"""Answers of the engine as OpenAI's objects of chats."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from qwen2audio_jax.engine.request import Answer
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.serve.protocol import Chat

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


def _content(answer: Answer, asked: Chat) -> str:
    text = trimmed(answer.text, asked.stops)
    return text if asked.task is None else asked.task.clean(text)


def new_id(kind: str) -> str:
    """A new identifier."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """The numbers of tokens; answers to the same prompt count it once."""
    made = sum(len(answer.token_ids) for answer in answers)
    prompt = answers[0].prompt_tokens
    audio = answers[0].audio_tokens
    details = {"audio_tokens": audio, "text_tokens": prompt - audio, "cached_tokens": answers[0].reused_tokens}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": details,
    }


def token_logprobs(ids: Sequence[int], log_probs: Sequence[float], *, processor: Qwen2AudioProcessor) -> list[Any]:
    """Tokens with their log-probabilities; one that is a part of a character has no text of its own, and no bytes."""
    found = []
    for token, log_prob in zip(ids, log_probs, strict=True):
        text = processor.decode([int(token)])
        data = None if "\ufffd" in text else list(text.encode())
        found.append({"token": text, "logprob": float(log_prob), "bytes": data, "top_logprobs": []})
    return found


def completion(answers: Sequence[Answer], asked: Chat, *, model: str, processor: Qwen2AudioProcessor) -> dict[str, Any]:
    """A chat.completion object."""
    choices = []
    for index, answer in enumerate(answers):
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": _content(answer, asked), "refusal": None},
            "finish_reason": REASONS[answer.finish_reason],
            "logprobs": None,
        }
        if asked.logprobs:
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
