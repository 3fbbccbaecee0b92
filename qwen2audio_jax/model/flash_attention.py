"""Flash attention on one device, by third-party kernels: cuDNN's on GPUs, JAX's Pallas kernel on TPUs.

Both process the keys in blocks and never hold a row's scores in memory. Queries and keys have the same positions.

Source: FlashAttention (arXiv 2205.14135); `jax.nn.dot_product_attention`; splash attention of
`jax.experimental.pallas.ops.tpu`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from qwen2audio_jax.parallel.sharding import round_up

LANES = 128
"""The number that block lengths of the TPU kernel are multiples of."""

_BLOCKS = (512, 384, 256, 128)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    lengths: jax.Array | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """The GPU kernel; see `pallas_attention` for the arguments. `implementation` is JAX's name for it."""
    return jax.nn.dot_product_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        scale=1.0,
        is_causal=causal,
        # The kernel returns NaN for a row without keys.
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1).astype(jnp.int32),
        implementation=implementation,
    )


def pallas_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, lengths: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """The TPU kernel.

    Args:
        q: [B, T, N, H], already scaled.
        k: [B, K, T, H]; query head n reads key head n // (N / K).
        v: [B, K, T, H].
        causal: whether a query attends only to the keys up to its own position.
        lengths: [B] int32, valid keys of each row, of which at least one is assumed; None: all.
        interpret: run JAX's kernel interpreter instead, on any platform.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    # The kernel's modules take a while to import, and only TPUs need them.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    batch, tokens, heads, _ = q.shape
    size = round_up(tokens, LANES)
    block = next(block for block in _BLOCKS if size % block == 0)
    if lengths is None and not causal and size > tokens:
        lengths = jnp.full((batch,), tokens)
    # Padding keys come after every query, so that the causal mask hides them.
    padding = ((0, 0), (0, 0), (0, size - tokens), (0, 0))
    operands = [jnp.pad(x, padding) for x in (q.swapaxes(1, 2), k, v)]
    mask = CausalMask((size, size)) if causal else FullMask((size, size))
    kernel = make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=BlockSizes(block_q=block, block_kv=block),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if lengths is not None:
        valid = (jnp.arange(size) < jnp.maximum(lengths, 1)[:, None]).astype(jnp.int32)
        segments = SegmentIds(jnp.ones_like(valid), valid)
    # float32 means float32, also within the kernel.
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        attended = jax.vmap(kernel)(*operands, segments)
    return attended[:, :, :tokens].swapaxes(1, 2)
