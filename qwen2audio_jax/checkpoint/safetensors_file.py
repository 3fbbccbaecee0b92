"""Safetensors reader: strict header checks, and tensors read in blocks from local files or a bucket.

Memory-mapped pages count as resident memory, so reading a checkpoint that way takes its whole size; here a tensor
passes through one small buffer. Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from qwen2audio_jax.checkpoint.ranges import REQUEST_BYTES, BucketBytes, LocalBytes
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage.bucket import BucketPath, Folder

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
"""Supported dtypes of stored weights."""

_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}

BLOCK_BYTES = 256 << 10
"""Bytes of a tensor processed at once, unless one row alone is longer, so that they stay in cache; also the read size
for local files."""


@dataclass(frozen=True)
class Entry:
    """Header entry of one tensor: dtype by its safetensors name, shape, offset from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class SafetensorsFile:
    """An open file: `entries` by tensor name, and `blocks` to read one.

    Raises:
        ValueError: not a regular file, or its header is inconsistent with itself or the file's length: too long, not
            JSON, a duplicate name, an unknown dtype, an impossible shape, offsets that leave gaps, overlap, or end
            before or after the file.
    """

    def __init__(self, path: Folder, *, request_bytes: int = REQUEST_BYTES):
        """Read the header; from a bucket, at most `request_bytes` at once."""
        self.path = path
        self._bytes: LocalBytes | BucketBytes
        self._fetched = request_bytes if isinstance(path, BucketPath) else None
        if isinstance(path, BucketPath):
            self._bytes = BucketBytes(path, at_once=request_bytes)
        else:
            self._bytes = LocalBytes(path)
        self.stamp = self._bytes.stamp
        """Length, and fields that change with the file (modification times if local); None if there are none."""
        try:
            self.entries = self._read_header(self._bytes.size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._bytes.close()

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """A tensor in blocks (first row, rows) along its first axis. A block is overwritten by later ones.

        Raises:
            ValueError: the file has become shorter.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        shape = entry.shape or (1,)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        fetched, worked = (
            max(1, min(shape[0], count // max(row_bytes, 1))) for count in (self._fetched or BLOCK_BYTES, BLOCK_BYTES)
        )
        buffer = np.empty((fetched, *shape[1:]), dtype)
        for first in range(0, shape[0], fetched):
            rows = buffer[: min(fetched, shape[0] - first)]
            self._bytes.read_into(memoryview(rows.reshape(-1).view(np.uint8)), entry.offset + first * row_bytes)
            for start in range(0, len(rows), worked):
                yield first + start, rows[start : start + worked]

    def _read_header(self, size: int) -> dict[str, Entry]:
        if size < 8:
            raise self._bad(f"{size} bytes are too few for a header")
        prefix = bytearray(8)
        self._bytes.read_into(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > LIMITS.safetensors_header_bytes:
            raise self._bad(f"states a header of {length} bytes; at most {LIMITS.safetensors_header_bytes} are read")
        if 8 + length > size:
            raise self._bad(f"states a header of {length} bytes, but the file has {size}")
        text = bytearray(length)
        self._bytes.read_into(memoryview(text), 8)
        if not text.startswith(b"{"):
            raise self._bad("the header does not begin with '{'")
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"the header is not valid JSON ({error})") from None
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad("__metadata__ must map names to strings")
        return self._check_entries(header, base=8 + length, size=size)

    def _check_entries(self, header: dict[str, Any], *, base: int, size: int) -> dict[str, Entry]:
        entries, spans = {}, []
        for name, value in header.items():
            if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
                raise self._bad(f"tensor {name!r} must state dtype, shape and data_offsets, and nothing else")
            dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
            if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
                raise self._bad(f"tensor {name!r} has the unknown dtype {dtype!r}")
            if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
                raise self._bad(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
            entries[name] = Entry(dtype, tuple(shape), base + offsets[0])
            if offsets[1] - offsets[0] != entries[name].nbytes:
                raise self._bad(
                    f"tensor {name!r} of {dtype} {tuple(shape)} takes {entries[name].nbytes} bytes, "
                    f"but data_offsets are {offsets}"
                )
            spans.append((offsets[0], offsets[1], name))
        end = 0
        for first, last, name in sorted(spans):
            if first != end:
                what = "overlaps the one before" if first < end else "leaves a gap before it"
                raise self._bad(f"tensor {name!r} {what}: it begins at {first}, the one before ends at {end}")
            end = last
        if base + end != size:
            raise self._bad(f"the tensors end at byte {base + end}, but the file has {size}; copy it again")
        return entries

    def _bad(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: not a valid safetensors file: {what}")


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 63 for each in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} stands twice")
        result[key] = value
    return result


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_EXPONENTS = {DTYPES["BF16"]: 0x7F80, DTYPES["F16"]: 0x7C00, DTYPES["F32"]: 0x7F800000}
"""All exponent bits: Inf and NaN have every one of them set, finite numbers do not."""


def check_finite(array: np.ndarray, *, what: str) -> None:
    """Raise a `ValueError` if an array holds NaN or Inf."""
    if array.dtype == np.int8:
        return
    values = bits(array)
    mask = _EXPONENTS[array.dtype]
    if values.size and int((values & values.dtype.type(mask)).max()) == mask:
        raise ValueError(
            f"{what} holds NaN or Inf; mend the checkpoint, or allow it with non_finite='allow' (--allow-non-finite)"
        )


def bits(array: np.ndarray) -> np.ndarray:
    """A view of an array as plain integers of the same width."""
    return array.view(f"u{array.dtype.itemsize}")
