"""Requests of the engine, awaited in the server's event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from qwen2audio_jax.engine import Answer, Handle, RequestError
from qwen2audio_jax.serve.errors import ApiError, told
from qwen2audio_jax.serve.metrics import Metrics

T = TypeVar("T")


class Waiting:
    """A handle of the engine, awaited until a deadline (of the loop's clock).

    Attributes:
        handle: set by whoever submits the request with `changed`.
    """

    handle: Handle

    def __init__(self, *, deadline: float, metrics: Metrics):
        self._loop, self._changed, self._deadline = asyncio.get_running_loop(), asyncio.Event(), deadline
        self._metrics, self._counted, self._last = metrics, 0, time.monotonic()

    def changed(self, handle: Handle) -> None:
        """Take note of a token or the end; called in the engine's thread."""
        if new := len(handle.known(self._counted)[0]):
            now = time.monotonic()
            self._metrics.token(now - self._last, first=self._counted == 0)
            self._counted, self._last = self._counted + new, now
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._changed.set)

    def cancel(self) -> None:
        """End it, if it has not ended."""
        if not self.handle.done:
            self.handle.cancel()

    async def started(self) -> None:
        """Wait for the first token.

        Raises:
            ApiError: the request ended with an error before it, or the time is over.
        """
        while True:
            self._changed.clear()
            new, _, over = self.handle.known(0)
            if over:
                self._raise()
            if new or over:
                return
            await self._wait()

    async def tokens(self) -> AsyncIterator[tuple[list[int], list[float]]]:
        """New tokens and their log-probabilities, as many at a time as have come.

        Raises:
            ApiError: the time is over.
        """
        given = 0
        while True:
            self._changed.clear()
            new, log_probs, over = self.handle.known(given)
            if new:
                given += len(new)
                yield new, log_probs
            if over:
                return
            if not new:
                await self._wait()

    async def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ApiError: there is none, or the time is over.
        """
        while True:
            self._changed.clear()
            if self.handle.done:
                break
            await self._wait()
        self._raise()
        return self.handle.result(timeout=0)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            raise ApiError(408, "the answer was not whole in time; ask for fewer tokens, or try again later") from None

    def _raise(self) -> None:
        try:
            self.handle.result(timeout=0)
        except RequestError as error:
            raise told(error) from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns.

    Raises:
        ClientDisconnect: the client has left, and nobody would read it.
    """
    gone, result = asyncio.create_task(_gone(request)), asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait({gone, result}, return_when=asyncio.FIRST_COMPLETED)
        if result in done:
            return result.result()
        raise ClientDisconnect
    finally:
        for task in (gone, result):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
