"""Warm-up: the programs of every call within stated bounds, compiled ahead, several at a time.

Nothing is computed and no memory of a call is taken: each jitted function is lowered for the shapes and shardings that
it will be called with, and compiled. JAX keeps a lowered program under its function, shapes and shardings, and the
program's first call finds it there. How a result is split is known once its program is compiled, so that what takes it
is compiled after it.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.generation import decoding, encoding, run
from qwen2audio_jax.generation.call import check_positions
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.padded_shapes import (
    clip_counts,
    listed_capacities,
    padded_capacity,
    padded_frames,
    padded_row_count,
    padded_tokens,
    prompt_counts,
)
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampler_state import SamplerState
from qwen2audio_jax.generation.sampling import Mode
from qwen2audio_jax.generation.sampling_params import SamplingParams, sampling_params
from qwen2audio_jax.model.kv_cache import KVCache
from qwen2audio_jax.model.qwen2_audio import Prompt
from qwen2audio_jax.parallel.process_rows import share_of
from qwen2audio_jax.parallel.sharding import named_sharding

OnProgress = Callable[[int, int, float, str], None]
"""Called with (shapes done, shapes in all, seconds since the start, the shape just done)."""

MOST_PROGRAMS = 2000
"""JAX keeps 2048 lowered programs."""

LINE_SECONDS = 10.0
"""Seconds between lines on stderr."""


@dataclass(frozen=True)
class Bounds:
    """What calls stay within.

    Attributes:
        rows: the most rows that a call returns.
        clips: the most clips of a call.
        frames: mel frames of the longest clip.
        tokens: of the longest prompt, audio tokens included.
        new_tokens: the most new tokens.
        choices: how tokens are chosen: the mode, and parameters of that kind.
    """

    rows: int
    clips: int
    frames: int
    tokens: int
    new_tokens: int
    choices: tuple[tuple[Mode, SamplingParams], ...]


def make_bounds(
    runtime: Runtime,
    defaults: GenerationConfig,
    *,
    rows: int,
    clips: int | None,
    seconds: float,
    tokens: int,
    max_new_tokens: int,
    do_sample: bool | None,
    top_k: int | Sequence[int] | None,
) -> Bounds:
    """Check the arguments of `warmup`, which see.

    Raises:
        ValueError: a number out of range; more positions than the model has; a mesh over several processes.
    """
    config = runtime.config
    if not share_of(runtime.mesh).alone:
        raise ValueError("warmup runs in one process, and this model's mesh spans several: their first call compiles")
    longest = config.audio_config.max_frames / 100
    if not 0 <= seconds <= longest:
        raise ValueError(f"seconds={seconds!r}: a clip has 0 (no clips) to {longest:g}")
    clips = (rows if seconds else 0) if clips is None else clips
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 1), ("max_new_tokens", max_new_tokens, 1)):
        if value < least:
            raise ValueError(f"{name}={value!r}: at least {least}")
    if (clips > 0) != (seconds > 0) or clips < 0:
        raise ValueError(f"clips={clips!r} and seconds={seconds!r}: calls have clips of some length, or neither")
    check_positions(tokens, max_new_tokens, config=config)
    vocab_size = config.text_config.vocab_size
    choices: list[tuple[Mode, SamplingParams]] = []
    if do_sample is not True:
        choices.append(("greedy", sampling_params(defaults.updated(do_sample=False), vocab_size=vocab_size)))
    if do_sample is not False:
        listed = [defaults.top_k] if top_k is None else [top_k] if isinstance(top_k, int) else list(top_k)
        kinds = {}
        for value in listed:
            params = sampling_params(defaults.updated(do_sample=True, top_k=value), vocab_size=vocab_size)
            kinds[params.candidate_count] = params
        choices += [("sample", params) for params in kinds.values()]
    return Bounds(rows, clips, math.ceil(100 * seconds), tokens, max_new_tokens, tuple(choices))


def warm_up(runtime: Runtime, bounds: Bounds, *, on_progress: OnProgress | None, threads: int | None) -> list[str]:
    """Compile the programs of all calls within bounds; the shapes that they are for, in words."""
    warming = _Warming(runtime, bounds)
    shapes = {**warming.prompt_shapes(), **warming.decode_shapes()}
    if warming.programs(shapes) > MOST_PROGRAMS:
        raise ValueError(
            f"calls within these bounds have some {warming.programs(shapes)} programs, and JAX keeps {MOST_PROGRAMS}: "
            "lower rows, tokens or max_new_tokens"
        )
    return compile_all(shapes, on_progress=on_progress, threads=threads)


def prompt_shapes(runtime: Runtime, bounds: Bounds) -> dict[str, Callable[[], None]]:
    """What compiles each shape of encoder and prefill, by its name."""
    return _Warming(runtime, bounds).prompt_shapes()


def compile_all(
    shapes: Mapping[str, Callable[[], None]], *, on_progress: OnProgress | None, threads: int | None
) -> list[str]:
    """Call what compiles each shape, in parallel; the shapes' names."""
    began, tell = time.monotonic(), on_progress or _Lines().show
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        futures: dict[Future[None], str] = {pool.submit(compile_shape): name for name, compile_shape in shapes.items()}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                tell(done, len(futures), time.monotonic() - began, futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return list(shapes)


class _Lines:
    """A line on stderr every `LINE_SECONDS`, and one at the end."""

    def __init__(self) -> None:
        self._next = LINE_SECONDS

    def show(self, done: int, total: int, seconds: float, name: str) -> None:
        if seconds >= self._next or done == total:
            self._next = seconds + LINE_SECONDS
            print(f"warmup: {done} of {total} shapes compiled, {seconds:.0f} s", file=sys.stderr, flush=True)


def compiled(jitted: Any, *arguments: Any, **static: Any) -> Any:
    """Compile a jitted function for its arguments, arrays or specs; the specs of what it returns."""
    lowered = jitted.lower(*arguments, **static)
    program = lowered.compile()

    def spec(info: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)

    return jax.tree.map(spec, lowered.out_info, program.output_shardings)


def _settled(step: Callable[[Any], Any], starts: Iterable[Any]) -> list[Any]:
    """All that comes of `step`, applied to the starts and to its own results again: as specs they are few."""
    taken, results = set(), {}
    waiting = list(starts)
    while waiting:
        specs = waiting.pop()
        key = tuple(jax.tree.leaves(specs))
        if key not in taken:
            taken.add(key)
            result = step(specs)
            results[tuple(jax.tree.leaves(result))] = result
            waiting.append(result)
    return list(results.values())


def _sized(specs: Any, rows: int) -> Any:
    """The same specs with another number of rows."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding), specs
    )


_SCALAR = jax.ShapeDtypeStruct((), np.int32)


@dataclass
class _Warming:
    """The programs of one warm-up, by what they are for."""

    runtime: Runtime
    bounds: Bounds
    _learned: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)

    def prompt_shapes(self) -> dict[str, Callable[[], None]]:
        """What compiles each shape of encoder and prefill, by its name."""
        config, mesh, most = self.runtime.config, self.runtime.mesh, self.bounds
        counts = prompt_counts(most.rows, mesh=mesh)
        widths = sorted({padded_tokens(each, config=config) for each in range(1, most.tokens + 1)})
        found: dict[str, Callable[[], None]] = {}
        if most.clips:
            lengths = range(3, max(most.frames, 3) + 1)
            for frames in sorted({padded_frames(each, config=config.audio_config) for each in lengths}):
                for count in clip_counts(most.clips, mesh=mesh):
                    found[f"encode {count} x {frames} frames"] = partial(self._in_mesh, self._encode, count, frames)
        for width in widths:
            for count in counts:
                found[f"prefill {count} x {width} tokens"] = partial(self._in_mesh, self._prefill, count, width)
        return found

    def decode_shapes(self) -> dict[str, Callable[[], None]]:
        """What compiles each shape of a decoding step, by its name."""
        most = self.bounds
        found: dict[str, Callable[[], None]] = {}
        for rows in sorted({self._padded(rows) for rows in range(1, most.rows + 1)}):
            for capacity in listed_capacities(most.tokens + most.new_tokens - 1, config=self.runtime.config):
                name = f"decode {rows} x {capacity} positions"
                found[name] = partial(self._in_mesh, self._decode, rows, capacity)
        return found

    def programs(self, shapes: Iterable[str]) -> int:
        """About how many programs the shapes have in all."""
        each = {"encode": 2, "prefill": 3 if self.bounds.clips else 2, "decode": 3 + len(self.bounds.choices)}
        return sum(each[name.partition(" ")[0]] for name in shapes)

    def _padded(self, rows: int) -> int:
        return padded_row_count(rows, mesh=self.runtime.mesh, dtype=self.runtime.config.dtype)

    def _in_mesh(self, compile_shape: Callable[..., Any], *sizes: int) -> None:
        with jax.set_mesh(self.runtime.mesh):
            compile_shape(*sizes)

    def _spec(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        """An array that `to_mesh` has placed."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(self.runtime.mesh, *axes))

    def _once(self, name: str, learn: Callable[[], Any]) -> Any:
        """Specs that several shapes need; the first one compiles what gives them."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._learned:
                self._learned[name] = learn()
            return self._learned[name]

    def _encode(self, clips: int, frames: int) -> Any:
        config, attention = self.runtime.config, self.runtime.attention
        shape = (clips, config.audio_config.num_mel_bins, frames)
        features = self._spec(shape, jnp.float32, "clip", "mels", "position")
        counts = self._spec((clips,), jnp.int32, "clip")
        encoded = compiled(
            encoding.encode_audio, self.runtime.encoder.params, features, counts, cfg=config, attention=attention
        )
        return compiled(encoding.clip_vectors, encoded.projected, width=config.audio_config.max_tokens)

    def _vectors(self) -> jax.ShapeDtypeStruct:
        count = clip_counts(1, mesh=self.runtime.mesh)[0]
        return self._encode(count, padded_frames(3, config=self.runtime.config.audio_config))[0]

    def _prefill(self, rows: int, tokens: int) -> tuple[Any, Any]:
        runtime, bounds = self.runtime, self.bounds
        lengths = self._spec((rows,), jnp.int32, "batch")
        text = Prompt(self._spec((rows, tokens), jnp.int32, "batch", "token"), lengths, audio=None, slots=None)
        embedded = [compiled(encoding.embed, runtime.decoder.params, text, cfg=runtime.config)]
        if bounds.clips:
            vectors = self._once("vectors", self._vectors)
            index = jax.ShapeDtypeStruct((tokens,), np.int32)
            place = partial(compiled, encoding.place_clip)
            embedded += _settled(lambda embeddings: place(embeddings, vectors, _SCALAR, index), embedded)
        more = {"cfg": runtime.config, "cache_dtype": runtime.cache_dtype, "attention": runtime.attention}
        found = [compiled(run.prefill, runtime.decoder.params, each, lengths, **more) for each in embedded]
        return found[0]

    def _prefilled(self) -> tuple[Any, Any]:
        """Logits and a piece as a prefill gives them."""
        count = prompt_counts(1, mesh=self.runtime.mesh)[0]
        logits, pieces = self._prefill(count, padded_tokens(1, config=self.runtime.config))
        return logits, pieces[0]

    def _decode(self, rows: int, capacity: int) -> None:
        runtime, mesh = self.runtime, self.runtime.mesh
        _, piece = self._once("prefilled", self._prefilled)
        one = self._once("row", self._rows)[1]
        empty = compiled(run.cache_maker(runtime, rows, capacity))

        def insert(piece: Any, cache: Any) -> Any:
            return compiled(run.insert, cache, piece, _SCALAR, _SCALAR)

        filled = _settled(partial(insert, one), [empty])
        if rows in prompt_counts(self.bounds.rows, mesh=mesh):
            filled += _settled(partial(insert, _sized(piece, rows)), [empty])
        lengths = self._spec((rows,), jnp.int32, "batch")
        stopped = self._spec((rows,), jnp.bool_, "batch")
        caches = [replace(cache, lengths=lengths) for cache in filled]
        for index, (mode, sampling) in enumerate(self.bounds.choices):
            starts = self._once(f"first of {rows}, {index}", partial(self._first, rows, mode, sampling))

            def step(state: Any, mode: Mode = mode, sampling: SamplingParams = sampling) -> Any:
                last, cache = state
                return compiled(decoding.next_step, runtime.decoder, last, cache, stopped, sampling, mode=mode)

            after = _settled(step, [(last, cache) for last in starts for cache in caches])
            larger = self._larger(capacity)
            if larger:
                _settled(step, [(last, self._enlarged(cache, larger)) for last, cache in after])

    def _larger(self, capacity: int) -> int | None:
        """The capacity that a full cache grows to; None where no call within the bounds needs more."""
        if capacity >= self.bounds.tokens + self.bounds.new_tokens - 1:
            return None
        return padded_capacity(capacity + 1, config=self.runtime.config)

    def _enlarged(self, cache: KVCache, capacity: int) -> KVCache:
        def grown(buffers: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(compiled(decoding.enlarged, buffer, capacity=capacity) for buffer in buffers)

        return replace(cache, keys=grown(cache.keys), values=grown(cache.values))

    def _rows(self) -> tuple[Any, Any]:
        """One row of logits and of a piece, out of prefills of every number of rows."""
        logits, piece = self._learned["prefilled"]
        found = []
        for count in prompt_counts(self.bounds.rows, mesh=self.runtime.mesh):
            found.append(
                (
                    compiled(run.logits_of, _sized(logits, count), _SCALAR),
                    compiled(run.row_of, _sized(piece, count), _SCALAR),
                )
            )
        return found[0]

    def _first(self, rows: int, mode: Mode, sampling: SamplingParams) -> list[Any]:
        """The first tokens of a batch, of logits from wherever they may come."""
        mesh, (logits, _) = self.runtime.mesh, self._learned["prefilled"]
        row = self._learned["row"][0]
        empty = compiled(run.logits_maker(self.runtime, rows))
        sources = _settled(lambda whole: compiled(run.insert_logits, whole, row, _SCALAR), [empty])
        if rows in prompt_counts(self.bounds.rows, mesh=mesh):
            sources.append(_sized(logits, rows))
        positions = self.runtime.config.text_config.max_position_embeddings
        state = SamplerState(
            seen=self._spec((rows, logits.shape[1]), jnp.bool_, "batch", "vocab"),
            ids=self._spec((rows, positions), jnp.int32, "batch", None),
            length=self._spec((rows,), jnp.int32, "batch"),
            step=self._spec((rows,), jnp.int32, "batch"),
            seeds=self._spec((rows,), jnp.uint32, "batch"),
            finished=self._spec((rows,), jnp.bool_, "batch"),
        )
        return [compiled(decoding.first_token, source, state, sampling, mode=mode) for source in sources]
