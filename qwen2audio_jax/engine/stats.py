"""Statistics of an engine: counts since its start, and what they make a second."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

RECENT = 256
"""Answers whose times to the first token are kept."""


@dataclass
class Counts:
    """Counters that the engine's thread keeps; `read` may be called from any thread."""

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    audio_seconds: float = 0.0
    steps: int = 0
    full_steps: int = 0
    full_row_steps: int = 0
    enqueued_seconds: float = 0.0
    first_insert: float = 0.0
    last_read: float = 0.0
    _first_tokens: list[float] = field(default_factory=list)
    _enqueued: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: float) -> None:
        """Add to counters."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def first_token(self, seconds: float) -> None:
        """Keep a time to the first token."""
        with self._lock:
            self._first_tokens.append(seconds)
            del self._first_tokens[:-RECENT]

    def issued(self) -> None:
        """Note that the device has work."""
        now = time.monotonic()
        self.first_insert = self.first_insert or now
        if self._enqueued is None:
            self._enqueued = now

    def read(self, *, left: bool) -> None:
        """Note that work was done, and whether the device has some left."""
        now = time.monotonic()
        self.last_read = now
        if not left and self._enqueued is not None:
            self.enqueued_seconds += now - self._enqueued
            self._enqueued = None

    def figures(self) -> dict[str, Any]:
        """All counts and rates as plain data.

        `occupancy` is the share of a step's rows that had a request to continue, over steps while others waited;
        `enqueued_share` that of the time from the first prompt to the last token in which the device had work;
        `first_token_seconds` the median and the 99th percentile of the last answers.
        """
        with self._lock:
            busy = self.enqueued_seconds
            if self._enqueued is not None:
                busy += time.monotonic() - self._enqueued
            span = self.last_read - self.first_insert
            times = sorted(self._first_tokens)

            def share(part: float, whole: float) -> float | None:
                return round(min(part / whole, 1.0), 4) if whole > 0 else None

            def rate(count: float) -> float | None:
                return round(count / busy, 2) if busy > 0 else None

            return {
                "submitted": self.submitted,
                "answered": self.answered,
                "failed": self.failed,
                "cancelled": self.cancelled,
                "tokens": self.tokens,
                "prompt_tokens": self.prompt_tokens,
                "reused_tokens": self.reused_tokens,
                "audio_seconds": round(self.audio_seconds, 2),
                "steps": self.steps,
                "tokens_per_second": rate(self.tokens),
                "audio_seconds_per_second": rate(self.audio_seconds),
                "occupancy": share(self.full_row_steps, self.full_steps),
                "enqueued_share": share(busy, span),
                "first_token_seconds": (
                    {"median": round(times[len(times) // 2], 4), "p99": round(times[(len(times) * 99) // 100], 4)}
                    if times
                    else None
                ),
            }
