"""Arithmetic estimates of a stage's memory and communication, for GPUs, which cannot be compiled for without one."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.attention import AUTO, XLA, choose_attention
from qwen2audio_jax.model.lengths import conv_length
from qwen2audio_jax.plan.chips import Chip
from qwen2audio_jax.plan.program import Collective
from qwen2audio_jax.plan.request import Shapes
from qwen2audio_jax.plan.stages import Stage

USABLE = 0.9
"""Of a GPU's memory; XLA_PYTHON_CLIENT_MEM_FRACTION must be set to it."""

ASSUMPTIONS = (
    "memory by arithmetic, not by compiling: the largest buffers of one layer at a time beside weights and cache",
    f"{USABLE:.0%} of the GPU's memory can be used (XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE:g}; JAX's default is 0.75)",
    "all GPUs are joined by the link named here (NVLink within a machine), also those of different machines",
    "int8 weights are widened one at a time, where they are used",
)

_WIDE = 4  # bytes of what is computed in float32: scores, logits


def usable_bytes(chip: Chip) -> int:
    """Of one GPU's memory."""
    return int(USABLE * chip.hbm_bytes)


def chosen_attention(config: Qwen2AudioConfig) -> str:
    """The attention implementation on the table's GPUs, none of which is older than Ampere."""
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0")
    mesh: Any = SimpleNamespace(devices=np.array([gpu]))
    return choose_attention(AUTO, mesh=mesh, dtype=config.dtype, head_dims=config.head_dims)


def temporary_bytes(
    stage: Stage, config: Qwen2AudioConfig, shapes: Shapes, *, data: int, model: int, width: int, widened: bool
) -> int:
    """Bytes on one chip beside weights, cache and inputs.

    Of a layer: its input, its output and the residual; queries, keys and values; two of the ffn's hidden arrays; where
    no flash attention serves, scores in float32 and in the compute dtype. Of the head: the logits twice. Of the
    encoder: its inputs and outputs too. Of int8 weights the largest, the head, in the compute dtype.

    Args:
        stage: which.
        config: of the model.
        shapes: of the batch.
        data: mesh axis.
        model: mesh axis.
        width: bytes of an element of the compute dtype.
        widened: whether the weights are int8.
    """
    text, audio = config.text_config, config.audio_config
    layer: float
    scores: float
    scored = 0 if stage != "decode" and chosen_attention(config) != XLA else _WIDE + width
    if stage == "encode":
        clips = -(-shapes.clips // (data * model))
        positions = conv_length(shapes.frames)
        layer = positions * (6 * audio.d_model + 2 * audio.encoder_ffn_dim) * width
        scores = audio.encoder_attention_heads * positions**2 * scored
        ends = shapes.frames * audio.num_mel_bins * (_WIDE + width) + positions // 2 * text.hidden_size * 2 * width
        return int(clips * (layer + scores + ends))
    rows = shapes.rows // data
    tokens = shapes.tokens if stage == "prefill" else 1
    seen = shapes.tokens if stage == "prefill" else shapes.capacity
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim / model
    layer = tokens * (3 * text.hidden_size + heads + 2 * text.intermediate_size / model) * width
    scores = text.num_attention_heads * tokens * seen * scored / model
    head = text.vocab_size * text.hidden_size * width / model if widened else 0
    return int(head + rows * (layer + scores + 2 * text.vocab_size / model * _WIDE))


def expected_collectives(
    stage: Stage, config: Qwen2AudioConfig, shapes: Shapes, *, data: int, model: int, width: int
) -> list[Collective]:
    """The collectives of a stage.

    When heads, ffn and vocabulary are split: sums after attention, ffn and embedding, and of a decode step the token's
    log-probability and the GPUs' best candidates. Before a prefill: the clips' vectors, which every GPU may need.
    """
    found: list[Collective] = []
    if stage == "encode":
        return found
    vector = config.text_config.hidden_size * width
    if stage == "prefill" and shapes.clips and data * model > 1:
        found.append(Collective("all-gather", shapes.clips * (shapes.frames // 4) * vector, data * model))
    if model > 1:
        rows, tokens = shapes.rows // data, shapes.tokens if stage == "prefill" else 1
        sums = 2 * config.text_config.num_hidden_layers + 1
        found += [Collective("all-reduce", rows * tokens * vector, model)] * sums
        if stage == "decode":
            found += [Collective("all-reduce", rows * _WIDE, model)] * 2
            found += [Collective("all-gather", rows * model * _WIDE, model)] * 2
    return found
