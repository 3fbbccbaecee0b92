"""Settings of sampling as arrays, for a call or for each row, and the rows' seeds."""

import operator
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.generation.generation_config import GenerationConfig

Edit = Callable[[jax.Array, jax.Array], jax.Array]

EOS_SLOTS = 8  # stop ids are padded to a multiple of this, so that a few more of them need no new compilation
MIN_CANDIDATES = 128  # selecting 128 of the vocabulary costs as much as selecting 20, and leaves room for ties
_SEEDS = 1 << 32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "temperature",
        "top_k",
        "tail_mass",
        "min_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "min_new_tokens",
        "eos_token_ids",
        "pad_token_id",
        "candidates",
    ],
    meta_fields=["candidate_count", "edit"],
)
@dataclass(frozen=True)
class SamplingParams:
    """The settings of a call as arrays, so that changed values reuse the same compiled program.

    Each is one for all rows, or has rows first: [B] where [] is said, [B, E] where [E] is.
    """

    temperature: jax.Array
    """[] float32, above 0."""
    top_k: jax.Array
    """[] int32; 0 keeps all."""
    tail_mass: jax.Array
    """[] float32: 1 - top_p, the largest probability mass that top-p removes; negative keeps all."""
    min_p: jax.Array
    """[] float32: tokens below this share of the most probable one's probability are removed; 0 keeps all."""
    repetition_penalty: jax.Array
    """[] float32, above 0; 1 does nothing."""
    no_repeat_ngram_size: jax.Array
    """[] int32: no such number of tokens in a row comes twice; 0 does nothing."""
    min_new_tokens: jax.Array
    """[] int32."""
    eos_token_ids: jax.Array
    """[E] int32, padded with -1."""
    pad_token_id: jax.Array
    """[] int32: the id that finished rows emit."""
    candidates: jax.Array
    """[] int32: the number of most probable tokens that a row draws from; 1 makes it greedy."""
    candidate_count: int | None
    """Static: the largest of `candidates`; None for the whole vocabulary, and when not sampling."""
    edit: Edit | None = None
    """Static: the caller's own change of the scores, a pure function of (ids, scores); see `logits_processors`."""


def sampling_params(config: GenerationConfig, *, vocab_size: int) -> SamplingParams:
    """The settings of `config` for a model of `vocab_size` (unpadded) tokens.

    Raises:
        ValueError: a stop or padding id that is not in the vocabulary.
    """
    return jax.device_put(_host_params(config, vocab_size=vocab_size))


def _host_params(config: GenerationConfig, *, vocab_size: int) -> SamplingParams:
    for name, ids in (("eos_token_id", config.eos_token_id), ("pad_token_id", (config.filler_token_id,))):
        for token in ids:
            if token >= vocab_size:
                raise ValueError(f"{name} {token} is not in the vocabulary of {vocab_size} tokens: give an id below")
    eos = np.full(EOS_SLOTS * max(1, -(-len(config.eos_token_id) // EOS_SLOTS)), -1, np.int32)
    eos[: len(config.eos_token_id)] = config.eos_token_id
    # 1 - top_p is rounded to float32 once, as in the reference, instead of top_p and the difference separately.
    tail_mass = 1.0 - config.top_p if config.top_p < 1.0 else -1.0
    # A power of two of at least twice top_k: few different programs, and room for ties.
    limited = config.do_sample and config.top_k
    count = max(MIN_CANDIDATES, 1 << (2 * config.top_k - 1).bit_length()) if limited else vocab_size
    arrays: Any = {
        "temperature": np.float32(config.temperature or 1.0),  # 0 is another way to write greedy
        "top_k": np.int32(config.top_k),
        "tail_mass": np.float32(tail_mass),
        "min_p": np.float32(config.min_p),
        "repetition_penalty": np.float32(config.repetition_penalty),
        "no_repeat_ngram_size": np.int32(config.no_repeat_ngram_size),
        "min_new_tokens": np.int32(config.min_new_tokens or 0),
        "eos_token_ids": eos,
        "pad_token_id": np.int32(config.filler_token_id),
        "candidates": np.int32(min(count, vocab_size)),
    }
    return SamplingParams(**arrays, candidate_count=count if count < vocab_size else None)


def row_params(configs: Sequence[GenerationConfig], *, rows: int, stops: int, vocab_size: int) -> SamplingParams:
    """Settings of rows that each have their own, greedy and sampled ones together; numpy arrays.

    Args:
        configs: of the first rows; the rest only pads the batch.
        rows: B.
        stops: E, at least as many as any row's stop ids.
        vocab_size: of the model, unpadded.

    Raises:
        ValueError: as `sampling_params`; more stop ids than `stops`.
    """
    found = []
    for config in configs:
        if len(config.eos_token_id) > stops:
            raise ValueError(f"eos_token_id has {len(config.eos_token_id)} ids, and {stops} fit here: leave some out")
        params = _host_params(config, vocab_size=vocab_size)
        eos: Any = np.full(stops, -1, np.int32)
        eos[: len(config.eos_token_id)] = config.eos_token_id
        count: Any = params.candidates if config.do_sample else np.int32(1)
        found.append(replace(params, eos_token_ids=eos, candidates=count, candidate_count=None))
    found += [found[0]] * (rows - len(found))
    return jax.tree.map(lambda *values: np.stack(values), *found)


def row_seeds(seed: int | Sequence[int] | np.ndarray | jax.Array | None, *, rows: int) -> np.ndarray:
    """Seeds of the rows, [rows] uint32; an int s means s, s+1, ...; None takes s from the system's entropy.

    Raises:
        ValueError: not ints, a number of them other than `rows`, or one outside 0..2**32-1.
    """
    if seed is None:
        seed = secrets.randbelow(_SEEDS - rows)
    if isinstance(seed, jax.Array):
        seed = np.asarray(seed)
    if isinstance(seed, Sequence | np.ndarray) and np.shape(seed) == (rows,):
        seeds = [check_seed(value) for value in seed]
    elif isinstance(seed, Sequence | np.ndarray) and np.ndim(seed):
        raise ValueError(f"seed has the shape {np.shape(seed)} for {rows} rows: give one int, or one for each row")
    else:
        first = check_seed(seed)
        seeds = [check_seed(first + row) for row in range(rows)]
    return np.asarray(seeds, np.uint32)


def check_seed(value: object) -> int:
    """The value as an int; a ValueError unless it is one in 0..2^32 - 1."""
    try:
        number = -1 if isinstance(value, bool | np.bool_) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < _SEEDS:
        raise ValueError(f"seed={value!r} is not an int in 0..{_SEEDS - 1}: give one of those")
    return number
