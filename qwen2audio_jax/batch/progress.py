"""Progress of a batch job: counts, a line on stderr, a summary, and a file of metrics."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2audio_jax.storage.write_whole import write_whole

Row = Mapping[str, Any]
OnProgress = Callable[[dict[str, Any]], None]
"""Called with `Progress.figures()` after every group of records."""

TERMINAL_SECONDS, LOG_SECONDS = 1.0, 60.0
"""Seconds between two lines, on a terminal and elsewhere; the metrics are written as often as on a terminal."""


class Progress:
    """What this run has done so far.

    Args:
        left: records of the job without an answer.
        quiet: show no line.
        metrics: a file for the figures: a JSON line each time if its name ends with .jsonl, else Prometheus' text
            format, replaced each time.
        on_progress: called with the figures.
    """

    def __init__(
        self, *, left: int, quiet: bool = False, metrics: Path | None = None, on_progress: OnProgress | None = None
    ):
        self._left, self._quiet, self._metrics, self._tell = left, quiet, metrics, on_progress
        self._began = self._shown = self._written = time.monotonic()
        self.records = self.errors = self.tokens = 0
        self.audio_seconds = 0.0
        self.kinds: Counter[str] = Counter()
        self.suspects: Counter[str] = Counter()

    def add(self, rows: Sequence[Row]) -> None:
        """Count a group's rows, and tell of it."""
        for row in rows:
            self.records += 1
            self.audio_seconds += row.get("audio_seconds", 0.0)
            self.tokens += row.get("tokens", 0)
            self.suspects.update(row.get("suspect", ()))
            if "error" in row:
                self.errors += 1
                self.kinds[row["error"]["kind"]] += 1
        self._report()

    def figures(self) -> dict[str, Any]:
        """Counts, rates and the time left as plain data."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        left = max(self._left - self.records, 0)
        return {
            "records": self.records,
            "left": left,
            "errors": self.errors,
            "error_kinds": dict(self.kinds),
            "suspects": dict(self.suspects),
            "tokens": self.tokens,
            "audio_seconds": round(self.audio_seconds, 2),
            "seconds": round(seconds, 2),
            "audio_hours_per_hour": round(self.audio_seconds / seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 2),
            "seconds_left": round(left * seconds / self.records) if self.records else None,
        }

    def finish(self) -> None:
        """Write the last metrics, and end the terminal's line."""
        self._write_metrics()
        if not self._quiet and sys.stderr.isatty():
            print(file=sys.stderr)

    def _report(self) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self._tell is not None:
            self._tell(self.figures())
        if not self._quiet and now - self._shown >= (TERMINAL_SECONDS if terminal else LOG_SECONDS):
            self._shown = now
            print(f"\r\x1b[K{self.line()}" if terminal else self.line(), end="" if terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
        if now - self._written >= TERMINAL_SECONDS:
            self._written = now
            self._write_metrics()

    def line(self) -> str:
        """The figures for people."""
        now = self.figures()
        left = now["seconds_left"]
        clock = "?" if left is None else f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return (
            f"{now['records']} of {now['records'] + now['left']} records, {now['audio_hours_per_hour']:g} audio hours "
            f"an hour, {now['tokens_per_second']:g} tokens/s, {now['errors']} errors, "
            f"{sum(now['suspects'].values())} suspect, {clock} left"
        )

    def _write_metrics(self) -> None:
        if self._metrics is None:
            return
        figures = self.figures()
        if self._metrics.suffix == ".jsonl":
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **figures}) + "\n")
        else:
            write_whole(self._metrics, prometheus_text(figures).encode())


def prometheus_text(figures: Mapping[str, Any]) -> str:
    """The figures in Prometheus' text format, as its node exporter collects from files."""
    counters = ("records", "errors", "tokens", "audio_seconds")
    lines = []
    for name in (*counters, "left", "audio_hours_per_hour", "tokens_per_second"):
        full = f"qwen2audio_batch_{name}" + "_total" * (name in counters)
        lines += [f"# TYPE {full} {'counter' if name in counters else 'gauge'}", f"{full} {figures[name]}"]
    for name, label in (("error_kinds", "kind"), ("suspects", "sign")):
        lines.append(f"# TYPE qwen2audio_batch_{name}_total counter")
        lines += [
            f'qwen2audio_batch_{name}_total{{{label}="{key}"}} {count}' for key, count in sorted(figures[name].items())
        ]
    return "\n".join(lines) + "\n"
