"""Byte ranges of files: of a local file by `pread`, of a bucket's object by range requests."""

import os
import stat
from pathlib import Path
from typing import Any

from qwen2audio_jax.storage.bucket import BucketPath

REQUEST_BYTES = 16 << 20
"""Bytes per range request: enough that the wait for the first byte is a small part of its time."""


class LocalBytes:
    """An open local file.

    Raises:
        ValueError: it is not a regular file.
    """

    def __init__(self, path: Path):
        self._path = path
        # Opening a named pipe would block.
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"{path}: is not a regular file")
        self.size = status.st_size
        self.stamp: list[Any] | None = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            ValueError: the file has become shorter.
        """
        done = 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{self._path}: ends at byte {offset + done}, within a tensor; copy the file again")
            done += count

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class BucketBytes:
    """An object in a bucket, read by requests of `at_once` bytes."""

    def __init__(self, path: BucketPath, *, at_once: int):
        self._path = path
        self.size = path.stat().st_size
        self._at_once = at_once
        self.stamp = path.stamp

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            ValueError: the object has become shorter.
            OSError: it cannot be read, tried several times.
        """
        for start in range(0, len(view), self._at_once):
            self._path.read_into(view[start : start + self._at_once], offset + start)

    def close(self) -> None:
        """Do nothing: no handle is open."""
