"""The key/value cache: a value that functions take and return, one pair of buffers a layer, donated step by step.

Rows are left-aligned: position s of a row's buffer holds its s-th token, and `lengths` says how many are valid. What
lies beyond is garbage that the next write replaces and no mask lets through.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from qwen2audio_jax.config import Qwen2AudioTextConfig

T = TypeVar("T")

CACHE_AXES = ("batch", "kv_heads", "capacity", "head_dim")
"""Logical axes of every buffer: positions lie next to each other, so that attention reads one head in one sweep."""


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values", "lengths"), meta_fields=())
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, rotated already.

    Attributes:
        keys: one [B, K, S, H] array a layer.
        values: one [B, K, S, H] array a layer.
        lengths: [B] int32, valid positions of each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """S: how many positions a row can hold."""
        return self.keys[0].shape[2]


def empty_cache(config: Qwen2AudioTextConfig, *, rows: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `rows` rows that hold nothing and have room for `capacity` positions."""
    shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        lengths=jnp.zeros((rows,), jnp.int32),
    )


def write(buffer: jax.Array, new: jax.Array, *, starts: jax.Array) -> jax.Array:
    """Put new keys or values into a layer's buffer at each row's own position.

    Args:
        buffer: [B, K, S, H].
        new: [B, K, T, H], cast to the buffer's dtype.
        starts: [B] int32; starts + T must not pass S, or the write would slide back.
    """

    # A scatter (`.at[].set`) here copies the whole cache; a mapped slice update stays in place.
    def row(row_buffer: jax.Array, row_new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_buffer, row_new, (0, start, 0))

    return jax.vmap(row)(buffer, new.astype(buffer.dtype), starts)


def fork(rows_of: T, sources: Sequence[int] | jax.Array) -> T:
    """Copies of rows: row i of every array in the result is row `sources[i]` of the given one.

    Takes any pytree of arrays with rows first, so that a cache and what belongs to it are forked together.
    """
    index = jnp.asarray(sources, jnp.int32)
    return jax.tree.map(lambda array: jnp.take(array, index, axis=0), rows_of)
