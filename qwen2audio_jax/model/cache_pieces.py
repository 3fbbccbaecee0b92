"""Pieces of a cache: how prompts that were prefilled apart come into the rows of one cache.

A prefill gives its keys and values cut into pieces of one length, and `insert` writes one piece into its place in a
larger cache, which is donated. So the program that writes does not depend on the prefill's width, nor the program that
prefills on the size of the cache that its rows go to: there are as many programs as sizes of the two together, not as
pairs of them.
"""

import jax

from qwen2audio_jax.model.kv_cache import CACHE_AXES, Buffer, KVCache, constrain_buffer
from qwen2audio_jax.parallel.sharding import constrain

PIECE = 128
"""Positions of a piece. The capacity of a cache with inserted rows is a multiple of it."""

Piece = tuple[tuple[Buffer, ...], tuple[Buffer, ...]]
"""Keys and values of every layer, each [B, K, PIECE, H]."""


def pieces(cache: KVCache) -> tuple[Piece, ...]:
    """The cache's positions, PIECE at a time; its capacity is a multiple of that."""

    def cut(buffer: Buffer, start: int) -> Buffer:
        return constrain_buffer(jax.tree.map(lambda array: array[:, :, start : start + PIECE], buffer))

    return tuple(
        (tuple(cut(keys, start) for keys in cache.keys), tuple(cut(values, start) for values in cache.values))
        for start in range(0, cache.capacity, PIECE)
    )


def row_of(piece: Piece, row: jax.Array) -> Piece:
    """One row of a piece by itself, [1, K, PIECE, H] buffers; `row` [] int32."""

    def take(array: jax.Array) -> jax.Array:
        taken = jax.lax.dynamic_slice_in_dim(array, row, 1, axis=0)
        return constrain(taken, None, *CACHE_AXES[1 : array.ndim])

    return jax.tree.map(take, piece)


def insert(cache: KVCache, piece: Piece, row: jax.Array, start: jax.Array) -> KVCache:
    """Write a piece into a cache.

    Args:
        cache: [B, K, S, H] buffers. Donate it: nothing but the written positions changes, and none is copied.
        piece: [R, K, PIECE, H] buffers, of one row or of all.
        row: [] int32, the first row of the cache that is written.
        start: [] int32, the first position.

    Returns:
        The cache; its `lengths` are as before.
    """

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, new, (row, 0, start, 0)[: array.ndim])

    keys, values = jax.tree.map(put, (cache.keys, cache.values), piece)
    return KVCache(tuple(map(constrain_buffer, keys)), tuple(map(constrain_buffer, values)), cache.lengths)
