"""Conversion of one stored tensor: to a parameter in its target dtype, or to int8 codes and scales."""

import hashlib
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qwen2audio_jax.checkpoint.hf_folder import StoredTensor
from qwen2audio_jax.checkpoint.manifest import sha256_of
from qwen2audio_jax.checkpoint.mapping import Target
from qwen2audio_jax.checkpoint.reversed_axes import copy_reversed
from qwen2audio_jax.checkpoint.safetensors_file import DTYPES, bits, check_finite
from qwen2audio_jax.model.quantization import INT8, channel_axis, quantize, scale_name

from .add_adapter import Merge
from .dtypes import KEEP, STORED


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
                block = merge.rows(target.parameter, block, start)
            check_finite(block, what=f"{what} with the adapter added")
        rows, scales[start:stop] = quantize(block, axis=1, xp=np)
        if target.transform == "reversed":
            copy_reversed(rows, codes[:, start:stop])
        else:
            codes[start:stop] = rows
    return codes, scales


CASTS = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in STORED if name not in (KEEP, INT8)}

SCHEME = "int8 codes, symmetric, a float32 scale for each output channel: weight = codes * scale"
"""The manifest's note on a quantising conversion."""


@dataclass(frozen=True)
class Task:
    """One stored tensor and its target; `dtype` is int8 for codes and scales."""

    tensor: StoredTensor
    target: Target
    dtype: np.dtype

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of the resulting parameters, by path: one, or codes and scales."""
        name = self.target.parameter
        if self.dtype != np.int8:
            return {name: (self.target.shape, self.dtype)}
        channels = self.tensor.entry.shape[:1]
        return {name: (self.target.shape, self.dtype), scale_name(name): (channels, np.dtype(np.float32))}

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())


@dataclass(frozen=True)
class Made:
    """The parameters converted from a tensor, with their SHA-256, by path, and the tensor's own SHA-256."""

    parameters: dict[str, tuple[np.ndarray, str]]
    source_sha256: str


def stored_dtype(tensor: StoredTensor, target: Target, *, dtype: str) -> np.dtype:
    """The dtype in which a tensor's parameter is stored for a requested `dtype` (one of `STORED`)."""
    if dtype == INT8 and channel_axis(target.parameter) is not None:
        return np.dtype(np.int8)
    return CASTS.get(dtype, DTYPES[tensor.entry.dtype])


def make(task: Task, *, non_finite: str, merge: Merge | None) -> Made:
    """Read a tensor and convert it to its parameters, with an adapter added; raises as `read_parameter`."""
    source = hashlib.sha256()
    name = task.target.parameter
    if task.dtype == np.int8:
        arrays = quantize_parameter(task.tensor, task.target, digest=source, merge=merge)
        made = {part: (array, sha256_of(array)) for part, array in zip(task.parts, arrays, strict=True)}
        return Made(made, source.hexdigest())
    parameter = read_parameter(task.tensor, task.target, dtype=task.dtype, non_finite=non_finite, digest=source)
    same = task.target.transform == "same" and task.dtype == DTYPES[task.tensor.entry.dtype]
    if merge is not None and merge.touches(name):
        merge.add(name, parameter)
        if non_finite == "refuse":
            check_finite(parameter, what=f"{task.tensor.name} with the adapter added")
        same = False
    stored = source if same else hashlib.sha256(bits(parameter).reshape(-1))
    return Made({name: (parameter, stored.hexdigest())}, source.hexdigest())
