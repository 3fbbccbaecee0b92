"""Memory check for the key/value cache: its size against the devices' free memory, before it is allocated."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioTextConfig
from qwen2audio_jax.model.kv_cache import cache_specs

GIB = 1 << 30


def cache_bytes(config: Qwen2AudioTextConfig, *, rows: int, capacity: int, dtype: jnp.dtype, mesh: Mesh) -> int:
    """Bytes of a cache on each device of a mesh."""
    specs = cache_specs(config, rows=rows, capacity=capacity, dtype=dtype, mesh=mesh)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(specs)
    )


def free_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Free bytes of the fullest device; None where devices do not report memory (CPUs)."""
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free.append(int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0)))
    return min(free, default=None)


def check_fits(
    config: Qwen2AudioTextConfig, *, rows: int, capacity: int, dtype: jnp.dtype, mesh: Mesh, spare: int = 0
) -> None:
    """Raise a `ValueError` if a cache exceeds the free memory of a device of this process, where it is reported.

    `spare` bytes on each device count as free: memory in use now that is released for the cache.
    """
    free = free_bytes(mesh.local_devices)
    if free is None:
        return
    free += spare
    needed = cache_bytes(config, rows=rows, capacity=capacity, dtype=dtype, mesh=mesh)
    if needed > free:
        other = "" if dtype == jnp.int8 else ", load the model with cache_dtype='int8'"
        counted = "1 row" if rows == 1 else f"{rows} rows"
        raise ValueError(
            f"a {dtype} cache of {counted} x {capacity} positions takes {needed / GIB:.2f} GiB on each device, and "
            f"{max(free, 0) / GIB:.2f} GiB are left: give fewer rows at once, a shorter prompt or a smaller "
            f"max_new_tokens{other}, or a mesh of more devices"
        )
