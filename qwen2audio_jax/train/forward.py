"""The forward pass of training: packed rows without a cache, with each layer gathered and rematerialised separately.

Weights may be stored in float32 and sharded over the mesh's `data` axis. A layer's weights are cast to the compute
dtype and gathered inside its rematerialised function, so neither a cast nor a gathered copy outlives its layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.attention import XLA
from qwen2audio_jax.model.binding import bind
from qwen2audio_jax.model.decoder import Decoder, DecoderLayer
from qwen2audio_jax.model.encoder import Encoder, EncoderLayer
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.model.lengths import conv_length
from qwen2audio_jax.model.qwen2_audio import parameter_axes, projector
from qwen2audio_jax.parallel.sharding import constrain
from qwen2audio_jax.train.batch import TrainBatch

LOGIT_POSITIONS = 2048
"""Positions whose logits exist at once: 1.3 GB in float32 over all devices for a vocabulary of 156,032 tokens."""

Remat = str
"""Rematerialisation, the part that the backward pass recomputes: "none", "dots" or "layers"."""


def _gathered(params: Params, axes: Mapping[str, Any], *, dtype: jnp.dtype) -> dict[str, Any]:
    """Weights in the compute dtype with inference's sharding; those without axes (adapters) are only cast."""
    named = flatten_dict(dict(axes))

    def ready(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        leaf = leaf.astype(dtype)
        return constrain(leaf, *named[path]) if path in named else leaf

    return unflatten_dict({path: ready(path, leaf) for path, leaf in flatten_dict(dict(params)).items()})


def _recomputed(function: Callable[..., jax.Array], remat: Remat) -> Callable[..., jax.Array]:
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(function, policy=policy)


def _without(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


def _run_layers(
    x: jax.Array, params: Params, axes: Mapping[str, Any], *, run: Callable[..., jax.Array], remat: Remat, name: str
) -> jax.Array:
    """Apply the layers of `params`, numbered from "0", to x; `run(weights, x)` applies one."""
    dtype = x.dtype

    def layer(weights: Params, x: jax.Array, *, layer_axes: Mapping[str, Any]) -> jax.Array:
        return run(_gathered(weights, layer_axes, dtype=dtype), x)

    for index in range(len(params)):
        with jax.named_scope(f"{name}_layer_{index}"):
            x = _recomputed(partial(layer, layer_axes=axes[str(index)]), remat)(params[str(index)], x)
    return x


def encode_rows(
    params: Params, features: jax.Array, frames: jax.Array, *, cfg: Qwen2AudioConfig, remat: Remat = "none"
) -> jax.Array:
    """Projected audio vectors [R, C * W, D] of features [R, C, M, L] and frames [R, C]; see `TrainBatch`."""
    rows, clips = frames.shape
    dtype, axes = jnp.dtype(cfg.dtype), parameter_axes(cfg)
    around = _gathered(_without(params["encoder"], "layers"), axes["encoder"], dtype=dtype)
    encoder = bind(Encoder, cfg.audio_config, {**around, "layers": params["encoder"]["layers"]})
    flat = constrain(features.reshape(rows * clips, *features.shape[2:]).astype(dtype), "clip", "mels", "position")
    x = encoder.embed(flat)
    lengths = conv_length(frames.reshape(-1))

    def run(weights: Params, x: jax.Array) -> jax.Array:
        return bind(EncoderLayer, cfg.audio_config, weights)(x, lengths=lengths, attention=XLA)

    x = _run_layers(x, params["encoder"]["layers"], axes["encoder"]["layers"], run=run, remat=remat, name="encoder")
    projection = bind(projector, cfg, _gathered(params["projector"], axes["projector"], dtype=dtype))
    projected = projection(encoder.pool(x))  # [A, W, D]
    return constrain(projected.reshape(rows, -1, projected.shape[-1]), "batch", "position", "width")


def hidden_states(params: Params, batch: TrainBatch, *, cfg: Qwen2AudioConfig, remat: Remat = "none") -> jax.Array:
    """The decoder's normalised last hidden states [R, T, D] of packed rows, in `cfg.dtype`.

    A position attends to itself and earlier positions of its own example. Examples that share a row do not affect each
    other.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    dtype, axes, layers = jnp.dtype(cfg.dtype), parameter_axes(cfg)["decoder"], params["decoder"]["layers"]
    around = _gathered(_without(params["decoder"], "layers"), axes, dtype=dtype)
    decoder = bind(Decoder, cfg.text_config, {**around, "layers": layers})
    heard = encode_rows(params, batch.features, batch.frames, cfg=cfg, remat=remat)
    x = decoder.embed_tokens(batch.ids, dtype=dtype)
    slots = batch.slots
    if heard.shape[1]:
        audio = jnp.take_along_axis(heard, jnp.maximum(slots, 0)[..., None], axis=1)
        x = jnp.where(slots[..., None] >= 0, audio, x)
    x = constrain(x, "batch", "token", "width")

    def run(weights: Params, x: jax.Array) -> jax.Array:
        layer = bind(DecoderLayer, cfg.text_config, weights)
        return layer.packed(x, positions=batch.positions, segments=batch.segments)

    return decoder.norm(_run_layers(x, layers, axes["layers"], run=run, remat=remat, name="decoder"))


def target_log_probs(
    params: Params, hidden: jax.Array, targets: jax.Array, *, cfg: Qwen2AudioConfig, positions: int = LOGIT_POSITIONS
) -> jax.Array:
    """Log-probability of the target at every position [R, T] float32, 0 where the target is negative.

    The head runs on a few positions of every row at a time, and is recomputed in the backward pass: all logits of a
    long batch would be larger than the model.
    """
    dtype, axes = jnp.dtype(cfg.dtype), parameter_axes(cfg)["decoder"]
    around = _gathered(_without(params["decoder"], "layers"), axes, dtype=dtype)
    decoder = bind(Decoder, cfg.text_config, {**around, "layers": params["decoder"]["layers"]})
    rows, tokens, width = hidden.shape

    def chosen(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(decoder.logits(hidden), axis=-1)
        taken = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets >= 0, taken, 0.0)

    block = max(size for size in range(1, tokens + 1) if tokens % size == 0 and (size == 1 or rows * size <= positions))
    if block == tokens:
        return chosen(hidden, targets)
    blocks = hidden.reshape(rows, -1, block, width).swapaxes(0, 1), targets.reshape(rows, -1, block).swapaxes(0, 1)
    log_probs = jax.lax.map(lambda pair: jax.checkpoint(chosen)(*pair), blocks)
    return log_probs.swapaxes(0, 1).reshape(rows, tokens)
