"""Writer of a Hugging Face folder: exclusive lock, complete files only, and resumable exports.

A file gets its final name when it is complete and on disk. Until all files are there, the folder also holds a marker,
locked by its writer, and a description of the export.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen2audio_jax.config.strict_json import read_json_object
from qwen2audio_jax.storage.write_whole import draft_of

MARKER = ".qwen2audio_jax_export"
NOTE = f"{MARKER}.json"


class ExportFolder:
    """A folder being exported; see `export_folder`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.finished = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        """Weight files of an earlier attempt, and their lengths."""
        self._written = [folder / name for name in self.finished]

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Let `fill` write a file to a temporary path, then rename it to `name`."""
        self._written.append(self._folder / name)
        with draft_of(self._folder / name) as draft:
            fill(draft)

    def remove(self) -> None:
        """Remove everything that was written."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def has_weights(self) -> bool:
        """Return True if a weight file is finished."""
        return any(self._folder.glob("*.safetensors"))


def check_folder(out: Path) -> None:
    """Raise a `ValueError` unless an export may be written to `out`."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists())):
        raise ValueError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}; choose a new or empty folder")


@contextmanager
def export_folder(out: Path, *, work: Mapping[str, Any] | None) -> Iterator[ExportFolder]:
    """Write a folder: it is complete when the block ends.

    When the block raises a `ValueError`, or any error while `work` is None, the folder is emptied. Other errors (a full
    disk, an interruption) leave its finished weight files, as a kill does, and the same `work` resumes from there.

    Raises:
        ValueError: `out` holds something else, or another export, or another process is writing it.
    """
    check_folder(out)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / MARKER)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{out}: another process is writing this export; wait for it to end") from None
    try:
        if any(out.glob("*.safetensors")) and ((out / NOTE).exists() and read_json_object(out / NOTE)) != work:
            raise ValueError(
                f"{out}: holds an unfinished export of another checkpoint, or with other options; finish it as it was "
                "begun, remove the folder, or choose another"
            )
        folder = ExportFolder(out)
        try:
            for draft in out.glob(".*.incomplete"):
                draft.unlink()
            folder.write(NOTE, lambda path: path.write_text(json.dumps(work), encoding="utf-8"))
            yield folder
        except BaseException as error:
            if isinstance(error, ValueError) or work is None or not folder.has_weights():
                folder.remove()
                (out / MARKER).unlink()
                if created:
                    with suppress(OSError):  # Another process may have put something there.
                        out.rmdir()
            raise
        (out / NOTE).unlink()
        (out / MARKER).unlink()
    finally:
        lock.release()
