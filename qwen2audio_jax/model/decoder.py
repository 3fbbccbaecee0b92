"""The text decoder: embeddings in, hidden states out, appending to a key/value cache.

Prompts and single tokens share one code path: a call appends T tokens to each row at that row's own position.

Source: Qwen technical report (arXiv 2309.16609); `Qwen2Model`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen2audio_jax.config import Qwen2AudioTextConfig
from qwen2audio_jax.model.attention import XLA, Seen, attend
from qwen2audio_jax.model.binding import traced_once
from qwen2audio_jax.model.kv_cache import Buffer, KVCache, constrain_buffer, first, numbers, write
from qwen2audio_jax.model.layers import Embedding, Linear, RMSNorm, merge_heads, rotate, split_heads
from qwen2audio_jax.parallel.sharding import constrain


def _project(linear: Linear, x: jax.Array, *, heads: int) -> jax.Array:
    """Project [B, T, D] to [B, T, heads, H] in the form that suits a TPU's memory layout; measured in benchmarks/."""
    if x.shape[1] > 1:
        # Many tokens: split the kernel, so that the product comes out in the cache's layout. Splitting the product
        # would cost a copy of every key buffer.
        return linear.split(x, heads)
    # One token: split the product. The barrier keeps XLA from moving the split to the kernel, whose layout would then
    # change in every step.
    return split_heads(jax.lax.optimization_barrier(linear(x)), heads)


class DecoderAttention(nnx.Module):
    """Causal attention with rotary positions; query, key and value projections have a bias, the output has none."""

    def __init__(self, config: Qwen2AudioTextConfig, *, rngs: nnx.Rngs | None):
        width = ("width", config.hidden_size)
        heads = ("heads", config.num_attention_heads * config.head_dim)
        kv_heads = ("kv_heads", config.num_key_value_heads * config.head_dim)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.theta = config.rope_theta
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(width, heads, bias=True, rngs=rngs)
        self.k_proj = Linear(width, kv_heads, bias=True, rngs=rngs)
        self.v_proj = Linear(width, kv_heads, bias=True, rngs=rngs)
        self.o_proj = Linear(heads, width, bias=False, rngs=rngs)

    def __call__(
        self, x: jax.Array, keys: Buffer, values: Buffer, *, starts: jax.Array, window: int | None, attention: str
    ) -> tuple[jax.Array, Buffer, Buffer]:
        """Append x [B, T, D] at `starts` [B]; attend to the first `window` positions of the cache, or to x alone."""
        positions = starts[:, None] + jnp.arange(x.shape[1])  # [B, T]
        q, k, v = self._heads(x, positions)
        k, v = numbers(k, v)
        keys = constrain_buffer(write(keys, k, starts=starts))
        values = constrain_buffer(write(values, v, starts=starts))
        if window is None:
            return self._attend(q, k, v, Seen(causal=True), attention=attention), keys, values
        seen = Seen(causal=True, starts=starts)
        return self._attend(q, first(keys, window), first(values, window), seen, attention=attention), keys, values

    def packed(self, x: jax.Array, *, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """Attention over packed rows without a cache: x [B, T, D], `positions` and `segments` [B, T]."""
        return self._attend(*self._heads(x, positions), Seen(causal=True, segments=segments), attention=XLA)

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], scaled, and keys and values [B, K, T, H]."""
        q = _project(self.q_proj, x, heads=self.heads)
        k = _project(self.k_proj, x, heads=self.kv_heads)
        v = _project(self.v_proj, x, heads=self.kv_heads).swapaxes(1, 2)
        q = rotate(q, positions, theta=self.theta) * jnp.asarray(self.scale, x.dtype)
        return q, rotate(k, positions, theta=self.theta).swapaxes(1, 2), v

    def _attend(self, q: jax.Array, keys: Buffer, values: Buffer, seen: Seen, *, attention: str) -> jax.Array:
        attended = attend(q, keys, values, seen, axes=("batch", "heads", "kv_heads"), attention=attention)
        return self.o_proj(constrain(merge_heads(attended), "batch", "token", "heads"))


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: Qwen2AudioTextConfig, *, rngs: nnx.Rngs | None):
        width, ffn = ("width", config.hidden_size), ("ffn", config.intermediate_size)
        self.gate_proj = Linear(width, ffn, bias=False, rngs=rngs)
        self.up_proj = Linear(width, ffn, bias=False, rngs=rngs)
        self.down_proj = Linear(ffn, width, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(hidden, "batch", "token", "ffn"))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP. Source: `Qwen2DecoderLayer`."""

    def __init__(self, config: Qwen2AudioTextConfig, *, rngs: nnx.Rngs | None):
        width = ("width", config.hidden_size)
        self.input_layernorm = RMSNorm(width, eps=config.rms_norm_eps, rngs=rngs)
        self.self_attn = DecoderAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(width, eps=config.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, keys: Buffer, values: Buffer, *, starts: jax.Array, window: int | None, attention: str
    ) -> tuple[jax.Array, Buffer, Buffer]:
        attended, keys, values = self.self_attn(
            self.input_layernorm(x), keys, values, starts=starts, window=window, attention=attention
        )
        return self._after(x, attended), keys, values

    def packed(self, x: jax.Array, *, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """The layer over packed rows without a cache; see `DecoderAttention.packed`."""
        return self._after(x, self.self_attn.packed(self.input_layernorm(x), positions=positions, segments=segments))

    def _after(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = constrain(x + attended, "batch", "token", "width")
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", "token", "width")


class Decoder(nnx.Module):
    """Embedding table, layers, final norm and language-model head."""

    def __init__(self, config: Qwen2AudioTextConfig, *, rngs: nnx.Rngs | None):
        vocab, width = ("vocab", config.vocab_size), ("width", config.hidden_size)
        self.vocab_size = config.vocab_size
        self.embed_tokens = Embedding(vocab, width, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(width, eps=config.rms_norm_eps, rngs=rngs)
        self.lm_head = None if config.tie_word_embeddings else Linear(width, vocab, bias=False, rngs=rngs)

    def __call__(
        self, embeddings: jax.Array, *, cache: KVCache, counts: jax.Array, window: int | None, attention: str
    ) -> tuple[jax.Array, KVCache]:
        """Append tokens to every row.

        Args:
            embeddings: [B, T, D] in the compute dtype, left-aligned.
            cache: with room for T more positions in every row.
            counts: [B] int32, the number of real tokens among the T; outputs of the others are meaningless.
            window: number of cache positions to attend to; at least the longest row's length after the call. None: the
                rows are empty, and the tokens attend to each other directly instead of through the cache.
            attention: the implementation if `window` is None; see `attention.choose_attention`.

        Returns:
            Hidden states [B, T, D] before the head, normalised, and the cache with `lengths` increased by `counts`.
        """
        # In a step what the layers add to stays in float32, so that fewer rows part in half precision. It costs nothing
        # there; in prompts it would cost a TPU a third more memory traffic.
        x = embeddings.astype(jnp.float32) if embeddings.shape[1] == 1 else embeddings
        x = constrain(x, "batch", "token", "width")
        keys, values = list(cache.keys), list(cache.values)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"decoder_layer_{index}"):
                operands = {"x": x, "keys": keys[index], "values": values[index], "starts": cache.lengths}
                x, keys[index], values[index] = traced_once(layer, operands, window=window, attention=attention)
        return self.norm(x), KVCache(tuple(keys), tuple(values), cache.lengths + counts)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]; columns past the true vocabulary (padding for a mesh) are -inf."""
        if self.lm_head is None:
            logits = self.embed_tokens.scores(hidden)
        else:
            logits = self.lm_head.wide(hidden)
        logits = constrain(logits, "batch", *[None] * (logits.ndim - 2), "vocab")
        if logits.shape[-1] == self.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)
