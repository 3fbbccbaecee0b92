"""Encoding: clips to audio vectors, and prompts with these vectors in them to the decoder's input.

    vectors = hear(runtime, inputs.clips)                           # clips of similar length share a call
    embedded = embed_group(runtime, inputs, vectors, group=group)   # [B, T, D], whatever shapes the clips had

Between processes shapes have to be agreed: there all clips are encoded in one call, and all prompts embedded in one.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.grouping import Group
from qwen2audio_jax.generation.inputs import CheckedInputs, ClipFeatures, clips_to_mesh, pad_prompts
from qwen2audio_jax.generation.padded_shapes import clip_groups
from qwen2audio_jax.generation.programs import ByRows, Product, program
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.model.lengths import conv_length
from qwen2audio_jax.model.qwen2_audio import AudioFeatures, Prompt
from qwen2audio_jax.parallel.process_rows import Sizes, share_of, to_mesh

encode = program(qwen2_audio.encode, static_argnames=("cfg", "dtype", "attention"))
clip_vectors = jax.jit(qwen2_audio.clip_vectors, static_argnames="width")
embed = program(qwen2_audio.embed, static_argnames="cfg")
place_clip = jax.jit(qwen2_audio.place_clip, donate_argnames="embeddings")


def _product(params: Params, features: jax.Array, frames: jax.Array, *, cfg: Qwen2AudioConfig, **_: Any) -> Product:
    return Product(len(features) * conv_length(features.shape[2]), cfg.dtype, features)


encode_audio = ByRows(qwen2_audio.encode_audio, _product, static_argnames=("cfg", "attention"))


class Embedded(NamedTuple):
    """Prompts as the decoder takes them, padded: embeddings [B, T, D] and lengths [B] int32, and these on the host."""

    embeddings: jax.Array
    lengths: jax.Array
    host_lengths: np.ndarray


def encode_clips(runtime: Runtime, clips: ClipFeatures | None, sizes: Sizes) -> AudioFeatures:
    """Clips placed on the mesh and encoded; None where only other processes have some."""
    features, frames = clips_to_mesh(clips, config=runtime.config.audio_config, mesh=runtime.mesh, sizes=sizes)
    return _encode_audio(runtime, features, frames)


def _encode_audio(runtime: Runtime, features: jax.Array, frames: jax.Array) -> AudioFeatures:
    with jax.set_mesh(runtime.mesh):
        return encode_audio(runtime.encoder.params, features, frames, cfg=runtime.config, attention=runtime.attention)


def encode_and_place(runtime: Runtime, inputs: CheckedInputs, sizes: Sizes) -> tuple[Prompt, np.ndarray]:
    """All prompts on the mesh with all clips encoded, and the padded rows' lengths [B] on the host."""
    audio = encode_clips(runtime, inputs.clips, sizes).projected if sizes.clips else None
    vectors = 0 if audio is None else audio.shape[1]
    mesh = runtime.mesh
    padded = pad_prompts(inputs, vectors=vectors, config=runtime.config, mesh=mesh, sizes=sizes)
    prompt = Prompt(
        ids=to_mesh(mesh, padded.ids, "batch", "token"),
        lengths=to_mesh(mesh, padded.lengths, "batch"),
        audio=audio,
        slots=None if audio is None else to_mesh(mesh, padded.slots, "batch", "token"),
    )
    return prompt, padded.lengths


def embed_together(runtime: Runtime, inputs: CheckedInputs, sizes: Sizes) -> Embedded:
    """All prompts of this process beside those of the others."""
    prompt, lengths = encode_and_place(runtime, inputs, sizes)
    with jax.set_mesh(runtime.mesh):
        return Embedded(embed(runtime.decoder.params, prompt, cfg=runtime.config), prompt.lengths, lengths)


def hear(runtime: Runtime, clips: ClipFeatures | None) -> list[jax.Array]:
    """The audio vectors [max_tokens, D] of each clip; those past its own length are meaningless. In one process."""
    if clips is None:
        return []
    mesh, config = runtime.mesh, runtime.config.audio_config
    vectors: dict[int, jax.Array] = {}
    for group in clip_groups(clips.frames.tolist(), config=config, mesh=mesh):
        features = np.zeros((group.count, config.num_mel_bins, group.width), np.float32)
        frames = np.zeros(group.count, np.int32)
        for index, clip in enumerate(group.members):
            features[index], frames[index] = clips.features[clip, :, : group.width], clips.frames[clip]
        placed = to_mesh(mesh, features, "clip", "mels", "position"), to_mesh(mesh, frames, "clip")
        projected = _encode_audio(runtime, *placed).projected
        with jax.set_mesh(mesh):
            vectors.update(zip(group.members, clip_vectors(projected, width=config.max_tokens), strict=False))
    return [vectors[clip] for clip in range(len(clips.frames))]


def embed_group(runtime: Runtime, inputs: CheckedInputs, vectors: list[jax.Array], *, group: Group) -> Embedded:
    """The prompts of a group with their clips' `vectors` in their places. In one process."""
    assert share_of(runtime.mesh).alone
    mesh = runtime.mesh
    ids, lengths = np.zeros((group.count, group.width), np.int32), np.ones(group.count, np.int32)
    for row, prompt in enumerate(group.members):
        lengths[row] = len(inputs.rows.ids[prompt])
        ids[row, : lengths[row]] = inputs.rows.ids[prompt]
    text = Prompt(to_mesh(mesh, ids, "batch", "token"), to_mesh(mesh, lengths, "batch"), audio=None, slots=None)
    with jax.set_mesh(mesh):
        embeddings = embed(runtime.decoder.params, text, cfg=runtime.config)
        for row, prompt in enumerate(group.members):
            clips, places = inputs.slots[prompt].T
            for clip in np.unique(clips[clips >= 0]):
                index = np.full(group.width, -1, np.int32)
                index[: len(clips)] = np.where(clips == clip, places, -1)
                embeddings = place_clip(embeddings, vectors[clip], np.int32(row), index)
    return Embedded(embeddings, text.lengths, lengths)
