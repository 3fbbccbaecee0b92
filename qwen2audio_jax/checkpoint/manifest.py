"""Manifest entries of a checkpoint's parameters: shape, dtype, size and SHA-256."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

PARAMS = "params"
"""The folder of a checkpoint's parameters."""


def sha256_of(array: np.ndarray | jax.Array) -> str:
    """The SHA-256 of an array's bytes in C order, in hexadecimal."""
    values = np.ascontiguousarray(np.asarray(array))
    return hashlib.sha256(values.reshape(-1).view(np.uint8)).hexdigest()


def describe(array: np.ndarray | jax.Array, *, sha256: str | None = None) -> dict[str, Any]:
    """A parameter's `shape`, `dtype`, `bytes` and `sha256` (computed unless it is given)."""
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": int(array.nbytes),
        "sha256": sha256_of(array) if sha256 is None else sha256,
    }


def totals(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The numbers of `tensors`, `parameters` (single weights) and `bytes`."""
    return {
        "tensors": len(parameters),
        "parameters": sum(math.prod(each["shape"]) for each in parameters.values()),
        "bytes": sum(each["bytes"] for each in parameters.values()),
    }
