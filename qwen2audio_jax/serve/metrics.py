"""Metrics for Prometheus: what the engine counts, and answers by status."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qwen2audio_jax.engine import Engine

GAUGES = ("queued", "slots", "slots_in_use", "capacity")
COUNTERS = (
    *("submitted", "answered", "failed", "cancelled", "tokens", "prompt_tokens", "reused_tokens", "audio_seconds"),
    *("steps", "clips_encoded", "clips_reused"),
)


class Metrics:
    """The registry of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCounts(engine))
        self._answers = Counter(
            "qwen2audio_http_responses", "Responses by address and status", ("path", "status"), registry=self._registry
        )

    def count(self, path: str, status: int) -> None:
        """Count a response."""
        self._answers.labels(path, str(status)).inc()

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
        times = stats["first_token_seconds"] or {"median": 0.0, "p99": 0.0}
        family = GaugeMetricFamily(
            "qwen2audio_first_token_seconds", "seconds to the first token of recent requests", labels=["quantile"]
        )
        for quantile, name in (("0.5", "median"), ("0.99", "p99")):
            family.add_metric([quantile], times[name])
        yield family
