"""The decoding loop: one prefill, then one compiled step per token, with sampling and stop checks on the device.

The host runs one step ahead: step i + 1 is issued before the tokens of step i are read, so the device never waits for
the host. When a row ends by a stop string, which only the host can detect, the device is told one step later; the
token it generated in between is dropped.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.memory import check_fits
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_row_count
from qwen2audio_jax.generation.sampling import Mode, NextToken, SamplerState, SamplingParams, init_state, next_token
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.kv_cache import KVCache, cache_specs, empty_cache, fork
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.parallel.process_rows import Sizes, everywhere, global_rows, own_rows, share_of, to_mesh

encode = jax.jit(qwen2_audio.encode, static_argnames=("cfg", "dtype", "attention"))
encode_audio = jax.jit(qwen2_audio.encode_audio, static_argnames=("cfg", "attention"))
forward = jax.jit(qwen2_audio.forward, static_argnames=("cfg", "attention"))
prefill = jax.jit(qwen2_audio.prefill, static_argnames=("cfg", "window", "attention"), donate_argnames="cache")
first_token = jax.jit(next_token, static_argnames="mode")
_initial_state = jax.jit(init_state, static_argnames="vocab_size")
_fork = jax.jit(fork)


# The sampler's state is not donated: the host reads its `finished` while the next step is already running.
@partial(jax.jit, static_argnames=("cfg", "mode"), donate_argnames="cache")
def next_step(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    state: SamplerState,
    stopped: jax.Array,
    sampling: SamplingParams,
    *,
    cfg: Qwen2AudioConfig,
    mode: Mode,
) -> tuple[NextToken, KVCache]:
    """One step of decoding: append `tokens` [B], choose the next ones; rows in `stopped` [B] bool are finished."""
    logits, cache = qwen2_audio.decode_step(params, tokens, cache, cfg=cfg)
    state = replace(state, finished=state.finished | stopped)
    return next_token(logits, state, sampling, mode=mode), cache


@dataclass(frozen=True)
class Step:
    """The result of one decoding step, on the host.

    Attributes:
        tokens: [B] int32; the padding id in rows that had finished before.
        log_probs: [B] float32, of the chosen token; 0 in rows that had finished before.
        finished: [B] bool, true from the step that ends the row, by a stop id or by the caller.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    finished: np.ndarray


class Prompted(NamedTuple):
    """Prefilled prompts, one per row.

    Attributes:
        logits: [B, V] float32 after each row's last token.
        cache: their keys and values.
        state: the sampler's; seeds and finished rows are not set yet.
    """

    logits: jax.Array
    cache: KVCache
    state: SamplerState


def read_prompts(
    params: Params,
    prompt: qwen2_audio.Prompt,
    *,
    lengths: np.ndarray,
    capacity: int,
    cfg: Qwen2AudioConfig,
    cache: str,
    attention: str,
    mesh: Mesh,
) -> Prompted:
    """Prefill whole prompts into a new cache.

    Args:
        params: the weights, on `mesh`.
        prompt: padded prompts on `mesh`.
        lengths: [B] int32, their lengths on the host.
        capacity: positions of the cache.
        cfg: the model's configuration.
        cache: "auto" (the cache has `cfg.dtype`) or "int8".
        attention: "xla", "cudnn" or "pallas".
        mesh: the devices of all arrays; already set by the caller.
    """
    rows, _ = prompt.ids.shape
    empty = new_cache(cfg, rows, capacity, cache_dtype(cfg, cache), mesh)
    logits, filled = prefill(params, prompt, empty, cfg=cfg, attention=attention)
    return Prompted(logits, filled, sampler_state(prompt.ids, lengths, vocab_size=logits.shape[-1], mesh=mesh))


def sampler_state(ids: jax.Array, lengths: np.ndarray, *, vocab_size: int, mesh: Mesh) -> SamplerState:
    """The sampler's state after prompts: left-aligned ids [B, T] on the mesh, lengths [B] on the host."""
    rows, width = ids.shape
    present = to_mesh(mesh, np.arange(width) < lengths[:, None], "batch", "token")
    return _initial_state(ids, present, np.zeros(rows, np.uint32), vocab_size=vocab_size)


def cache_dtype(cfg: Qwen2AudioConfig, cache: str) -> jnp.dtype:
    """The dtype of a cache that is "auto" (`cfg.dtype`) or "int8"."""
    return jnp.dtype(cfg.dtype if cache == "auto" else cache)


class Decoding:
    """One running generation: iterate over it for its steps; call `stop` to end rows from outside.

    Ends by itself after the budget, or when every row has finished.

    Attributes:
        cache: the cache after the last issued step; None before the first. The next step donates it.
        read: the tokens [B] that the device returned in each step so far, including those dropped afterwards.
        appended: the number of steps whose tokens are in the cache; the last one may not have been read yet.
    """

    def __init__(
        self,
        params: Params,
        begin: Callable[[int], Prompted],
        *,
        rows: int,
        copies: int,
        budget: int,
        sizes: Sizes,
        seeds: np.ndarray,
        sampling: SamplingParams,
        mode: Mode,
        cfg: Qwen2AudioConfig,
        cache: str,
        mesh: Mesh,
        spare: int = 0,
    ):
        """Check and store the arguments; nothing is computed yet.

        Args:
            params: the weights, on `mesh`.
            begin: prefills the prompts at the first step, given the number of positions that the cache needs; the first
                `rows` of its rows are real.
            rows: number of real prompts.
            copies: continuations of each prompt, returned next to each other.
            budget: maximum of new tokens per row; at least 1.
            sizes: agreed between the processes: the maximum rows, tokens and budget of any of them.
            seeds: [rows * copies] uint32.
            sampling: settings.
            mode: "greedy" or "sample".
            cfg: the model's configuration.
            cache: "auto" (the cache has `cfg.dtype`) or "int8".
            mesh: the devices of all arrays.
            spare: bytes on each device that `begin` frees or reuses.

        Raises:
            ValueError: the cache would not fit in the devices' memory.
        """
        self.cache: KVCache | None = None
        self.read: list[np.ndarray] = []
        self.appended = 0
        self._params, self._begin = params, begin
        self._budget, self._sampling, self._mode, self._cfg, self._mesh = budget, sampling, mode, cfg, mesh
        self._count, self._copies, self._sizes = rows * copies, copies, sizes
        decoded = padded_row_count(sizes.rows * copies, mesh=mesh)
        # Padding rows are finished from the start; with several copies they copy the first prompt.
        self._sources = np.zeros(decoded, np.int32)
        self._sources[: self._count] = np.repeat(np.arange(rows), copies)
        self._seeds = np.zeros(decoded, np.uint32)
        self._seeds[: self._count] = seeds
        self._stopped = np.arange(decoded) >= self._count
        # The last token's key and value are never read, so the budget needs one position less than it has tokens.
        needed = sizes.tokens + sizes.budget - 1
        self._capacity = padded_capacity(needed, config=cfg)
        # A forked cache exists beside the one it is copied from; rows are counted over all processes.
        self._prompts = padded_row_count(sizes.rows, mesh=mesh)
        held = (self._prompts + (decoded if copies > 1 else 0)) * share_of(mesh).groups
        dtype = cache_dtype(cfg, cache)
        check_fits(cfg.text_config, rows=held, capacity=self._capacity, dtype=dtype, mesh=mesh, spare=spare)

    @property
    def rows(self) -> int:
        """The number of returned rows."""
        return self._count

    def stop(self, row: int) -> None:
        """End a row: it returns padding from the next step on."""
        self._stopped[row] = True

    def _start(self) -> tuple[NextToken, KVCache]:
        """The first tokens, and the cache after the prompts."""
        mesh = self._mesh
        logits, cache, state = self._begin(self._capacity)
        # The steps may have more rows than there are prompts: several continuations of each.
        if self._copies > 1:
            sources = global_rows(mesh, self._sources, size=self._prompts).astype(np.int32)
            logits, cache, state = _fork((logits, cache, state), to_mesh(mesh, sources, "batch"))
        state = replace(
            state, seeds=to_mesh(mesh, self._seeds, "batch"), finished=to_mesh(mesh, self._stopped.copy(), "batch")
        )
        return first_token(logits, state, self._sampling, mode=self._mode), cache

    def __iter__(self) -> Iterator[Step]:
        """Run the steps; a row's tokens do not depend on the rest of the batch."""
        with jax.set_mesh(self._mesh):
            issued, self.cache = self._start()
        over = False
        for left in reversed(range(self._sizes.budget)):
            arriving = issued
            if left:
                stopped = to_mesh(self._mesh, self._stopped.copy(), "batch")
                with jax.set_mesh(self._mesh):
                    issued, self.cache = next_step(
                        self._params,
                        arriving.tokens,
                        self.cache,
                        arriving.state,
                        stopped,
                        self._sampling,
                        cfg=self._cfg,
                        mode=self._mode,
                    )
                self.appended += 1
            tokens, log_probs, finished = own_rows(
                self._mesh, (arriving.tokens, arriving.log_probs, arriving.state.finished)
            )
            if not over:
                self.read.append(tokens[: self._count])
                ended = self._stopped.copy()
                tokens = np.where(ended, np.asarray(self._sampling.pad_token_id), tokens)
                log_probs = np.where(ended, np.float32(0), log_probs)
                yield Step(tokens[: self._count], log_probs[: self._count], (finished | ended)[: self._count])
                over = len(self.read) == self._budget or bool((finished | self._stopped).all())
            if share_of(self._mesh).alone:
                if over:
                    return
                continue
            # Other processes may have unfinished rows, and their steps need this process too.
            if over:
                self._stopped[:] = True
            if everywhere(self._mesh, arriving.state.finished):
                return


def new_cache(cfg: Qwen2AudioConfig, rows: int, capacity: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
    """An empty cache, allocated directly on the mesh."""
    return _cache_maker(cfg, rows, capacity, dtype, mesh)()


@functools.cache
def _cache_maker(
    cfg: Qwen2AudioConfig, rows: int, capacity: int, dtype: jnp.dtype, mesh: Mesh
) -> Callable[[], KVCache]:
    """A compiled function that allocates an empty cache on the mesh; memoised, since each call would recompile it."""
    specs = cache_specs(cfg.text_config, rows=rows, capacity=capacity, dtype=dtype, mesh=mesh)
    make = partial(empty_cache, cfg.text_config, rows=rows, capacity=capacity, dtype=dtype)
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: spec.sharding, specs))
