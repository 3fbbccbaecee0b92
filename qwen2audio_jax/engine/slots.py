"""Slots: the rows of one cache that is decoded, step after step, while requests come and go in them.

All state of a row is in arrays with slots first: keys and values, the sampler's state, and its settings. So another
request, whatever its options, changes values and no program. The cache is donated to whatever writes into it.

While few slots are in use, `narrow` continues them in a small copy, as a step costs what it has rows; the whole waits
beside it with what its free slots hold of earlier prompts, and whatever else needs it puts the copied rows back first.

A step is two programs, the model's and the choice of tokens, so that options and guides compile nothing of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.generation.decoding import chosen_token, first_token, forward_step, resized
from qwen2audio_jax.generation.encoding import Embedded
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.guides import Guidance, Guide, guidance
from qwen2audio_jax.generation.padded_shapes import step_rows
from qwen2audio_jax.generation.prefix import copy_rows
from qwen2audio_jax.generation.run import append, insert, new_cache, row_of, sampler_state
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampler_state import SamplerState
from qwen2audio_jax.generation.sampling import Mode, NextToken
from qwen2audio_jax.generation.sampling_params import MIN_CANDIDATES, SamplingParams, row_params
from qwen2audio_jax.generation.warmup import compiled
from qwen2audio_jax.model.cache_pieces import PIECE, Piece
from qwen2audio_jax.model.kv_cache import CACHE_AXES, KVCache, cache_specs, own_rows_at
from qwen2audio_jax.parallel.process_rows import data_indices_per_group, to_mesh
from qwen2audio_jax.parallel.sharding import constrain, named_sharding


@dataclass(frozen=True)
class Choice:
    """How the tokens of a step are chosen: a mode and how many candidates are drawn from; each is a program.

    A row with fewer candidates than the program has is not affected, and a greedy row has one.
    """

    mode: Mode
    candidates: int | None

    @classmethod
    def of(cls, configs: Sequence[GenerationConfig]) -> "Choice":
        """The cheapest that all rows of a step can share."""
        sampled = [config for config in configs if config.do_sample]
        if not sampled:
            return GREEDY
        few = all(0 < config.top_k <= MIN_CANDIDATES // 2 for config in sampled)
        return FEW if few else ALL


GREEDY, FEW, ALL = Choice("greedy", None), Choice("sample", MIN_CANDIDATES), Choice("sample", None)
CHOICES = (GREEDY, FEW, ALL)


@dataclass(frozen=True)
class Row:
    """What a row's first token depends on besides its prompt's logits."""

    ids: np.ndarray
    seed: int
    config: GenerationConfig
    guide: Guide | None = None


@dataclass(frozen=True)
class First:
    """The first tokens of prompts, and the settings they were chosen with: one row each, those that pad included."""

    last: NextToken
    sampling: SamplingParams
    lengths: jax.Array


@jax.jit
def take_row(whole: Any, new: Any, source: jax.Array, slot: jax.Array) -> Any:
    """The arrays of `whole` with row `source` of those of `new` in row `slot`."""

    def put(array: jax.Array, rows: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(rows, source, 1, axis=0)
        return constrain(jax.lax.dynamic_update_slice_in_dim(array, row, slot, axis=0), *_axes(array))

    return jax.tree.map(put, whole, new)


def _axes(array: jax.Array) -> tuple[str | None, ...]:
    """Logical axes of a row's state and settings; the bools [B, V] are what the prompt and the answer hold."""
    return ("batch", "vocab" if array.dtype == jnp.bool_ else None)[: array.ndim]


@jax.jit
def take_rows(whole: Any, cache: KVCache, places: jax.Array) -> tuple[Any, KVCache]:
    """Copies of rows on their device: of arrays that `take_row` takes, and of a cache; `places` as in `own_rows_at`."""

    def taken(array: jax.Array) -> jax.Array:
        return own_rows_at(array, places, *_axes(array))

    def copied(array: jax.Array) -> jax.Array:
        return own_rows_at(array, places, *CACHE_AXES[: array.ndim])

    return jax.tree.map(taken, whole), jax.tree.map(copied, cache)


@partial(jax.jit, donate_argnames="cache")
def insert_row(cache: KVCache, rows: KVCache, source: jax.Array, slot: jax.Array) -> KVCache:
    """Write row `source` of another cache of the same capacity into row `slot`."""

    def put(array: jax.Array, other: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(other, source, 1, axis=0)
        return constrain(jax.lax.dynamic_update_slice_in_dim(array, row, slot, axis=0), *CACHE_AXES[: array.ndim])

    keys, values = jax.tree.map(put, (cache.keys, cache.values), (rows.keys, rows.values))
    return KVCache(keys, values, cache.lengths)


@dataclass(frozen=True)
class _Aside:
    """The whole while a few of its rows are continued apart: its state, and the row of each of their slots."""

    last: NextToken
    sampling: SamplingParams
    cache: KVCache
    rows: dict[int, int]


class Slots:
    """The state of all slots on the device.

    Other threads may read `rows` and `capacity`, the cache's, and `steps`, how many rows a step can have, and
    call `first_tokens`, which touches no slot.
    """

    def __init__(self, runtime: Runtime, *, rows: int, capacity: int, stops: int):
        """Allocate.

        Args:
            runtime: of the model.
            rows: of the cache, divisible over the mesh's `data` axis.
            capacity: positions of the cache; `resize` changes it.
            stops: most stop ids of a row.
        """
        self._runtime, self.rows, self._stops, self.capacity = runtime, rows, stops, capacity
        self.steps = step_rows(rows, mesh=runtime.mesh, dtype=runtime.config.dtype)
        self._parts = data_indices_per_group(runtime.mesh)
        self._stopped = np.zeros(rows, bool)
        self._placed, self._changed = to_mesh(runtime.mesh, self._stopped.copy(), "batch"), False
        with jax.set_mesh(runtime.mesh):
            self._cache: KVCache | None = new_cache(runtime, rows, capacity)
        nothing = [Row(np.zeros(0, np.int32), 0, GenerationConfig())]
        sampling, state = self._settings(nothing, rows), self._state(nothing, rows)
        zeros = partial(np.zeros, rows)
        self._last = NextToken(self._put(zeros(np.int32)), self._put(zeros(np.float32)), state)
        self._sampling = sampling
        self._logits: jax.Array | None = None
        self._aside: _Aside | None = None

    @property
    def cache(self) -> KVCache:
        """Keys and values, as the program issued last leaves them."""
        assert self._cache is not None, "a program failed and took the cache with it"
        return self._cache

    @property
    def stepped(self) -> int:
        """Rows of a step as things are."""
        return len(self._placed)

    def row(self, slot: int) -> int:
        """The row of a slot in what the next step gives."""
        return slot if self._aside is None else self._aside.rows[slot]

    def fewest(self, slots: Sequence[int]) -> int:
        """The fewest rows that a step of these slots can have: each stays in its part of `data`."""
        most = max(len(part) for part in self._by_part(slots))
        return next(rows for rows in self.steps if rows >= most * self._parts)

    def narrow(self, slots: Sequence[int], *, rows: int) -> None:
        """Have steps compute these slots alone, in copies of `rows` rows, until anything else needs the slots."""
        self.widen()
        whole, self._cache = self.cache, None
        places, own = np.zeros((self._parts, rows // self._parts), np.int32), {}
        for part, members in enumerate(self._by_part(slots)):
            for index, slot in enumerate(members):
                places[part, index] = slot - part * (self.rows // self._parts)
                own[slot] = part * places.shape[1] + index
        self._aside = _Aside(self._last, self._sampling, whole, own)
        with jax.set_mesh(self._runtime.mesh):
            mine = (self._last, self._sampling)
            (self._last, self._sampling), self._cache = take_rows(mine, whole, self._put(places.reshape(-1)))
        self._place_stopped()

    def _by_part(self, slots: Sequence[int]) -> list[list[int]]:
        size = self.rows // self._parts
        return [[slot for slot in slots if slot // size == part] for part in range(self._parts)]

    def widen(self) -> None:
        """Put the rows of `narrow` back, and have steps compute all slots again."""
        if self._aside is None:
            return
        few, aside, self._aside = First(self._last, self._sampling, self.cache.lengths), self._aside, None
        rows, self._last, self._sampling, self._cache = self.cache, aside.last, aside.sampling, aside.cache
        for slot, source in aside.rows.items():
            self._insert_row(few, rows, source=source, slot=slot)
        self._place_stopped()

    def resize(self, capacity: int) -> None:
        """Give the cache another capacity; positions beyond it are lost."""
        if capacity != self.capacity:
            self.widen()
            cache, self._cache = [self.cache], None
            self._cache, self.capacity = resized(self._runtime, cache, capacity=capacity), capacity

    def first_tokens(self, logits: jax.Array, embedded: Embedded, rows: Sequence[Row]) -> First:
        """The first tokens after prompts that have been prefilled: logits [R, V] of at least so many rows."""
        count, choice = len(logits), Choice.of([row.config for row in rows])
        sampling = self._settings(rows, count)
        with jax.set_mesh(self._runtime.mesh):
            chosen = replace(sampling, candidate_count=choice.candidates)
            guides = {index: row.guide for index, row in enumerate(rows) if row.guide is not None}
            # Always there, so that a guide is no other program.
            said = self._said(guides, count=count, width=logits.shape[-1])
            last = first_token(logits, self._state(rows, count), chosen, mode=choice.mode, guidance=said)
        return First(last, sampling, embedded.lengths)

    def insert(self, first: First, parts: Sequence[Piece], *, source: int, slot: int) -> None:
        """Put row `source` of prefilled prompts, its keys and values in pieces, into a slot."""
        self.widen()
        with jax.set_mesh(self._runtime.mesh):
            for index, part in enumerate(parts):
                row = row_of(part, np.int32(source))
                cache, self._cache = self.cache, None
                self._cache = insert(cache, row, np.int32(slot), np.int32(index * PIECE))
        self._begin(first, source=source, slot=slot)
        self._set_stopped(slot, False)

    def extend(self, embedded: Embedded, *, sources: Sequence[int], starts: Sequence[int]) -> tuple[jax.Array, KVCache]:
        """Prompts of which the beginnings are in slots: logits, and a cache of their own to insert rows from.

        Args:
            embedded: the rests of the prompts; their padded width and the starts fit the capacity together.
            sources: the slot of each one's beginning.
            starts: how many positions of it are the prompt's.
        """
        self.widen()
        count, runtime = len(embedded.host_lengths), self._runtime
        rows = [*sources, *[sources[0]] * (count - len(sources))]
        begun = [*starts, *[starts[0]] * (count - len(starts))]
        with jax.set_mesh(runtime.mesh):
            copies = copy_rows(
                self.cache,
                np.asarray(rows, np.int32),
                np.asarray(begun, np.int32),
                capacity=self.capacity,
                mesh=runtime.mesh,
            )
            return append(
                runtime.decoder.params,
                embedded.embeddings,
                copies,
                counts=embedded.lengths,
                cfg=runtime.config,
                window=self.capacity,
            )

    def insert_row(self, first: First, rows: KVCache, *, source: int, slot: int) -> None:
        """Put row `source` of what `extend` gave into a slot."""
        self.widen()
        self._insert_row(replace(first, lengths=rows.lengths), rows, source=source, slot=slot)
        self._set_stopped(slot, False)

    def _insert_row(self, first: First, rows: KVCache, *, source: int, slot: int) -> None:
        with jax.set_mesh(self._runtime.mesh):
            cache, self._cache = self.cache, None
            self._cache = insert_row(cache, rows, np.int32(source), np.int32(slot))
        self._begin(first, source=source, slot=slot)

    def _begin(self, first: First, *, source: int, slot: int) -> None:
        cache, where = self.cache, (np.int32(source), np.int32(slot))
        with jax.set_mesh(self._runtime.mesh):
            whole = (self._last, self._sampling, cache.lengths)
            self._last, self._sampling, lengths = take_row(whole, (first.last, first.sampling, first.lengths), *where)
        self._cache = replace(cache, lengths=lengths)

    def stop(self, slot: int) -> None:
        """Let a slot's row give padding from the next step on."""
        self._set_stopped(slot, True)

    def _set_stopped(self, slot: int, stopped: bool) -> None:
        self._changed |= bool(self._stopped[slot]) != stopped
        self._stopped[slot] = stopped

    def _place_stopped(self) -> None:
        stopped = self._stopped.copy()
        if self._aside is not None:
            rows = self._aside.rows
            stopped = np.ones(len(self._last.tokens), bool)
            stopped[list(rows.values())] = self._stopped[list(rows)]
        self._placed, self._changed = to_mesh(self._runtime.mesh, stopped, "batch"), False

    def forward(self) -> None:
        """Issue the first half of a step: append each row's last token."""
        cache, self._cache = self.cache, None
        with jax.set_mesh(self._runtime.mesh):
            self._logits, self._cache = forward_step(self._runtime.decoder, self._last.tokens, cache)

    def choose(self, choice: Choice, guides: Mapping[int, Guide] | None = None) -> NextToken:
        """Issue the second half: choose each row's next token; where there are `guides`, as its slot's says."""
        assert self._logits is not None, "forward goes before"
        said = None
        if guides is not None:
            rows = {self.row(slot): guide for slot, guide in guides.items()}
            said = self._said(rows, count=self.stepped, width=self._logits.shape[-1])
        sampling = replace(self._sampling, candidate_count=choice.candidates)
        if self._changed:
            self._place_stopped()
        logits, self._logits = self._logits, None
        with jax.set_mesh(self._runtime.mesh):
            self._last = chosen_token(logits, self._last.state, self._placed, sampling, said, mode=choice.mode)
        return self._last

    def compile_forward(self, *, rows: int, capacity: int) -> None:
        """Compile the first half of a step of so many rows at a capacity, for which nothing is allocated."""
        tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=named_sharding(self._runtime.mesh, "batch"))
        with jax.set_mesh(self._runtime.mesh):
            compiled(forward_step, self._runtime.decoder, tokens, self._specs(rows, capacity))

    def compile_extension(self, embedded: Embedded, capacity: int) -> None:
        """Compile `extend` for rests of this shape at a capacity."""
        runtime, cache = self._runtime, self._specs(len(embedded.host_lengths), capacity)
        more = {"counts": embedded.lengths, "cfg": runtime.config, "window": capacity}
        with jax.set_mesh(runtime.mesh):
            compiled(append, runtime.decoder.params, embedded.embeddings, cache, **more)

    def _specs(self, rows: int, capacity: int) -> KVCache:
        runtime = self._runtime
        dtype = jnp.dtype(runtime.cache_dtype)
        return cache_specs(runtime.config.text_config, rows=rows, capacity=capacity, dtype=dtype, mesh=runtime.mesh)

    def _said(self, guides: Mapping[int, Guide], *, count: int, width: int) -> Guidance:
        return jax.tree.map(self._put, guidance(guides, rows=count, width=width))

    def _put(self, array: np.ndarray, *axes: str) -> jax.Array:
        return to_mesh(self._runtime.mesh, array, "batch", *axes)

    def _settings(self, rows: Sequence[Row], count: int) -> SamplingParams:
        vocab_size = self._runtime.config.text_config.vocab_size
        params = row_params([row.config for row in rows], rows=count, stops=self._stops, vocab_size=vocab_size)
        return jax.tree.map(self._put, params)

    def _state(self, rows: Sequence[Row], count: int) -> SamplerState:
        seeds = np.zeros(count, np.uint32)
        seeds[: len(rows)] = [row.seed for row in rows]
        return sampler_state(self._runtime, [row.ids for row in rows], rows=count, seeds=seeds)
