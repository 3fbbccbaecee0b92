"""The metrics of a run on disk: one JSON object a line, and TensorBoard event files beside it.

A run that resumes from a checkpoint repeats the steps after it. Their old lines are removed first, so that the file has
every step once, as if the run had never been interrupted.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import jax

from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.train.tensorboard import TensorBoardWriter

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

Kind = Literal["train", "evaluate"]


class MetricsWriter:
    """Writer of `metrics.jsonl` and `tensorboard/` in a run's folder; on all processes but the first it does nothing.

    A line holds `step`, `kind` and the metrics; a value that is not finite is null there, and NaN or infinite in
    TensorBoard, whose tags are "kind/name".

    Args:
        folder: created if missing.
        start_step: the step that the run resumes from, 0 at its start; lines of later steps are removed.

    Raises:
        ValueError: a line of `metrics.jsonl` has another format, or tensorboardX is not installed.
    """

    def __init__(self, folder: str | PathLike[str], *, start_step: int):
        self._first = jax.process_index() == 0
        if not self._first:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _cut(folder / METRICS, start_step=start_step)
        self._events = TensorBoardWriter(folder / TENSORBOARD, start_step=start_step)
        self._lines = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], *, kind: Kind) -> None:
        """Add the metrics of `step`, scalars by name; flushed to the operating system when this returns."""
        if not self._first:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **finite}, allow_nan=False) + "\n")
        self._lines.flush()
        self._events.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Close the files."""
        if self._first:
            self._lines.close()
            self._events.close()


def read_metrics(folder: str | PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`: `step`, `kind` ("train" or "evaluate") and metrics, None where not finite.

    A torn last line of a killed writer is left out.

    Raises:
        ValueError: there is no such file, or a line has another format.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise ValueError(f"no {METRICS} in {os.fspath(folder)}; give the output folder of a training run")
    return [entry for entry, _ in _read(path)]


def _read(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each complete line, parsed and as raw bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                entry["step"] + 0, entry["kind"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: not a line of metrics; remove it or choose another output folder"
                ) from None
            yield entry, line


def _cut(path: Path, *, start_step: int) -> None:
    if not path.exists():
        return
    kept = b"".join(line for entry, line in _read(path) if entry["step"] <= start_step)
    if len(kept) == path.stat().st_size:
        return
    write_whole(path, kept)
