"""TensorBoard event files of scalars: TFRecords of `Event` messages.

tensorboardX's own `SummaryWriter` writes events in a thread up to minutes later, and a killed run loses them; here
records are written immediately.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from qwen2audio_jax.train.extra import import_extra

_EVENTS = "tensorboardX.proto.event_pb2"
_SUMMARIES = "tensorboardX.proto.summary_pb2"


class TensorBoardWriter:
    """One event file; a resumed run adds a file to the folder.

    Args:
        folder: the argument of `tensorboard --logdir`; created if missing.
        start_step: TensorBoard hides the points of earlier files after this step.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, *, start_step: int):
        self._event = import_extra(_EVENTS).Event
        self._summary = import_extra(_SUMMARIES).Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._records = import_extra("tensorboardX").RecordWriter(str(path))
        session = import_extra(_EVENTS).SessionLog
        self._write(file_version="brain.Event:2")
        self._write(step=start_step + 1, session_log=session(status=session.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at `step` to the curve of each tag; on disk when this returns."""
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=points))

    def _write(self, **content: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()
