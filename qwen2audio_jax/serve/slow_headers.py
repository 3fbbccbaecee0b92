"""A time limit on a request's headers, which uvicorn has none for: a client that sends them byte by byte is dropped."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0


class TimedProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it; a connection whose next headers are not whole in time is closed."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first headers."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on; the wait ends when the headers are whole."""
        before = self.cycle
        if before is not None and before.response_complete and self._timer is None:
            self._watch()
        super().data_received(data)
        if self.cycle is not before:
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._drop)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
