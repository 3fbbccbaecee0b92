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


def damaged_entry(manifest: Mapping[str, Any]) -> str | None:
    """The name of an entry of a manifest that no writer writes; None if there is none."""
    for name in ("source", "totals", "parameters", "files"):
        if not isinstance(manifest.get(name), dict):
            return name
    if not all(_is_count(manifest["totals"].get(key)) for key in ("tensors", "parameters", "bytes")):
        return "totals"
    if not isinstance(manifest.get("tool"), str):
        return "tool"
    for name, record in manifest["parameters"].items():
        shape = record.get("shape") if isinstance(record, dict) else None
        if (
            not isinstance(shape, list)
            or not all(_is_count(number) for number in [*shape, record.get("bytes")])
            or not all(isinstance(record.get(key), str) for key in ("dtype", "sha256"))
        ):
            return f"parameters.{name}"
    return next((f"files.{name}" for name, size in manifest["files"].items() if not _is_count(size)), None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def totals(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The numbers of `tensors`, `parameters` (single weights) and `bytes`."""
    return {
        "tensors": len(parameters),
        "parameters": sum(math.prod(each["shape"]) for each in parameters.values()),
        "bytes": sum(each["bytes"] for each in parameters.values()),
    }
