"""Running one call, from top to bottom: encode and place, prefill, decode.

    call = prepare_call(runtime, arguments, defaults=...)   # on the host: errors before anything is computed
    for step in steps(runtime, call, progress): ...         # computes nothing before the first step is asked for

A session puts `extend_prefix` in the place of `prefill_prompts` where it holds the beginning of a prompt.
"""

import functools
from collections.abc import Callable, Generator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.call import Call, cache_capacity
from qwen2audio_jax.generation.decoding import Progress, Prompted, Step, decode
from qwen2audio_jax.generation.inputs import CheckedInputs, ClipFeatures, clips_to_mesh, pad_prompts
from qwen2audio_jax.generation.padded_shapes import padded_tokens
from qwen2audio_jax.generation.prefix import Prefix, without_prefix
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampling import SamplerState, init_state
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.kv_cache import KVCache, cache_specs, empty_cache
from qwen2audio_jax.model.qwen2_audio import AudioFeatures, Prompt
from qwen2audio_jax.parallel.process_rows import Sizes, to_mesh

encode = jax.jit(qwen2_audio.encode, static_argnames=("cfg", "dtype", "attention"))
encode_audio = jax.jit(qwen2_audio.encode_audio, static_argnames=("cfg", "attention"))
forward = jax.jit(qwen2_audio.forward, static_argnames=("cfg", "attention"))
prefill = jax.jit(qwen2_audio.prefill, static_argnames=("cfg", "window", "attention"), donate_argnames="cache")
_initial_state = jax.jit(init_state, static_argnames="vocab_size")


def steps(runtime: Runtime, call: Call, progress: Progress) -> Generator[Step, None, None]:
    """The steps of a call; nothing is computed before the first is asked for."""
    capacity = cache_capacity(runtime, call)
    yield from decode(runtime, call, prefill_prompts(runtime, call.inputs, call.sizes, capacity=capacity), progress)


def encode_clips(runtime: Runtime, clips: ClipFeatures | None, sizes: Sizes) -> AudioFeatures:
    """Clips placed on the mesh and encoded; None where only other processes have some."""
    features, frames = clips_to_mesh(clips, config=runtime.config.audio_config, mesh=runtime.mesh, sizes=sizes)
    with jax.set_mesh(runtime.mesh):
        return encode_audio(runtime.params, features, frames, cfg=runtime.config, attention=runtime.attention)


def encode_and_place(runtime: Runtime, inputs: CheckedInputs, sizes: Sizes) -> tuple[Prompt, np.ndarray]:
    """The prompts on the mesh with their clips encoded, and the padded rows' lengths [B] on the host."""
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


def prefill_prompts(runtime: Runtime, inputs: CheckedInputs, sizes: Sizes, *, capacity: int) -> Prompted:
    """Whole prompts prefilled into a new cache of `capacity` positions."""
    prompt, lengths = encode_and_place(runtime, inputs, sizes)
    rows, _ = prompt.ids.shape
    with jax.set_mesh(runtime.mesh):
        empty = new_cache(runtime, rows, capacity)
        logits, cache = prefill(runtime.params, prompt, empty, cfg=runtime.config, attention=runtime.attention)
        state = sampler_state(runtime, prompt.ids, lengths, vocab_size=logits.shape[-1])
    return Prompted(logits, cache, state)


def extend_prefix(runtime: Runtime, inputs: CheckedInputs, prefix: Prefix) -> Prompted:
    """Prompts of which the first `prefix.starts` tokens are in `prefix.cache` already; the rest is prefilled."""
    rest, mesh = without_prefix(inputs, prefix.starts), runtime.mesh
    prompt, rest_lengths = encode_and_place(runtime, rest, rest.sizes)
    # The repetition penalty counts the whole prompts.
    ids = np.zeros((len(rest_lengths), padded_tokens(inputs.sizes.tokens, config=runtime.config)), np.int32)
    for whole, row in zip(ids, inputs.rows.ids, strict=False):
        whole[: len(row)] = row
    lengths = rest_lengths.copy()
    lengths[: len(prefix.starts)] += prefix.starts
    with jax.set_mesh(mesh):
        logits, cache = prefill(runtime.params, prompt, prefix.cache, cfg=runtime.config, window=prefix.cache.capacity)
        whole_ids = to_mesh(mesh, ids, "batch", "token")
        state = sampler_state(runtime, whole_ids, lengths, vocab_size=logits.shape[-1])
    return Prompted(logits, cache, state)


def sampler_state(runtime: Runtime, ids: jax.Array, lengths: np.ndarray, *, vocab_size: int) -> SamplerState:
    """The sampler's state after prompts: left-aligned ids [B, T] on the mesh, lengths [B] on the host."""
    rows, width = ids.shape
    present = to_mesh(runtime.mesh, np.arange(width) < lengths[:, None], "batch", "token")
    return _initial_state(ids, present, np.zeros(rows, np.uint32), vocab_size=vocab_size)


def new_cache(runtime: Runtime, rows: int, capacity: int) -> KVCache:
    """An empty cache, allocated where it stays."""
    return _cache_maker(runtime.config, runtime.mesh, runtime.cache_dtype, rows, capacity)()


@functools.cache
def _cache_maker(config: Qwen2AudioConfig, mesh: Mesh, dtype: str, rows: int, capacity: int) -> Callable[[], KVCache]:
    """A compiled function that makes an empty cache; kept, as every call would compile it anew."""
    size = {"rows": rows, "capacity": capacity}
    specs = cache_specs(config.text_config, **size, dtype=jnp.dtype(dtype), mesh=mesh)
    make = partial(empty_cache, config.text_config, **size, dtype=jnp.dtype(dtype))
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: spec.sharding, specs))
