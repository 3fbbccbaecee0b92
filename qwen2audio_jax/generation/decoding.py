"""Decoding: one compiled step a token, with sampling and stop checks on the device.

The host runs one step ahead: step i + 1 is issued before the tokens of step i are read, so the device never waits for
the host. When a row ends by a stop string, which only the host can see, the device learns of it one step later; the
token that it made meanwhile is dropped.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen2audio_jax.generation.call import Call
from qwen2audio_jax.generation.guides import Guidance, Guide, guidance
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_row_count
from qwen2audio_jax.generation.programs import ByRows, Product, program
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampler_state import SamplerState
from qwen2audio_jax.generation.sampling import Mode, NextToken, next_token
from qwen2audio_jax.generation.sampling_params import SamplingParams
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.kv_cache import KVCache, enlarge, shorten
from qwen2audio_jax.parallel.process_rows import everywhere, own_rows, share_of, to_mesh

first_token = program(next_token, static_argnames="mode")
enlarged = jax.jit(enlarge, static_argnames="capacity")
shortened = jax.jit(shorten, static_argnames="capacity")


def _step_product(runtime: Runtime, last: NextToken, *_: Any, **__: Any) -> Product:
    return Product(len(last.tokens), runtime.config.dtype, last.tokens)


def _forward_product(runtime: Runtime, tokens: jax.Array, *_: Any) -> Product:
    return Product(len(tokens), runtime.config.dtype, tokens)


# The sampler's state is not donated: its `finished` is read while the next step is already running.
@partial(ByRows, product=_step_product, static_argnames="mode", donate_argnames="cache")
def next_step(
    runtime: Runtime, last: NextToken, cache: KVCache, stopped: jax.Array, sampling: SamplingParams, *, mode: Mode
) -> tuple[NextToken, KVCache]:
    """One decoding step: append the last tokens, choose the next ones; rows in `stopped` [B] bool are finished."""
    logits, cache = qwen2_audio.decode_step(runtime.params, last.tokens, cache, cfg=runtime.config)
    state = replace(last.state, finished=last.state.finished | stopped)
    return next_token(logits, state, sampling, mode=mode), cache


@partial(ByRows, product=_forward_product, donate_argnames="cache")
def forward_step(runtime: Runtime, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """The first half of a step in two programs, as of guided rows and of engines: logits [B, V] after these tokens."""
    return qwen2_audio.decode_step(runtime.params, tokens, cache, cfg=runtime.config)


@partial(program, static_argnames="mode")
def chosen_token(
    logits: jax.Array,
    state: SamplerState,
    stopped: jax.Array,
    sampling: SamplingParams,
    guidance: Guidance | None,
    *,
    mode: Mode,
) -> NextToken:
    """The second half: the next tokens, as guides say if there are any; see `sampling.next_token`."""
    return next_token(logits, replace(state, finished=state.finished | stopped), sampling, mode=mode, guidance=guidance)


class LogitsError(ValueError):
    """Error: the model's logits, or its audio features, are not numbers."""

    kind = "logits"


class Prompted(NamedTuple):
    """Prompts that have been prefilled, a row for every continuation.

    Attributes:
        logits: [B, V] float32 after each row's last token.
        cache: their keys and values.
        state: the sampler's state; seeds and finished rows are set when decoding starts.
    """

    logits: jax.Array
    cache: KVCache
    state: SamplerState


@dataclass(frozen=True)
class Step:
    """Result of one step, on the host.

    Attributes:
        tokens: [B] int32; the padding id in rows that had finished before.
        log_probs: [B] float32, of the chosen token; 0 in rows that had finished before.
        finished: [B] bool, true from the step on that ends the row, whether by a stop id or by the caller.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    finished: np.ndarray


@dataclass
class Progress:
    """State of one running call: the caller stops rows in it, and finds in it what a session can resume from.

    Attributes:
        stopped: [padded rows] bool: rows that the caller has ended, and those that only pad the batch.
        cache: as the step issued last has left it; None before the first. The next step takes it.
        read: the tokens [B] of each step so far, those that were dropped afterwards included.
        appended: how many steps' tokens are in the cache; the last of them may not have been read yet.
    """

    stopped: np.ndarray
    cache: KVCache | None = None
    read: list[np.ndarray] = field(default_factory=list)
    appended: int = 0

    @classmethod
    def of(cls, runtime: Runtime, call: Call) -> "Progress":
        """The state before the first step."""
        decoded = padded_row_count(call.sizes.rows * call.copies, mesh=runtime.mesh, dtype=runtime.config.dtype)
        return cls(np.arange(decoded) >= call.rows)

    def stop(self, row: int) -> None:
        """End a row: it gives padding from the next step on."""
        self.stopped[row] = True


def decode(runtime: Runtime, call: Call, prompted: Prompted, progress: Progress) -> Generator[Step, None, None]:
    """Steps of a call after its prompts; ends after the budget, or when every row has finished.

    A row's tokens do not depend on what else is in the batch.
    """
    mesh, rows, mode = runtime.mesh, call.rows, call.settings.mode
    with jax.set_mesh(mesh):
        issued, progress.cache = _first_tokens(runtime, call, prompted, progress)
    del prompted
    over, stopped = False, progress.stopped.copy()
    fault: LogitsError | None = None
    placed = to_mesh(mesh, stopped, "batch")
    for left in reversed(range(call.sizes.budget)):
        arriving = issued
        if left:
            make_room(runtime, call, progress)
            if not np.array_equal(stopped, progress.stopped):
                stopped = progress.stopped.copy()
                placed = to_mesh(mesh, stopped, "batch")
            if call.guides:
                issued = _guided_step(runtime, call, arriving, placed, progress)
            else:
                with jax.set_mesh(mesh):
                    issued, progress.cache = next_step(
                        runtime.decoder, arriving, progress.cache, placed, call.sampling, mode=mode
                    )
            progress.appended += 1
        tokens, log_probs, finished = own_rows(mesh, (arriving.tokens, arriving.log_probs, arriving.state.finished))
        if not over:
            progress.read.append(tokens[:rows])
            ended = progress.stopped.copy()
            tokens = np.where(ended, np.asarray(call.sampling.pad_token_id), tokens)
            log_probs = np.where(ended, np.float32(0), log_probs)
            fault = _fault(log_probs[:rows], step=len(progress.read), dtype=runtime.config.dtype)
            if fault is not None and share_of(mesh).alone:
                raise fault
            over = fault is not None
        if not over:
            yield Step(tokens[:rows], log_probs[:rows], (finished | ended)[:rows])
            over = len(progress.read) == call.budget or bool((finished | progress.stopped).all())
        if share_of(mesh).alone:
            if over:
                return
            continue
        # Other processes may have rows that still run, and their steps need this process too.
        if over:
            progress.stopped[:] = True
        if everywhere(mesh, arriving.state.finished):
            break
    if fault is not None:
        raise fault


def _guided_step(runtime: Runtime, call: Call, last: NextToken, stopped: jax.Array, progress: Progress) -> NextToken:
    """A step in two programs; while the device computes the logits, the host tells the guides the last tokens."""
    mesh = runtime.mesh
    with jax.set_mesh(mesh):
        logits, progress.cache = forward_step(runtime.decoder, last.tokens, progress.cache)
    tokens, finished = own_rows(mesh, (last.tokens, last.state.finished))
    ended = finished | progress.stopped
    running = {row: guide for row, guide in enumerate(call.guides) if not ended[row]}
    for row, guide in running.items():
        guide.advance(int(tokens[row]))
    said = _placed(runtime, running, rows=len(tokens), width=logits.shape[-1])
    with jax.set_mesh(mesh):
        return chosen_token(logits, last.state, stopped, call.sampling, said, mode=call.settings.mode)


def _placed(runtime: Runtime, guides: Mapping[int, Guide], *, rows: int, width: int) -> Guidance:
    said = guidance(guides, rows=rows, width=width)
    return jax.tree.map(lambda array: to_mesh(runtime.mesh, array, "batch", None), said)


def _fault(log_probs: np.ndarray, *, step: int, dtype: str) -> LogitsError | None:
    for row, value in enumerate(log_probs):
        if fault := logits_fault(value, token=f"{step} of row {row}", dtype=dtype):
            return LogitsError(fault)
    return None


def logits_fault(log_prob: float, *, token: object, dtype: str) -> str | None:
    """What to say of logits that are not numbers, by the log-probability of the token that they gave; None of others.

    A token's log-probability is not finite if any of its row's logits is NaN or inf, so it shows without another pass
    over the vocabulary.
    """
    return None if math.isfinite(log_prob) else not_numbers("logits", where=f"token {token}", dtype=dtype)


def not_numbers(what: str, *, where: str, dtype: str) -> str:
    """What to say where some of a model's numbers are none: the dtype, and what to do."""
    remedy = "its weights are damaged or do not fit its configuration: get the checkpoint anew, and leave adapters out"
    if dtype == "float16":
        remedy = (
            "float16 holds no number above 65504, and this model's activations exceed it: load it with "
            "dtype='bfloat16' or 'float32' (--dtype bfloat16)"
        )
    elif dtype == "bfloat16":
        remedy = f"load it with dtype='float32' (--dtype float32); if that gives the same, {remedy}"
    return f"the model's {what} are not numbers (computed in {dtype}; {where}): {remedy}"


def make_room(runtime: Runtime, call: Call, progress: Progress) -> None:
    """Give a full cache the next listed capacity."""
    assert progress.cache is not None
    needed = call.sizes.tokens + progress.appended + 1
    if needed > progress.cache.capacity:
        cache, progress.cache = [progress.cache], None  # the list gives up its reference, so that layers can go
        progress.cache = resized(runtime, cache, capacity=padded_capacity(needed, config=runtime.config))


def resized(runtime: Runtime, cache: list[KVCache], *, capacity: int) -> KVCache:
    """The cache out of a list, with another capacity; a layer at a time, so that no second cache is in memory."""
    whole = cache.pop()
    change = enlarged if capacity > whole.capacity else shortened
    layers, lengths = [*whole.keys, *whole.values], whole.lengths
    del whole
    with jax.set_mesh(runtime.mesh):
        for index, buffer in enumerate(layers):
            layers[index] = change(buffer, capacity=capacity)
    half = len(layers) // 2
    return KVCache(tuple(layers[:half]), tuple(layers[half:]), lengths)


def _first_tokens(runtime: Runtime, call: Call, prompted: Prompted, progress: Progress) -> tuple[NextToken, KVCache]:
    """The first tokens, and the cache after the prompts."""
    mesh, (logits, cache, state) = runtime.mesh, prompted
    decoded = len(progress.stopped)
    seeds = np.zeros(decoded, np.uint32)
    seeds[: call.rows] = call.seeds
    stopped = to_mesh(mesh, progress.stopped.copy(), "batch")
    state = replace(state, seeds=to_mesh(mesh, seeds, "batch"), finished=stopped)
    if not call.guides:
        return first_token(logits, state, call.sampling, mode=call.settings.mode), cache
    said = _placed(runtime, dict(enumerate(call.guides)), rows=decoded, width=logits.shape[-1])
    return first_token(logits, state, call.sampling, mode=call.settings.mode, guidance=said), cache
