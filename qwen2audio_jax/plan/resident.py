"""Resident memory: weights and cache as sharded shapes.

The dtypes in which the two may be stored are listed here and nowhere else in the plan.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.model.qwen2_audio import sharded_specs

FLOATS = ("bfloat16", "float16", "float32")
STORED = (*FLOATS, INT8)
BESIDE_INT8 = "bfloat16"
"""The compute dtype with int8 weights, and the stored dtype of weights that are not quantised."""


def compute_dtype(weights: str) -> str:
    """The compute dtype for a storage dtype of the weights."""
    return BESIDE_INT8 if weights == INT8 else weights


def check_stored(*, weights: str, cache: str) -> None:
    """Raise a `ValueError` for a dtype in which weights or cache cannot be stored."""
    for what, dtype in (("--weights", weights), ("--cache", cache)):
        if dtype not in STORED:
            raise ValueError(f"{what} {dtype!r}: there are {', '.join(STORED)}")
    computed = compute_dtype(weights)
    if cache not in (computed, INT8):
        raise ValueError(
            f"--cache {cache} beside --weights {weights}: a cache has the dtype of the computation, {computed}, or int8"
        )


def compute_config(config: Qwen2AudioConfig, *, weights: str) -> Qwen2AudioConfig:
    """The configuration with the compute dtype for a storage dtype of the weights."""
    return replace(config, dtype=compute_dtype(weights))


@cache
def weight_specs(config: Qwen2AudioConfig, *, mesh: Mesh, weights: str = "float") -> Mapping[str, Any]:
    """The weights of a `compute_config` on a mesh; `weights` as in `model.sharded_specs`."""
    return sharded_specs(config, mesh=mesh, weights=weights)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on one device, without layout padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
