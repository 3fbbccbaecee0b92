"""Calls that generate nothing: logits at every position with their loss, and audio vectors."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.generation.arguments import INPUTS, merged
from qwen2audio_jax.generation.call import check_positions
from qwen2audio_jax.generation.encoding import encode_and_place, encode_clips
from qwen2audio_jax.generation.inputs import (
    CheckedInputs,
    ClipFeatures,
    check_clips,
    check_contiguous,
    check_inputs,
    label_rows,
)
from qwen2audio_jax.generation.outputs import ModelOutput
from qwen2audio_jax.generation.programs import program
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.loss import next_token_loss
from qwen2audio_jax.model.qwen2_audio import AudioFeatures
from qwen2audio_jax.parallel.process_rows import Prepared, agree, own_arrays, share_of, to_mesh

forward = program(qwen2_audio.forward, static_argnames=("cfg", "attention"))
_loss = jax.jit(next_token_loss, static_argnames="ignore_index")


def forward_inputs(inputs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays and labels of a forward call, by name; `given` may have options of the reference's beside them.

    Raises:
        TypeError: no ids, something that is there twice, or an option that has no meaning here.
    """
    named = merged(inputs, given)
    if named.get("input_ids") is None:
        raise TypeError("input_ids is missing: pass what the processor returns, as in model(**inputs)")
    for name in set(named) - {*INPUTS, "labels", "use_cache", "return_dict"}:
        if named[name] not in (None, False):
            raise TypeError(f"a forward call has no argument {name!r}: it gives logits, and with labels= the loss")
    return named


def forward_call(runtime: Runtime, given: Mapping[str, Any]) -> ModelOutput:
    """Logits at every position of this process's rows, and their loss; `given` as `forward_inputs` returns it.

    Raises:
        ValueError: inputs that do not fit each other or the model.
    """
    config, mesh = runtime.config, runtime.mesh

    def check() -> tuple[tuple[CheckedInputs, np.ndarray | None], Prepared]:
        inputs = check_inputs(*(given[name] for name in INPUTS), config=config)
        check_contiguous(inputs.rows)
        check_positions(inputs.sizes.tokens, 0, config=config)
        targets = None if given["labels"] is None else label_rows(given["labels"], inputs.rows, config=config)
        return (inputs, targets), Prepared(inputs.sizes, inputs=inputs.arrays)

    (checked, targets), sizes = agree(mesh, check)
    prompt, lengths = encode_and_place(runtime, checked, sizes)
    rows, alone = checked.rows, share_of(mesh).alone
    positions = np.full((len(rows.ids) if alone else len(lengths), sizes.width), -1, np.int32)
    for row, columns in enumerate(rows.columns):
        positions[row, columns] = np.arange(len(columns))
    with jax.set_mesh(mesh):
        logits = forward(runtime.params, prompt, cfg=config, attention=runtime.attention)
        where = positions if alone else to_mesh(mesh, positions, "batch", "token")
        logits = _at_input_positions(logits, where, vocab_size=config.text_config.vocab_size)
    if not alone:
        logits = own_arrays(mesh, logits)[: len(rows.ids), : rows.width]
        positions = positions[: len(rows.ids), : rows.width]
    if targets is None:
        return ModelOutput(logits, None)
    return ModelOutput(logits, _loss(logits, targets, positions >= 0, ignore_index=config.ignore_index))


def encode_call(runtime: Runtime, input_features: Any, feature_attention_mask: Any) -> AudioFeatures:
    """Vectors of this process's clips, cut to the longest one.

    Raises:
        ValueError: features that are not the model's, or do not fit their mask.
    """

    def check() -> tuple[ClipFeatures, Prepared]:
        clips = check_clips(input_features, feature_attention_mask, config=runtime.config.audio_config)
        return clips, Prepared(clips.sizes, inputs=(clips.frames, clips.features))

    clips, sizes = agree(runtime.mesh, check)
    result = own_arrays(runtime.mesh, encode_clips(runtime, clips, sizes))
    count, longest = len(clips.frames), int(clips.tokens.max())
    return AudioFeatures(result.encoded[:count, :longest], result.projected[:count, :longest], result.lengths[:count])


@partial(jax.jit, static_argnames=("vocab_size",))
def _at_input_positions(logits: jax.Array, positions: jax.Array, *, vocab_size: int) -> jax.Array:
    """Logits at the input's own positions; positions [B, T] are those in the left-aligned rows, -1 on padding."""
    moved = jnp.take_along_axis(logits[: len(positions)], jnp.maximum(positions, 0)[..., None], axis=1)
    return jnp.where(positions[..., None] >= 0, moved[..., :vocab_size], 0.0)
