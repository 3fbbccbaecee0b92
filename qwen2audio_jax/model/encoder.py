"""The audio encoder: log-mel frames in, one vector per 40 ms out.

Two convolutions (the second halves the rate), learned-table positions, pre-norm transformer layers, average pooling by
two, and then the final norm. It may be run on fewer frames than the reference's fixed 3000: with at least two frames of
silence after the clip the valid outputs are the same.

Source: Qwen2-Audio (arXiv 2407.10759, section 2), after Whisper's encoder; `Qwen2AudioEncoder`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen2audio_jax.config import Qwen2AudioEncoderConfig
from qwen2audio_jax.model.attention import Seen, attend
from qwen2audio_jax.model.binding import traced_once
from qwen2audio_jax.model.layers import (
    Axis,
    Embedding,
    LayerNorm,
    Linear,
    einsum,
    merge_heads,
    precision,
    split_heads,
    weight,
)
from qwen2audio_jax.model.lengths import conv_length
from qwen2audio_jax.parallel.sharding import constrain


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def sinusoids(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Initial position embeddings of the encoder: [P, D] sines, then cosines. Source: Whisper (arXiv 2212.04356).

    Scaled to a fifth of Whisper's magnitude: outputs of freshly initialised convolutions are about that small, and
    position embeddings several times larger would drown the audio in early training.
    """
    positions, width = shape
    rates = jnp.exp(-jnp.log(10000.0) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(positions)[:, None] * rates
    return 0.2 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Conv(nnx.Module):
    """One-dimensional convolution of width 3, padded by 1; kernel [3, in, out], accumulated in float32."""

    def __init__(self, inputs: Axis, outputs: Axis, *, stride: int, rngs: nnx.Rngs | None):
        self.stride = stride
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = weight(init, (("window", 3), inputs, outputs), rngs=rngs)
        self.bias = weight(nnx.initializers.zeros, (outputs,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if x.dtype == jnp.float32:
            y = self._convolve(x, kernel)
        else:
            y = jax.lax.platform_dependent(x, kernel, cpu=self._multiply_windows, default=self._convolve)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride,),
            padding=((1, 1),),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    def _multiply_windows(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """`_convolve` as one product.

        XLA's CPU convolution adds up otherwise for one clip than for several, which decides some roundings.
        """
        outputs = (x.shape[1] - 1) // self.stride + 1
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        last = self.stride * (outputs - 1)
        windows = [jax.lax.slice_in_dim(padded, i, i + last + 1, self.stride, axis=1) for i in range(3)]
        return einsum("ati,io->ato", jnp.concatenate(windows, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


class EncoderAttention(nnx.Module):
    """Bidirectional attention; the key projection has no bias."""

    def __init__(self, config: Qwen2AudioEncoderConfig, *, rngs: nnx.Rngs | None):
        width, heads = ("audio_width", config.d_model), ("audio_heads", config.d_model)
        self.heads = config.encoder_attention_heads
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(width, heads, bias=True, rngs=rngs)
        self.k_proj = Linear(width, heads, bias=False, rngs=rngs)
        self.v_proj = Linear(width, heads, bias=True, rngs=rngs)
        self.out_proj = Linear(heads, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, *, lengths: jax.Array, attention: str) -> jax.Array:
        q = split_heads(self.q_proj(x) * jnp.asarray(self.scale, x.dtype), self.heads)  # [A, T, N, H]
        k = split_heads(self.k_proj(x), self.heads).swapaxes(1, 2)  # [A, N, S, H]
        v = split_heads(self.v_proj(x), self.heads).swapaxes(1, 2)
        axes = ("clip", "audio_heads", "audio_heads")
        attended = attend(q, k, v, Seen(causal=False, lengths=lengths), axes=axes, attention=attention)
        return self.out_proj(merge_heads(attended))


class EncoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward. Source: `Qwen2AudioEncoderLayer`."""

    def __init__(self, config: Qwen2AudioEncoderConfig, *, rngs: nnx.Rngs | None):
        width = ("audio_width", config.d_model)
        ffn = ("audio_ffn", config.encoder_ffn_dim)
        self.self_attn_layer_norm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)
        self.self_attn = EncoderAttention(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)
        self.fc1 = Linear(width, ffn, bias=True, rngs=rngs)
        self.fc2 = Linear(ffn, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, *, lengths: jax.Array, attention: str) -> jax.Array:
        """Apply the layer to x [A, P, D]; the first `lengths[a]` positions of clip a are valid."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), lengths=lengths, attention=attention)
        x = x + self.fc2(_gelu(self.fc1(self.final_layer_norm(x))))
        if x.dtype == jnp.float16:  # the published weights overflow float16; the reference clamps here too
            limit = float(jnp.finfo(jnp.float16).max) - 1000
            x = jnp.clip(x, -limit, limit)
        return constrain(x, "clip", "position", "audio_width")


class Encoder(nnx.Module):
    """The whole audio tower; see `__call__`."""

    def __init__(self, config: Qwen2AudioEncoderConfig, *, rngs: nnx.Rngs | None):
        width = ("audio_width", config.d_model)
        self.conv1 = Conv(("mels", config.num_mel_bins), width, stride=1, rngs=rngs)
        self.conv2 = Conv(width, width, stride=2, rngs=rngs)
        self.embed_positions = Embedding(("position", config.max_source_positions), width, rngs=rngs, init=sinusoids)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.encoder_layers)])
        self.layer_norm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)

    def embed(self, features: jax.Array) -> jax.Array:
        """Log-mel [A, M, L] (L even) to the first layer's input [A, L/2, D]."""
        x = _gelu(self.conv1(features.swapaxes(1, 2)))
        x = _gelu(self.conv2(x))
        positions = self.embed_positions(jnp.arange(x.shape[1]), dtype=x.dtype)
        return constrain(x + positions, "clip", "position", "audio_width")

    def pool(self, x: jax.Array) -> jax.Array:
        """Average pooling by two, then the final norm: [A, P, D] -> [A, P // 2, D]."""
        steps = x.shape[1] // 2
        pairs = x[:, : 2 * steps].reshape(x.shape[0], steps, 2, x.shape[2])
        return self.layer_norm(pairs.astype(jnp.float32).mean(2).astype(x.dtype))

    def __call__(self, features: jax.Array, frames: jax.Array, *, attention: str) -> jax.Array:
        """Encode clips.

        Args:
            features: [A, M, L] log-mel in the compute dtype. L is even, at most 2 x max_source_positions, and either
                that or at least two more than the longest clip; frames after a clip are the log-mel of silence.
            frames: [A] int32, valid frames of each clip.
            attention: the implementation; see `attention.choose_attention`.

        Returns:
            [A, L // 4, D]; the first `token_count(frames[a])` rows of clip a are valid.
        """
        x = self.embed(features)
        lengths = conv_length(frames)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"encoder_layer_{index}"):
                x = traced_once(layer, {"x": x, "lengths": lengths}, attention=attention)
        return self.pool(x)
