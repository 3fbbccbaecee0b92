"""Running one call, from top to bottom: encode, embed, prefill, decode.

    call = prepare_call(runtime, arguments, defaults=...)   # on the host: errors before anything is computed
    for step in steps(runtime, call, progress): ...         # computes nothing before the first step is asked for

Prompts of similar length are prefilled together (`grouping`), each group apart from the call's cache, which takes their
keys and values piece by piece (`model.cache_pieces`). A session puts `extend_prefix` in the place of `prefill_prompts`
where it holds the beginning of a prompt.
"""

import functools
import math
from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.call import Call, first_capacity
from qwen2audio_jax.generation.decoding import Progress, Prompted, Step, decode
from qwen2audio_jax.generation.encoding import Embedded, embed_group, embed_together, hear
from qwen2audio_jax.generation.grouping import Group
from qwen2audio_jax.generation.inputs import CheckedInputs
from qwen2audio_jax.generation.padded_shapes import padded_row_count, padded_tokens, prompt_groups
from qwen2audio_jax.generation.prefix import Prefix, without_prefix
from qwen2audio_jax.generation.programs import ByRows, Product
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampler_state import SamplerState, init_state
from qwen2audio_jax.model import cache_pieces, qwen2_audio
from qwen2audio_jax.model.cache_pieces import PIECE, Piece
from qwen2audio_jax.model.kv_cache import KVCache, cache_specs, empty_cache, fork
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.parallel.process_rows import Sizes, all_to_mesh, global_rows, share_of, to_mesh
from qwen2audio_jax.parallel.sharding import constrain, named_sharding


def _product(params: Params, embeddings: jax.Array, *_: Any, cfg: Qwen2AudioConfig, **__: Any) -> Product:
    return Product(math.prod(embeddings.shape[:2]), cfg.dtype, embeddings)


prefill = ByRows(qwen2_audio.prefill, _product, static_argnames=("cfg", "cache_dtype", "attention"))
append = ByRows(qwen2_audio.append, _product, static_argnames=("cfg", "window"), donate_argnames="cache")
row_of = jax.jit(cache_pieces.row_of)
insert = jax.jit(cache_pieces.insert, donate_argnames="cache")
_fork = jax.jit(fork)


@jax.jit
def logits_of(logits: jax.Array, row: jax.Array) -> jax.Array:
    """One row [1, V] of logits [b, V]."""
    return constrain(jax.lax.dynamic_slice_in_dim(logits, row, 1, axis=0), None, "vocab")


@partial(jax.jit, donate_argnames="logits")
def insert_logits(logits: jax.Array, new: jax.Array, row: jax.Array) -> jax.Array:
    """Write one row of logits [1, V] into `row` of logits [B, V], which are donated."""
    return constrain(jax.lax.dynamic_update_slice_in_dim(logits, new, row, axis=0), "batch", "vocab")


def steps(runtime: Runtime, call: Call, progress: Progress) -> Generator[Step, None, None]:
    """The steps of a call; nothing is computed before the first is asked for."""
    capacity = first_capacity(runtime, call)
    if share_of(runtime.mesh).alone:
        prompted = prefill_prompts(runtime, call.inputs, call.sizes, capacity=capacity, copies=call.copies)
    else:
        prompted = forked(runtime, call, prefill_prompts(runtime, call.inputs, call.sizes, capacity=capacity))
    yield from decode(runtime, call, prompted, progress)


def prefill_prompts(
    runtime: Runtime, inputs: CheckedInputs, sizes: Sizes, *, capacity: int, copies: int = 1
) -> Prompted:
    """Whole prompts prefilled into a new cache of `capacity` positions.

    In one process each prompt can have several rows, its `copies`, next to each other; it is computed once.
    """
    mesh, share = runtime.mesh, share_of(runtime.mesh)
    assert share.alone or copies == 1
    rows = padded_row_count(sizes.rows * copies, mesh=mesh, dtype=runtime.config.dtype)
    groups = prompt_groups(inputs.rows.lengths.tolist(), config=runtime.config, mesh=mesh, sizes=sizes)
    # A padding row has one token, so that nothing in it is undefined.
    lengths = np.ones(rows, np.int32)
    lengths[: len(inputs.rows.ids) * copies] = np.repeat(inputs.rows.lengths, copies)
    with jax.set_mesh(mesh):
        cache = new_cache(runtime, rows * share.groups, capacity)
    if not share.alone:
        logits, cache = _prefill_all(runtime, embed_together(runtime, inputs, sizes), cache, longest=sizes.tokens)
    else:
        vectors = hear(runtime, inputs.clips)
        if len(groups) == copies == 1 and groups[0].count == rows:
            embedded = embed_group(runtime, inputs, vectors, group=groups[0])
            logits, cache = _prefill_all(runtime, embedded, cache, longest=sizes.tokens)
        else:
            with jax.set_mesh(mesh):
                logits = logits_maker(runtime, rows)()
            for group in groups:
                embedded = embed_group(runtime, inputs, vectors, group=group)
                targets = [range(prompt * copies, (prompt + 1) * copies) for prompt in group.members]
                logits, cache = _prefill_some(runtime, embedded, logits, cache, targets=targets)
    cache = replace(cache, lengths=to_mesh(mesh, lengths, "batch"))
    ids = [row for row in inputs.rows.ids for _ in range(copies)]
    return Prompted(logits, cache, sampler_state(runtime, ids, rows=rows))


def prefill_embedded(runtime: Runtime, embedded: Embedded) -> tuple[jax.Array, tuple[Piece, ...]]:
    """Logits [B, V] after each row, and the rows' keys and values in pieces."""
    return prefill(
        runtime.decoder.params,
        embedded.embeddings,
        embedded.lengths,
        cfg=runtime.config,
        cache_dtype=runtime.cache_dtype,
        attention=runtime.attention,
    )


def _prefill_all(runtime: Runtime, embedded: Embedded, cache: KVCache, *, longest: int) -> tuple[jax.Array, KVCache]:
    """Prompts that are the whole batch, in its order."""
    with jax.set_mesh(runtime.mesh):
        logits, parts = prefill_embedded(runtime, embedded)
        for start, part in zip(range(0, longest, PIECE), parts, strict=False):
            cache = insert(cache, part, np.int32(0), np.int32(start))
    return logits, cache


def _prefill_some(
    runtime: Runtime, embedded: Embedded, logits: jax.Array, cache: KVCache, *, targets: Sequence[Sequence[int]]
) -> tuple[jax.Array, KVCache]:
    """Prompts of which each goes into its own rows of the batch, its `targets`."""
    with jax.set_mesh(runtime.mesh):
        new, parts = prefill_embedded(runtime, embedded)
        for source, rows in enumerate(targets):
            needed = parts[: -(-int(embedded.host_lengths[source]) // PIECE)]
            row_logits, row_parts = (
                logits_of(new, np.int32(source)),
                [row_of(part, np.int32(source)) for part in needed],
            )
            for target in map(np.int32, rows):
                logits = insert_logits(logits, row_logits, target)
                for index, part in enumerate(row_parts):
                    cache = insert(cache, part, target, np.int32(index * PIECE))
    return logits, cache


def extend_prefix(runtime: Runtime, inputs: CheckedInputs, prefix: Prefix) -> Prompted:
    """Prompts of which the first `prefix.starts` tokens are in `prefix.cache` already; the rest is prefilled."""
    rest, rows = without_prefix(inputs, prefix.starts), len(prefix.cache.lengths)
    width = padded_tokens(rest.sizes.tokens, config=runtime.config)
    group = Group(tuple(range(len(rest.rows.ids))), rows, width)
    embedded = embed_group(runtime, rest, hear(runtime, rest.clips), group=group)
    with jax.set_mesh(runtime.mesh):
        logits, cache = append(
            runtime.decoder.params,
            embedded.embeddings,
            prefix.cache,
            counts=embedded.lengths,
            cfg=runtime.config,
            window=prefix.cache.capacity,
        )
    # The repetition penalty counts the whole prompts.
    return Prompted(logits, cache, sampler_state(runtime, inputs.rows.ids, rows=rows))


def forked(runtime: Runtime, call: Call, prompted: Prompted) -> Prompted:
    """A row for every continuation, of rows for every prompt."""
    if call.copies == 1:
        return prompted
    padded = partial(padded_row_count, mesh=runtime.mesh, dtype=runtime.config.dtype)
    # Rows that only pad the batch copy the first prompt.
    sources = np.zeros(padded(call.sizes.rows * call.copies), np.int32)
    sources[: call.rows] = np.repeat(np.arange(call.prompts), call.copies)
    sources = global_rows(runtime.mesh, sources, size=padded(call.sizes.rows)).astype(np.int32)
    with jax.set_mesh(runtime.mesh):
        return _fork(prompted, to_mesh(runtime.mesh, sources, "batch"))


def sampler_state(
    runtime: Runtime, prompts: Sequence[np.ndarray], *, rows: int, seeds: np.ndarray | None = None
) -> SamplerState:
    """The sampler's state after prompts of these ids; `rows` of them, those that pad the batch included."""
    seeds = np.zeros(rows, np.uint32) if seeds is None else seeds
    positions = runtime.config.text_config.max_position_embeddings
    state = init_state(prompts, seeds, vocab_size=logit_count(runtime), positions=positions)
    axes = {"seen": ("batch", "vocab"), "ids": ("batch", None)}
    names = [field.name for field in fields(SamplerState)]
    arrays = [(np.asarray(getattr(state, name)), axes.get(name, ("batch",))) for name in names]
    return SamplerState(*all_to_mesh(runtime.mesh, arrays))


def logit_count(runtime: Runtime) -> int:
    """V, the padding for the mesh included."""
    return len(runtime.params["decoder"]["embed_tokens"]["embedding"])


def new_cache(runtime: Runtime, rows: int, capacity: int) -> KVCache:
    """An empty cache, allocated where it stays."""
    return cache_maker(runtime, rows, capacity)()


def cache_maker(runtime: Runtime, rows: int, capacity: int) -> Any:
    """A jitted function that makes an empty cache; always the same one, so that it is compiled once."""
    return _cache_maker(runtime.config, runtime.mesh, runtime.cache_dtype, rows, capacity)


@functools.cache
def _cache_maker(config: Qwen2AudioConfig, mesh: Mesh, dtype: str, rows: int, capacity: int) -> Any:
    size = {"rows": rows, "capacity": capacity}
    specs = cache_specs(config.text_config, **size, dtype=jnp.dtype(dtype), mesh=mesh)
    make = partial(empty_cache, config.text_config, **size, dtype=jnp.dtype(dtype))
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: spec.sharding, specs))


def logits_maker(runtime: Runtime, rows: int) -> Any:
    """A jitted function that makes logits to be written row by row; always the same one."""
    return _logits_maker(runtime.mesh, rows, logit_count(runtime))


@functools.cache
def _logits_maker(mesh: Mesh, rows: int, vocab_size: int) -> Any:
    sharding = named_sharding(mesh, "batch", "vocab")
    return jax.jit(lambda: jnp.zeros((rows, vocab_size), jnp.float32), out_shardings=sharding)
