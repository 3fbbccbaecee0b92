"""Safetensors writer: one pass, the header first, then the tensors block by block, never a whole one in memory.

Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen2audio_jax.checkpoint.safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def file_bytes(tensors: Sequence[Planned]) -> int:
    """The length of the file that `SafetensorsWriter` writes for `tensors`."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


class SafetensorsWriter:
    """A new file for `tensors`, whose values must be passed to `write` in the same order.

    Raises:
        OSError: the file exists, or the disk is full or fails.
    """

    def __init__(self, path: Path, tensors: Sequence[Planned]):
        self._left = sum(tensor.nbytes for tensor in tensors)
        self._file = open(path, "xb")  # noqa: SIM115 closed by `finish` or `close`
        self._file.write(_header(tensors))

    def write(self, blocks: Iterable[np.ndarray]) -> None:
        """Append the next values: contiguous blocks of rows."""
        for block in blocks:
            self._left -= self._file.write(block.reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Flush the file to disk and close it."""
        assert self._left == 0, f"{self._left} bytes were announced and not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close an unfinished file."""
        self._file.close()
