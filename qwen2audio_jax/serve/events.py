"""Server-sent events of a streamed chat."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen2audio_jax.engine import Answer
from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.serve.answers import REASONS, Trimmer, new_id, token_logprobs, usage
from qwen2audio_jax.serve.errors import ApiError
from qwen2audio_jax.serve.metrics import Metrics
from qwen2audio_jax.serve.protocol import Chat
from qwen2audio_jax.serve.waiting import Waiting

READING_SECONDS = 30.0
"""Time that a client has to read the rest of a stream after its deadline."""


class Events(StreamingResponse):
    """A stream that ends with a client that does not read it, some time after its deadline (of the loop's clock)."""

    def __init__(self, events: AsyncIterator[str], *, deadline: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._deadline = deadline + READING_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)


async def chat_events(
    asked: Chat, waiting: Sequence[Waiting], *, model: str, processor: Qwen2AudioProcessor, metrics: Metrics
) -> AsyncIterator[str]:
    """The chunks of a chat's answers, one answer after the other; leaving the stream ends the requests."""
    head = {"id": new_id("chatcmpl"), "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    def event(index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        extra = {"usage": None} if asked.usage else {}
        return f"data: {json.dumps({**head, 'choices': [choice], **extra})}\n\n"

    def decode(ids: list[int]) -> str:
        return processor.decode(ids, skip_special_tokens=True)

    answers: list[Answer] = []
    try:
        for index, each in enumerate(waiting):
            yield event(index, {"role": "assistant", "content": ""})
            text, trimmer = TextStream(decode), Trimmer(asked.stops)
            async for tokens, log_probs in each.tokens():
                piece = trimmer.push("".join(map(text.push, tokens)))
                shown = None
                if asked.logprobs:
                    shown = {"content": token_logprobs(tokens, log_probs, processor=processor)}
                if piece or shown:
                    yield event(index, {"content": piece}, logprobs=shown)
            answers.append(await each.answer())
            if rest := trimmer.push(text.finish()) + trimmer.finish():
                yield event(index, {"content": rest})
            yield event(index, {}, REASONS[answers[-1].finish_reason])
        if asked.usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(answers)})}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        metrics.error(error)
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        for each in waiting:
            each.cancel()
