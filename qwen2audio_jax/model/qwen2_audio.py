"""The whole model as pure functions of its weights: encode audio, merge it into the text, prefill, decode.

Data flow: log-mel -> `encode_audio` -> projected audio vectors; these and token ids -> `embed` -> `prefill`, which
computes the first logits, keys and values -> `decode_step` returns the next logits. Every function takes the weights
first, is pure, and is meant to be jitted with `cfg` static. Rows are left-aligned: padding follows a row's tokens.

Source: Qwen2-Audio (arXiv 2407.10759); `Qwen2AudioForConditionalGeneration`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig
from qwen2audio_jax.model.attention import XLA
from qwen2audio_jax.model.binding import bind, declared_axes, declared_shapes, initial_params
from qwen2audio_jax.model.cache_pieces import PIECE, Piece, pieces
from qwen2audio_jax.model.decoder import Decoder
from qwen2audio_jax.model.encoder import Encoder
from qwen2audio_jax.model.kv_cache import KVCache, empty_cache
from qwen2audio_jax.model.layers import Linear, Params
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.model.quantization import INT8, quantized_tree
from qwen2audio_jax.parallel.sharding import constrain, named_sharding, round_up


def projector(config: Qwen2AudioConfig, *, rngs: nnx.Rngs | None) -> Linear:
    """Projection of audio vectors to the decoder's width. Source: `Qwen2AudioMultiModalProjector`."""
    inputs, outputs = ("audio_width", config.audio_config.d_model), ("width", config.text_config.hidden_size)
    return Linear(inputs, outputs, bias=True, rngs=rngs)


def _parts(config: Qwen2AudioConfig) -> dict[str, tuple[Any, Any]]:
    """The three parts of the parameter tree: each one's declaring module and configuration."""
    return {
        "encoder": (Encoder, config.audio_config),
        "projector": (projector, config),
        "decoder": (Decoder, config.text_config),
    }


def parameter_specs(config: Qwen2AudioConfig, *, weights: str = "float") -> dict[str, Any]:
    """The tree of weights as `jax.ShapeDtypeStruct`s, as in a checkpoint.

    Args:
        config: of the model; weights that are not int8 have its `dtype`.
        weights: "float", or "int8" for the decoder's as codes and scales (see `quantization`).
    """
    shapes = {name: declared_shapes(*part) for name, part in _parts(config).items()}
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype)), shapes)
    if weights != INT8:
        return specs
    return quantized_tree(
        specs,
        codes=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int8),
        scales=lambda leaf, axis: jax.ShapeDtypeStruct((leaf.shape[axis],), jnp.float32),
    )


def parameter_axes(config: Qwen2AudioConfig, *, weights: str = "float") -> dict[str, Any]:
    """The tree of logical axes of all weights: for each a tuple of names in the sharding table, one per dimension."""
    axes = {name: declared_axes(*part) for name, part in _parts(config).items()}
    if weights != INT8:
        return axes
    return quantized_tree(axes, codes=lambda names: names, scales=lambda names, axis: (names[axis],))


def sharded_specs(config: Qwen2AudioConfig, *, mesh: Mesh, weights: str = "float") -> dict[str, Any]:
    """`parameter_specs` on a mesh: each with its sharding, the vocabulary padded until it divides."""

    def place(axes: tuple[str, ...], spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = list(spec.shape)
        if "vocab" in axes:
            shape[axes.index("vocab")] = round_up(config.text_config.vocab_size, mesh.shape["model"])
        return jax.ShapeDtypeStruct(tuple(shape), spec.dtype, sharding=named_sharding(mesh, *axes))

    axes, specs = parameter_axes(config, weights=weights), parameter_specs(config, weights=weights)
    return jax.tree.map(place, axes, specs, is_leaf=lambda leaf: isinstance(leaf, tuple))


def init_params(config: Qwen2AudioConfig, *, seed: int) -> dict[str, Any]:
    """Randomly initialised weights in `config.dtype`."""
    params = {name: initial_params(*part, seed=seed + i) for i, (name, part) in enumerate(_parts(config).items())}
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)


@partial(jax.tree_util.register_dataclass, data_fields=("encoded", "projected", "lengths"), meta_fields=())
@dataclass(frozen=True)
class AudioFeatures:
    """Audio features, before and after the projector.

    Attributes:
        encoded: [A, L // 4, D_audio], the encoder's output; one vector is 40 ms.
        projected: [A, L // 4, D], the same projected to the decoder's width.
        lengths: [A] int32, valid vectors of each clip.
    """

    encoded: jax.Array
    projected: jax.Array
    lengths: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=("ids", "lengths", "audio", "slots"), meta_fields=())
@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the decoder takes them.

    Attributes:
        ids: [B, T] int32, left-aligned.
        lengths: [B] int32, tokens of each row.
        audio: [A, W, D] projected audio vectors, or None for text alone.
        slots: [B, T] int32, for each audio position the row of `audio` reshaped to [A * W, D]; -1 elsewhere.
    """

    ids: jax.Array
    lengths: jax.Array
    audio: jax.Array | None
    slots: jax.Array | None


def encode(
    params: Params,
    features: jax.Array,
    frames: jax.Array,
    *,
    cfg: Qwen2AudioEncoderConfig,
    dtype: str,
    attention: str = XLA,
) -> jax.Array:
    """The encoder alone, on its own part of the weights: see `Encoder.__call__`. Keyword arguments are static."""
    features = constrain(features.astype(dtype), "clip", "mels", "position")
    return bind(Encoder, cfg, params)(features, frames, attention=attention)


@jax.named_scope("encode")
def encode_audio(
    params: Params, features: jax.Array, frames: jax.Array, *, cfg: Qwen2AudioConfig, attention: str = XLA
) -> AudioFeatures:
    """Encode and project clips.

    Args:
        params: the weights; only `encoder` and `projector` are read.
        features: [A, M, L] log-mel; see `Encoder.__call__` for what L may be.
        frames: [A] int32, valid frames of each clip; 0 for a row that pads the batch.
        cfg: static.
        attention: static, the implementation; see `attention.choose_attention`.
    """
    encoded = encode(params["encoder"], features, frames, cfg=cfg.audio_config, dtype=cfg.dtype, attention=attention)
    projected = bind(projector, cfg, params["projector"])(encoded)
    return AudioFeatures(encoded, projected, jnp.maximum(token_count(frames), 0))


def embed(params: Params, prompt: Prompt, *, cfg: Qwen2AudioConfig) -> jax.Array:
    """Token embeddings with audio vectors in the audio positions: [B, T, D] in the compute dtype."""
    decoder = bind(Decoder, cfg.text_config, params["decoder"])
    embeddings = decoder.embed_tokens(prompt.ids, dtype=jnp.dtype(cfg.dtype))
    if prompt.audio is None or prompt.slots is None:
        return embeddings
    vectors = prompt.audio.reshape(-1, prompt.audio.shape[-1])
    heard = vectors[jnp.maximum(prompt.slots, 0)].astype(embeddings.dtype)
    return jnp.where(prompt.slots[..., None] >= 0, heard, embeddings)


def forward(params: Params, prompt: Prompt, *, cfg: Qwen2AudioConfig, attention: str = XLA) -> jax.Array:
    """float32 logits [B, T, V] at every position of whole prompts; those past a row's length are meaningless.

    `cfg` and `attention` (see `attention.choose_attention`) are static.
    """
    rows, tokens = prompt.ids.shape
    cache = empty_cache(cfg.text_config, rows=rows, capacity=tokens, dtype=jnp.dtype(cfg.dtype))
    decoder = bind(Decoder, cfg.text_config, params["decoder"])
    embeddings = embed(params, prompt, cfg=cfg)
    hidden, _ = decoder(embeddings, cache=cache, counts=prompt.lengths, window=None, attention=attention)
    return decoder.logits(hidden)


def clip_vectors(projected: jax.Array, *, width: int) -> tuple[jax.Array, ...]:
    """The vectors of each clip by themselves: A arrays [width, D] of [A, W, D], W at most `width` (static).

    What comes after does not depend on the shape that clips were encoded in.
    """
    padded = jnp.pad(projected, ((0, 0), (0, width - projected.shape[1]), (0, 0)))
    return tuple(constrain(vectors, "position", "width") for vectors in padded)


def place_clip(embeddings: jax.Array, vectors: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    """Put the vectors of a clip into their places in one row of embeddings.

    Args:
        embeddings: [B, T, D]. Donate it.
        vectors: [W, D], of `clip_vectors`.
        row: [] int32.
        index: [T] int32, the vector of each of the row's positions; -1 where it stays as it is.
    """
    before = jax.lax.dynamic_slice_in_dim(embeddings, row, 1, axis=0)
    heard = vectors[jnp.maximum(index, 0)].astype(embeddings.dtype)
    after = jnp.where(index[None, :, None] >= 0, heard, before)
    return constrain(jax.lax.dynamic_update_slice_in_dim(embeddings, after, row, axis=0), "batch", "token", "width")


def append(
    params: Params,
    embeddings: jax.Array,
    cache: KVCache,
    *,
    counts: jax.Array,
    cfg: Qwen2AudioConfig,
    window: int,
) -> tuple[jax.Array, KVCache]:
    """Append embedded tokens to the cache's rows.

    Args:
        params: the weights; only `decoder` is read.
        embeddings: [B, T, D], of `embed`.
        cache: with room for T more positions in every row. Donate it.
        counts: [B] int32, tokens of each row; what follows them is ignored.
        cfg: static.
        window: static, cache positions to attend to: at least the longest row after the call.

    Returns:
        float32 logits [B, V] after each row's last token, and the cache.
    """
    decoder = bind(Decoder, cfg.text_config, params["decoder"])
    hidden, cache = decoder(embeddings, cache=cache, counts=counts, window=window, attention=XLA)
    return _last_logits(decoder, hidden, counts), cache


def fill(
    params: Params,
    embeddings: jax.Array,
    cache: KVCache,
    *,
    counts: jax.Array,
    cfg: Qwen2AudioConfig,
    attention: str = XLA,
) -> tuple[jax.Array, KVCache]:
    """`append` to an empty cache: the prompts attend to themselves directly, and only later tokens read the cache.

    Args:
        params: as of `append`.
        embeddings: as of `append`.
        cache: empty. Donate it.
        counts: as of `append`.
        cfg: static.
        attention: static, the implementation; see `attention.choose_attention`.

    Returns:
        As `append`.
    """
    decoder = bind(Decoder, cfg.text_config, params["decoder"])
    hidden, cache = decoder(embeddings, cache=cache, counts=counts, window=None, attention=attention)
    return _last_logits(decoder, hidden, counts), cache


def _last_logits(decoder: Decoder, hidden: jax.Array, counts: jax.Array) -> jax.Array:
    """Logits [B, V] after each row's last token: the head has 0.6 B weights, and runs on one position per row."""
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    if len(last) == 1 and last.dtype != jnp.float32:
        # In half precision CPUs multiply a matrix by two rows many times faster than by one.
        return decoder.logits(jnp.concatenate([last, jnp.zeros_like(last)]))[:1]
    return decoder.logits(last)


@jax.named_scope("prefill")
def prefill(
    params: Params,
    embeddings: jax.Array,
    lengths: jax.Array,
    *,
    cfg: Qwen2AudioConfig,
    cache_dtype: str,
    attention: str = XLA,
) -> tuple[jax.Array, tuple[Piece, ...]]:
    """Logits, keys and values of whole prompts: `fill` of rows of their own, cut into pieces.

    Args:
        params: the weights; only `decoder` is read.
        embeddings: [B, T, D], of `embed`.
        lengths: [B] int32, tokens of each row.
        cfg: static.
        cache_dtype: static, of keys and values.
        attention: static.

    Returns:
        float32 logits [B, V] after each row's last token, and pieces with at least T positions in all.
    """
    rows, tokens, _ = embeddings.shape
    size = {"rows": rows, "capacity": round_up(tokens, PIECE)}
    cache = empty_cache(cfg.text_config, **size, dtype=jnp.dtype(cache_dtype))
    logits, cache = fill(params, embeddings, cache, counts=lengths, cfg=cfg, attention=attention)
    return logits, pieces(cache)


@jax.named_scope("decode_step")
def decode_step(
    params: Params, tokens: jax.Array, cache: KVCache, *, cfg: Qwen2AudioConfig
) -> tuple[jax.Array, KVCache]:
    """Append one token to every row: tokens [B] int32 -> float32 logits [B, V] and the cache. Donate the cache."""
    counts = jnp.ones_like(tokens)
    embeddings = embed(params, Prompt(ids=tokens[:, None], lengths=counts, audio=None, slots=None), cfg=cfg)
    return append(params, embeddings, cache, counts=counts, cfg=cfg, window=cache.capacity)


@jax.named_scope("extend")
def extend(
    params: Params, tokens: jax.Array, cache: KVCache, *, counts: jax.Array, cfg: Qwen2AudioConfig
) -> tuple[jax.Array, KVCache]:
    """Append known text tokens to every row, with logits after each of them.

    Args:
        params: the weights; only `decoder` is read.
        tokens: [B, T] int32.
        cache: with room for T more positions in every row. Donate it.
        counts: [B] int32, tokens of each row; what follows them is ignored.
        cfg: static.

    Returns:
        float32 logits [B, T, V], and the cache.
    """
    embeddings = embed(params, Prompt(ids=tokens, lengths=counts, audio=None, slots=None), cfg=cfg)
    decoder = bind(Decoder, cfg.text_config, params["decoder"])
    hidden, cache = decoder(embeddings, cache=cache, counts=counts, window=cache.capacity, attention=XLA)
    return decoder.logits(hidden), cache
