"""Reading of a stored tensor into a parameter's array: in blocks, hashed, checked, cast and laid out."""

import hashlib

import numpy as np

from qwen2audio_jax.quantization import quantize

from .hf_folder import StoredTensor
from .mapping import Target
from .merging import Merge
from .safetensors_file import DTYPES

_EXPONENTS = {DTYPES["BF16"]: 0x7F80, DTYPES["F16"]: 0x7C00, DTYPES["F32"]: 0x7F800000}
"""All exponent bits: Inf and NaN have every one of them set, finite numbers do not."""

_STRIP_ROWS = 16
"""Rows transposed at once: few enough that their cache lines stay in cache while the columns are written."""


def read_parameter(
    tensor: StoredTensor, target: Target, *, dtype: np.dtype, non_finite: str, digest: "hashlib._Hash"
) -> np.ndarray:
    """Read a tensor into a parameter's array.

    Args:
        tensor: the source.
        target: the parameter that it fills.
        dtype: of the result; bytes are unaltered if it is the tensor's own.
        non_finite: "refuse" or "allow".
        digest: updated with the tensor's bytes as they are read.

    Raises:
        ValueError: it holds NaN or Inf, or a value that is Inf after the cast.
    """
    parameter = np.empty(target.shape, dtype)
    reverse = target.transform == "reversed"
    # Plain integers of the same width: numpy copies its own types several times faster than bfloat16.
    view = bits(parameter)
    for start, block in tensor.blocks():
        digest.update(bits(block).reshape(-1))
        if non_finite == "refuse":
            check_finite(block, what=f"{tensor.file.path}: {tensor.name}")
        if block.dtype != dtype:
            with np.errstate(over="ignore"):
                block = block.astype(dtype)
            if non_finite == "refuse":
                cast = f"after the cast from {tensor.entry.dtype} to {dtype}"
                check_finite(block, what=f"{tensor.file.path}: {tensor.name} {cast}")
        rows = bits(block)
        if reverse:
            copy_reversed(rows, view[..., start : start + len(rows)])
        else:
            view[start : start + len(rows)] = rows
    return parameter


def quantize_parameter(
    tensor: StoredTensor, target: Target, *, digest: "hashlib._Hash", merge: Merge | None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a tensor into a parameter's int8 codes [the parameter's shape] and float32 scales, one per tensor row.

    Rows are output channels in both transforms: each is quantised on its own as it is read, and no more than a block is
    in memory as floats.

    Args:
        tensor: the source.
        target: the parameter that it fills.
        digest: updated with the tensor's bytes as they are read.
        merge: an adapter that is added first, if it touches this parameter.

    Raises:
        ValueError: it holds NaN or Inf, before or after adding the adapter.
    """
    codes = np.empty(target.shape, np.int8)
    scales = np.empty(tensor.entry.shape[0], np.float32)
    what = f"{tensor.file.path}: {tensor.name}"
    for start, block in tensor.blocks():
        digest.update(bits(block).reshape(-1))
        check_finite(block, what=what)
        stop = start + len(block)
        if merge is not None and merge.touches(target.parameter):
            with np.errstate(over="ignore", invalid="ignore"):
                block = block.astype(np.float32) + merge.addition(target.parameter, start, stop)
            check_finite(block, what=f"{what} with the adapter added")
        rows, scales[start:stop] = quantize(block, axis=1, xp=np)
        if target.transform == "reversed":
            copy_reversed(rows, codes[:, start:stop])
        else:
            codes[start:stop] = rows
    return codes, scales


def copy_reversed(rows: np.ndarray, out: np.ndarray) -> None:
    """Copy an array with all axes reversed into one of the reversed shape."""
    for first in range(0, len(rows), _STRIP_ROWS):
        strip = rows[first : first + _STRIP_ROWS]
        out[..., first : first + len(strip)] = strip.T


def reversed_axes(array: np.ndarray) -> np.ndarray:
    """A contiguous array with all axes reversed."""
    out = np.empty(array.shape[::-1], array.dtype)
    copy_reversed(array, out)
    return out


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
