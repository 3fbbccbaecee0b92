"""Conversion of one stored tensor: to a parameter in its target dtype, or to int8 codes and scales."""

import hashlib
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qwen2audio_jax.manifest import sha256_of
from qwen2audio_jax.quantization import INT8, channel_axis, scale_name

from .hf_folder import StoredTensor
from .mapping import Target
from .merging import Merge
from .reading import bits, check_finite, quantize_parameter, read_parameter
from .safetensors_file import DTYPES

KEEP = "keep"
CASTS = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
STORED = (KEEP, *CASTS, INT8)
"""The dtypes that a conversion can store."""

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
    """Read a tensor and convert it to its parameters, with an adapter added; raises as `reading.read_parameter`."""
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
