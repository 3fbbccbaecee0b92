"""Attention in plain XLA operations, and the forms of it that XLA's CPU backend computes fastest.

All forms compute the same products, sums and softmax; on CPUs they differ in how much is computed at a time, and in
the order of operands.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qwen2audio_jax.model.kv_cache import Buffer, Int8Buffer
from qwen2audio_jax.model.layers import einsum

_FEW = 64
"""Queries up to which on CPUs the keys stand first in float32 products."""
_BLOCK = 256
"""Queries of a block on CPUs, each of which skips the keys behind it."""
_LONG = 512
"""Queries from which on CPUs attend head by head: the scores of one head stay in the processor's cache."""


def plain_attention(q: jax.Array, k: Buffer, v: Buffer, mask: jax.Array, *, causal: bool) -> jax.Array:
    """Scaled dot-product attention; softmax in float32.

    Args:
        q: [B, T, N, H], already scaled.
        k: [B, K, S, H]; query head n reads key head n // (N / K).
        v: [B, K, S, H].
        mask: [B or 1, T or 1, S] bool, the keys that a query attends to.
        causal: whether the mask lets query t attend to no key behind the t-th.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    batch, queries, heads, head_dim = q.shape
    # Batch axes first in every product and its result: XLA's CPU backend has no bfloat16 product in another layout.
    grouped = q.reshape(batch, queries, k.shape[1], heads // k.shape[1], head_dim).transpose(0, 2, 3, 1, 4)
    if queries <= _FEW and q.dtype == jnp.float32:
        on_cpu = _keys_first
    elif grouped.shape[2:4] == (1, 1):
        on_cpu = _query_twice
    elif queries <= _BLOCK or isinstance(k, Int8Buffer):
        on_cpu = _grouped
    else:
        on_cpu = partial(_by_head if queries >= _LONG else _in_blocks, causal=causal)
    attended = jax.lax.platform_dependent(grouped, k, v, mask, cpu=on_cpu, default=_grouped)
    return attended.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _grouped(q: jax.Array, k: Buffer, v: Buffer, mask: jax.Array) -> jax.Array:
    """Attention of queries [B, K, G, T, H], in their shape and dtype, with all scores at once."""
    scores = einsum("bkgth,bksh->bkgts", q, _codes(k, q.dtype))
    return _averaged(_weights(scores, k, mask), v, dtype=q.dtype)


def _weights(scores: jax.Array, k: Buffer, mask: jax.Array) -> jax.Array:
    """Softmax of scores [B, K, G, T, S] float32, which the scales of int8 keys multiply first."""
    if isinstance(k, Int8Buffer):
        scores = scores * k.scales[:, :, None, None]
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def _averaged(weights: jax.Array, v: Buffer, *, dtype: jnp.dtype) -> jax.Array:
    """Average of the values: [B, K, G, T, H] in `dtype`. The scales of int8 values multiply the weights."""
    if isinstance(v, Int8Buffer):
        weights = weights * v.scales[:, :, None, None]
    values = _codes(v, dtype)
    return einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values).astype(dtype)


def _codes(buffer: Buffer, dtype: jnp.dtype) -> jax.Array:
    return buffer.codes.astype(dtype) if isinstance(buffer, Int8Buffer) else buffer


def _keys_first(q: jax.Array, k: Buffer, v: Buffer, mask: jax.Array) -> jax.Array:
    """`_grouped` without copies of the keys: XLA's CPU backend copies those that stand second, transposed."""
    scores = einsum("bksh,bkgth->bksgt", _codes(k, q.dtype), q).transpose(0, 1, 3, 4, 2)
    return _averaged(_weights(scores, k, mask), v, dtype=q.dtype)


def _query_twice(q: jax.Array, k: Buffer, v: Buffer, mask: jax.Array) -> jax.Array:
    """`_grouped` of a single query [B, K, 1, 1, H] in half precision.

    XLA's CPU backend has products of matrices in it, but widens everything to float32 for a vector's.
    """
    return _grouped(jnp.concatenate([q, q], axis=3), k, v, mask)[:, :, :, :1]


def _by_head(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, causal: bool) -> jax.Array:
    """`_in_blocks`, one key/value head after the other."""

    def head(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        one_q, one_k, one_v = (array[:, None] for array in operands)
        return _in_blocks(one_q, one_k, one_v, mask, causal=causal)[:, 0]

    return jax.lax.map(head, (q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1))).swapaxes(0, 1)


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, causal: bool) -> jax.Array:
    """`_grouped`; a block of causal queries skips the keys behind it."""
    if not causal:
        return _grouped(q, k, v, mask)
    blocks = []
    for start in range(0, q.shape[3], _BLOCK):
        stop = min(start + _BLOCK, q.shape[3])
        seen = mask[:, start:stop, :stop]
        blocks.append(_grouped(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen))
    return jnp.concatenate(blocks, axis=3)
