"""Metrics for Prometheus: what the engine counts, times of tokens, answers by status and errors by kind."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qwen2audio_jax.engine import Engine
from qwen2audio_jax.serve.errors import ApiError

GAUGES = ("queued", "slots", "slots_in_use", "capacity")
COUNTERS = (
    *("submitted", "answered", "failed", "cancelled", "tokens", "prompt_tokens", "reused_tokens", "audio_seconds"),
    *("steps", "clips_encoded", "clips_reused"),
)
FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
"""Bounds of the buckets of times to the first token, in seconds."""
NEXT = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Those of times between two tokens."""


class Metrics:
    """The registry of one server. Its methods may be called from any thread."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCounts(engine))
        self._answers = Counter(
            "qwen2audio_http_responses", "Responses by address and status", ("path", "status"), registry=registry
        )
        self._errors = Counter(
            "qwen2audio_errors", "Errors that clients were told, by kind", ("kind",), registry=registry
        )
        self._first = Histogram(
            "qwen2audio_time_to_first_token_seconds",
            "Seconds from a request's submission to its first token",
            buckets=FIRST,
            registry=registry,
        )
        self._next = Histogram(
            "qwen2audio_inter_token_seconds", "Seconds between two tokens of a request", buckets=NEXT, registry=registry
        )

    def count(self, path: str, status: int) -> None:
        """Count a response; `path` is a route's, of which there are few."""
        self._answers.labels(path, str(status)).inc()

    def error(self, error: ApiError) -> None:
        """Count an error."""
        self._errors.labels(error.kind).inc()

    def token(self, seconds: float, *, first: bool) -> None:
        """Take the time that a token took: from the request on if it is the first one, else from the one before."""
        (self._first if first else self._next).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCounts:
    """A collector that reads the engine when it is asked."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The metrics of now."""
        stats: dict[str, Any] = self._engine.stats()
        for name in GAUGES:
            yield GaugeMetricFamily(f"qwen2audio_{name}", f"{name.replace('_', ' ')} of the engine", stats[name])
        for name in COUNTERS:
            yield CounterMetricFamily(f"qwen2audio_{name}", f"{name.replace('_', ' ')} since the start", stats[name])
