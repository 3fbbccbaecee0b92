"""The key/value cache: a value that functions take and return, one pair of buffers per layer, donated at each step.

Rows are left-aligned: position s of a row's buffer holds its s-th token, and `lengths` counts the valid ones. Positions
beyond are garbage, masked everywhere and overwritten by the next write. Values are numbers even there, as a weight of
zero does not mask NaN: see `numbers`.

An int8 cache holds codes and a scale for every token and head. It is quantised when written and never dequantised in
memory: see `attention`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioTextConfig
from qwen2audio_jax.model.quantization import quantize
from qwen2audio_jax.parallel.sharding import constrain, named_sharding, partition_spec

T = TypeVar("T")

CACHE_AXES = ("batch", "kv_heads", "capacity", "head_dim")
"""Logical axes of every buffer: positions are contiguous, so that attention reads one head sequentially."""

SCALE_AXES = CACHE_AXES[:3]
"""Logical axes of the scales of an int8 buffer."""


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=())
@dataclass(frozen=True)
class Int8Buffer:
    """Keys or values of one layer: codes * scales.

    Attributes:
        codes: [B, K, S, H] int8.
        scales: [B, K, S] float32.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, S, H)."""
        return self.codes.shape


Buffer = jax.Array | Int8Buffer
"""Keys or values of one layer, [B, K, S, H]."""


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values", "lengths"), meta_fields=())
@dataclass(frozen=True)
class KVCache:
    """Keys (already rotated) and values of every layer.

    Attributes:
        keys: one [B, K, S, H] buffer per layer.
        values: one [B, K, S, H] buffer per layer.
        lengths: [B] int32, valid positions of each row.
    """

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """S: the number of positions a row can hold."""
        return self.keys[0].shape[2]


def empty_cache(config: Qwen2AudioTextConfig, *, rows: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `rows` empty rows of `capacity` positions; `dtype` may be int8."""
    shape = (rows, config.num_key_value_heads, capacity, config.head_dim)

    def buffer() -> Buffer:
        zeros = jnp.zeros(shape, dtype)
        return Int8Buffer(zeros, jnp.zeros(shape[:3], jnp.float32)) if dtype == jnp.int8 else zeros

    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(buffer() for _ in layers),
        values=tuple(buffer() for _ in layers),
        lengths=jnp.zeros((rows,), jnp.int32),
    )


@functools.cache
def cache_specs(config: Qwen2AudioTextConfig, *, rows: int, capacity: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
    """An `empty_cache` on a mesh, as `jax.ShapeDtypeStruct`s with their shardings; nothing is traced."""
    shape = (rows, config.num_key_value_heads, capacity, config.head_dim)

    def array(shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))

    buffer: Any = array(shape, dtype, CACHE_AXES)
    if dtype == jnp.int8:
        buffer = Int8Buffer(buffer, array(shape[:3], jnp.float32, SCALE_AXES))  # type: ignore[arg-type]
    layers = (buffer,) * config.num_hidden_layers
    return KVCache(layers, layers, array((rows,), jnp.int32, ("batch",)))  # type: ignore[arg-type]


def first(buffer: Buffer, window: int) -> Buffer:
    """The first `window` positions of every row."""
    return jax.tree.map(lambda array: array[:, :, :window], buffer)


def constrain_buffer(buffer: Buffer) -> Buffer:
    """Constrain the sharding of a traced buffer: see `sharding.constrain`."""
    return jax.tree.map(lambda array: constrain(array, *CACHE_AXES[: array.ndim]), buffer)


def numbers(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New keys and values [B, K, T, H], in which what is NaN or infinite (float16 overflows) is in the keys alone.

    A value that is no number becomes 0 and its key NaN: who attends to such a position still gets NaN, by its score,
    and who is masked from it gets nothing of it: the next request in the same row, a shorter prompt.
    """
    finite = jnp.isfinite(values)
    return jnp.where(finite, keys, jnp.nan), jnp.where(finite, values, 0)


def write(buffer: Buffer, new: jax.Array, *, starts: jax.Array) -> Buffer:
    """Write new keys or values into a layer's buffer at each row's own position.

    Args:
        buffer: [B, K, S, H].
        new: [B, K, T, H], cast to the buffer's dtype or quantised.
        starts: [B] int32; starts + T must not exceed S, or the write is shifted back.
    """
    if isinstance(buffer, Int8Buffer):
        codes, scales = quantize(new, axis=-1)
        return Int8Buffer(_written(buffer.codes, codes, starts), _written(buffer.scales, scales, starts))
    return _written(buffer, new.astype(buffer.dtype), starts)


def _written(buffer: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    one = buffer.ndim == 4 and new.shape[2] == 1 and buffer.dtype in (jnp.bfloat16, jnp.float16)
    return jax.lax.platform_dependent(buffer, new, starts, cpu=_selected if one else _mapped, default=_mapped)


def _mapped(buffer: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    # A scatter (`.at[].set`) here copies the whole cache; a mapped slice update stays in place.
    def row(row_buffer: jax.Array, row_new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_buffer, row_new, (0, start, 0)[: row_buffer.ndim])

    def head(head_buffer: jax.Array, head_new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(head_buffer, head_new, (start, 0)[: head_buffer.ndim])

    if len(buffer) == 1:
        # Mapped over one row or one start alone, the update would become a plain one, which XLA's CPU backend computes
        # anew in everything that reads the buffer: several copies of it a layer.
        return jax.vmap(head)(buffer[0], new[0], jnp.broadcast_to(starts, buffer.shape[1:2]))[None]
    return jax.vmap(row)(buffer, new, starts)


def _selected(buffer: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """`_mapped` of one position a row: to update a slice XLA's CPU backend widens a bfloat16 buffer to float32."""
    here = jnp.arange(buffer.shape[2]) == starts[:, None]
    return jnp.where(here[:, None, :, None], new, buffer)


def fork(rows_of: T, sources: Sequence[int] | jax.Array) -> T:
    """Copies of rows: row i of every array in the result is row `sources[i]` of the given one.

    Takes any pytree of arrays with rows first, so that a cache and its companions are forked together.
    """
    index = jnp.asarray(sources, jnp.int32)
    return jax.tree.map(lambda array: jnp.take(array, index, axis=0), rows_of)


def enlarge(buffer: Buffer, *, capacity: int) -> Buffer:
    """A layer's buffer with room for `capacity` (static) positions, its own first."""

    def resized(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, capacity - size if axis == 2 else 0) for axis, size in enumerate(array.shape)])

    return constrain_buffer(jax.tree.map(resized, buffer))


def shorten(buffer: Buffer, *, capacity: int) -> Buffer:
    """The first `capacity` (static) positions of a layer's buffer."""
    return constrain_buffer(first(buffer, capacity))


def rows_at(array: jax.Array, sources: jax.Array) -> jax.Array:
    """Rows `sources` [B'] int32 of an array of a cache's buffer, [B, K, S, H] or [B, K, S]; [B', ...].

    Where rows are split over `data`, each device gives those that it has: a plain gather there copies the whole array
    first. Both numbers of rows divide by the parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1:
        return jnp.take(array, sources, axis=0)

    def own(rows: jax.Array, sources: jax.Array) -> jax.Array:
        places = sources - len(rows) * jax.lax.axis_index("data")
        here = (places >= 0) & (places < len(rows))
        found = _each(rows, jnp.clip(places, 0, len(rows) - 1))
        found = jnp.where(here.reshape(-1, *[1] * (found.ndim - 1)), found, 0)
        return jax.lax.psum_scatter(found, "data", tiled=True)

    split = partition_spec(*CACHE_AXES[: array.ndim])
    return jax.shard_map(own, in_specs=(split, partition_spec()), out_specs=split, check_vma=False)(array, sources)


def own_rows_at(array: jax.Array, places: jax.Array, *axes: str | None) -> jax.Array:
    """Rows of an array with these logical axes, rows first, that stay on their device.

    Args:
        array: [B, ...].
        places: [B'] int32: each part of `data` has as many, which count from the first row of that part.
        axes: of the array.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _each(array, places)
    split = partition_spec(*axes)
    both = (split, partition_spec("batch"))
    return jax.shard_map(_each, in_specs=both, out_specs=split, check_vma=False)(array, places)


def _each(array: jax.Array, places: jax.Array) -> jax.Array:
    # One at a time: compiled for TPUs, a gather of several lays the whole array out anew.
    return jax.lax.map(lambda place: jax.lax.dynamic_index_in_dim(array, place, keepdims=False), places)


def moved(cache: KVCache, sources: jax.Array, lengths: jax.Array, *, capacity: int) -> KVCache:
    """Copy row prefixes into a new cache, whose numbers of rows and positions may differ from the given one's.

    Args:
        cache: to copy from.
        sources: [B'] int32, the row that each new row is copied from.
        lengths: [B'] int32, the number of its positions that are valid; at most `capacity`.
        capacity: static, positions of the new cache.
    """

    def resized(array: jax.Array) -> jax.Array:
        taken = rows_at(array[:, :, :capacity], sources)
        missing = [(0, capacity - taken.shape[2] if axis == 2 else 0) for axis in range(taken.ndim)]
        return jnp.pad(taken, missing)

    keys, values = jax.tree.map(resized, (cache.keys, cache.values))
    return KVCache(tuple(map(constrain_buffer, keys)), tuple(map(constrain_buffer, values)), lengths)
