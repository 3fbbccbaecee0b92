"""Work of the stages: FLOPs and bytes, by arithmetic.

A multiplication and its addition are two FLOPs; norms, softmax and activation functions are left out.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.kv_cache import cache_specs
from qwen2audio_jax.model.lengths import conv_length
from qwen2audio_jax.plan.request import Shapes
from qwen2audio_jax.plan.resident import device_bytes, weight_specs
from qwen2audio_jax.plan.stages import Stage


@dataclass(frozen=True)
class Work:
    """The work of one run of a stage.

    Attributes:
        flops: on one chip.
        bytes: read from and written to one chip's memory: weights, keys and values. Activations are left out.
    """

    flops: float
    bytes: float


def token_flops(config: Qwen2AudioConfig) -> int:
    """FLOPs of one token in the decoder's layers, without attention to others and without the head."""
    text = config.text_config
    heads = text.num_attention_heads * text.head_dim
    kv_heads = text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * heads + 2 * kv_heads + 3 * text.intermediate_size)
    return 2 * weights * text.num_hidden_layers


def attention_flops(config: Qwen2AudioConfig, *, positions: int) -> int:
    """FLOPs of one token's attention over `positions`, in all layers: scores and weighted sum."""
    text = config.text_config
    return 4 * text.num_attention_heads * text.head_dim * positions * text.num_hidden_layers


def head_flops(config: Qwen2AudioConfig) -> int:
    """FLOPs of the head on one token."""
    return 2 * config.text_config.hidden_size * config.text_config.vocab_size


def prompt_flops(config: Qwen2AudioConfig, *, tokens: int) -> int:
    """FLOPs of one prompt of `tokens` tokens, padding included; the head runs on the last one."""
    each = token_flops(config) + attention_flops(config, positions=tokens)
    return tokens * each + head_flops(config)


def clip_flops(config: Qwen2AudioConfig, *, frames: int) -> int:
    """FLOPs of one clip of `frames` mel frames, padding included, in encoder and projector."""
    audio, width = config.audio_config, config.audio_config.d_model
    positions = conv_length(frames)
    convolutions = 2 * 3 * width * (frames * audio.num_mel_bins + positions * width)
    layer = 2 * positions * (4 * width**2 + 2 * width * audio.encoder_ffn_dim) + 4 * positions**2 * width
    projection = 2 * (positions // 2) * width * config.text_config.hidden_size
    return convolutions + audio.encoder_layers * layer + projection


def read_weights(stage: Stage, params: Any) -> int:
    """Bytes of weights that a stage reads on one chip, each once; only single rows of the embedding table."""
    if stage == "encode":
        return device_bytes({name: params[name] for name in ("encoder", "projector")})
    decoder = params["decoder"]
    if "lm_head" in decoder:
        decoder = {name: tree for name, tree in decoder.items() if name != "embed_tokens"}
    return device_bytes(decoder)


def work_of(
    stage: Stage, config: Qwen2AudioConfig, shapes: Shapes, *, mesh: Mesh, cache_dtype: str, weights: str = "float"
) -> Work:
    """The work of a stage on a mesh, which may be abstract. Every decode step attends to the whole capacity."""
    read = read_weights(stage, weight_specs(config, mesh=mesh, weights=weights))
    rows, chips, dtype = shapes.rows, mesh.size, jnp.dtype(cache_dtype)

    def cached(positions: int) -> int:
        cache = cache_specs(config.text_config, rows=rows, capacity=positions, dtype=dtype, mesh=mesh)
        return device_bytes((cache.keys, cache.values))

    if stage == "encode":
        return Work(shapes.clips * clip_flops(config, frames=shapes.frames) / chips, read)
    if stage == "prefill":
        return Work(rows * prompt_flops(config, tokens=shapes.tokens) / chips, read + cached(shapes.tokens))
    each = token_flops(config) + attention_flops(config, positions=shapes.capacity) + head_flops(config)
    return Work(rows * each / chips, read + cached(shapes.capacity))
