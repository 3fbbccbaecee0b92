"""Handles: what `Engine.submit` returns, to read, await or cancel one answer."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from qwen2audio_jax.engine.request import Answer, Request, RequestError
from qwen2audio_jax.generation.text_stream import TextStream


class Handle:
    """A request in the engine. Its methods may be called from any thread.

    Attributes:
        request: as submitted.
    """

    def __init__(
        self, request: Request, *, decode: Callable[[list[int]], str], on_change: Callable[["Handle"], None] | None
    ):
        self.request = request
        self._decode, self._on_change = decode, on_change
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._answer: Answer | None = None
        self._error: RequestError | None = None
        self._wake: Callable[[], Any] = lambda: None
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._answer is not None or self._error is not None

    def result(self, timeout: float | None = None) -> Answer:
        """The answer.

        Raises:
            RequestError: there is none; its kind says why.
            TimeoutError: not within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no answer within {timeout:g} s")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def known(self, start: int) -> tuple[list[int], list[float], bool]:
        """The tokens from the `start`-th on that are known by now, their log-probabilities, and whether these are all.

        It never waits.
        """
        with self._changed:
            return self._tokens[start:], self._log_probs[start:], self.done

    def cancel(self) -> None:
        """End it: its slot is free at the next step; what it has by then is its answer, "cancelled"."""
        self.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[int]:
        """The new tokens as they become known.

        Raises:
            RequestError: as `result`.
        """
        given = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._tokens) > given or self.done)  # noqa: B023
                new, over = self._tokens[given:], self.done
            yield from new
            given += len(new)
            if over and given == len(self._tokens):
                break
        if self._error is not None:
            raise self._error

    def text(self) -> Iterator[str]:
        """The answer's text in pieces, as they become certain; joined they are `result().text`.

        Raises:
            RequestError: as `result`.
        """
        stream = TextStream(self._decode)
        for token in self:
            if piece := stream.push(token):
                yield piece
        if rest := stream.finish():
            yield rest

    def _push(self, token: int, log_prob: float) -> None:
        with self._changed:
            self._tokens.append(token)
            self._log_probs.append(log_prob)
            self._changed.notify_all()
        self._tell()

    def _finish(self, outcome: Answer | RequestError) -> None:
        with self._changed:
            if self.done:
                return
            if isinstance(outcome, Answer):
                self._answer = outcome
            else:
                self._error = outcome
            self._changed.notify_all()
        self._wake = lambda: None  # what cancels it holds its clips
        self._tell()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(self)
