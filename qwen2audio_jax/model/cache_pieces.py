"""Pieces of a cache: how prompts that were prefilled apart come into the rows of one cache.

A prefill gives its keys and values cut into pieces of one length, and `insert` writes one piece into its place in a
larger cache, which is donated. So the program that writes does not depend on the prefill's width, nor the program that
prefills on the size of the cache that its rows go to: there are as many programs as sizes of the two together, not as
pairs of them.
"""

import jax

from qwen2audio_jax.model.kv_cache import Buffer, KVCache, constrain_buffer

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


def insert_row(cache: KVCache, piece: Piece, source: jax.Array, target: jax.Array, start: jax.Array) -> KVCache:
    """Write one row of a piece into one row of a cache.

    Args:
        cache: [B', K, S, H] buffers. Donate it: nothing but the written positions changes, and none is copied.
        piece: [B, K, PIECE, H] buffers.
        source: [] int32, the row of the piece.
        target: [] int32, the row of the cache.
        start: [] int32, the first position there.

    Returns:
        The cache; its `lengths` are as before.
    """

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(new, source, 1, axis=0)
        return jax.lax.dynamic_update_slice(array, row, (target, 0, start, 0)[: array.ndim])

    return _written(cache, jax.tree.map(put, (cache.keys, cache.values), piece))


def insert_rows(cache: KVCache, piece: Piece, start: jax.Array) -> KVCache:
    """Write all rows of a piece into a cache of as many rows, in their order; as `insert_row` otherwise."""

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, new, (0, 0, start, 0)[: array.ndim])

    return _written(cache, jax.tree.map(put, (cache.keys, cache.values), piece))


def _written(cache: KVCache, buffers: Piece) -> KVCache:
    keys, values = buffers
    return KVCache(tuple(map(constrain_buffer, keys)), tuple(map(constrain_buffer, values)), cache.lengths)
