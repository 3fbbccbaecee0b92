"""Scoring: log-likelihoods of given continuations of one prompt, whose keys and values are computed once."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.call import check_positions
from qwen2audio_jax.generation.decoding import LogitsError, logits_fault
from qwen2audio_jax.generation.inputs import check_inputs
from qwen2audio_jax.generation.memory import check_fits
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_row_count
from qwen2audio_jax.generation.prefix import CachedPrefix, copy_prefix, row_tokens
from qwen2audio_jax.generation.programs import ByRows, Product
from qwen2audio_jax.generation.run import prefill_prompts
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.kv_cache import KVCache
from qwen2audio_jax.parallel.process_rows import share_of, to_mesh

TOGETHER = 16
"""Most continuations that are computed at a time: the head gives logits at all their positions."""


def _product(params: Any, tokens: jax.Array, counts: jax.Array, cache: KVCache, *, cfg: Qwen2AudioConfig) -> Product:
    return Product(len(tokens) * (tokens.shape[1] - 1), cfg.dtype, tokens)


@partial(ByRows, product=_product, static_argnames="cfg", donate_argnames="cache")
def _score(
    params: Any, tokens: jax.Array, counts: jax.Array, cache: KVCache, *, cfg: Qwen2AudioConfig
) -> tuple[jax.Array, KVCache]:
    """The cache, which is donated, and log-probabilities [B, W - 1] of tokens [B, W] from the second on."""
    logits, cache = qwen2_audio.extend(params, tokens[:, :-1], cache, counts=counts, cfg=cfg)
    known = jax.nn.log_softmax(logits, axis=-1)  # what pads the vocabulary is -inf
    return jnp.take_along_axis(known, tokens[:, 1:, None], axis=-1)[..., 0], cache


def score_continuations(
    runtime: Runtime, inputs: Mapping[str, Any], continuations: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Log-probabilities of each continuation's tokens after a prompt.

    Args:
        runtime: the model's.
        inputs: one prompt, as the processor returns it.
        continuations: token ids of each, at least one.

    Returns:
        For each continuation [n] float32: log P(token i | prompt, tokens before i), in natural units.

    Raises:
        ValueError: inputs that do not fit, several prompts, an empty continuation, ids that the model does not have,
            too many positions, or a mesh over several processes.
        LogitsError: the model's logits are not numbers.
    """
    if not share_of(runtime.mesh).alone:
        raise ValueError("continuations are scored in one process, and this model's mesh spans several")
    config = runtime.config
    size = config.text_config.vocab_size
    for ids in continuations:
        if not len(ids) or not all(0 <= int(each) < size for each in ids):
            raise ValueError(f"a continuation has at least one token, and ids from 0 to {size - 1}; this is {ids!r}")
    names = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
    checked = check_inputs(*(inputs.get(name) for name in names), config=config)
    if len(checked.rows.ids) != 1:
        raise ValueError(f"continuations of one prompt are scored, and there are {len(checked.rows.ids)}")
    length, longest = len(checked.rows.ids[0]), max(map(len, continuations))
    check_positions(length, longest, config=config)
    capacity = padded_capacity(length + longest, config=config)
    prompted = prefill_prompts(runtime, checked, checked.sizes, capacity=capacity)
    held = CachedPrefix(row_tokens(checked)[0], prompted.cache)
    scores: list[np.ndarray] = []
    first = np.asarray(prompted.logits)[0].astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is no number is told below, by its place
        first = (first - np.logaddexp.reduce(first)).astype(np.float32)
    for begin in range(0, len(continuations), TOGETHER):
        part = continuations[begin : begin + TOGETHER]
        rest = _rest(runtime, held, part, length=length, capacity=capacity)
        for ids, row in zip(part, rest, strict=False):
            found = np.concatenate([first[[ids[0]]], row[: len(ids) - 1]])
            _check_numbers(found, number=len(scores), dtype=config.dtype)
            scores.append(found)
    return scores


def _check_numbers(found: np.ndarray, *, number: int, dtype: str) -> None:
    for place, value in enumerate(found):
        if fault := logits_fault(value, token=f"{place + 1} of continuation {number}", dtype=dtype):
            raise LogitsError(fault)


def _rest(
    runtime: Runtime, held: CachedPrefix, continuations: Sequence[Sequence[int]], *, length: int, capacity: int
) -> np.ndarray:
    """Log-probabilities [rows, W - 1] of the continuations' tokens from the second on."""
    mesh, config = runtime.mesh, runtime.config
    rows = padded_row_count(len(continuations), mesh=mesh, dtype=config.dtype)
    width = max(map(len, continuations))
    if width == 1:
        return np.zeros((rows, 0), np.float32)
    check_fits(config.text_config, rows=rows, capacity=capacity, dtype=np.dtype(runtime.cache_dtype), mesh=mesh)
    tokens, counts = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for row, ids in enumerate(continuations):
        tokens[row, : len(ids)] = ids
        counts[row] = max(len(ids) - 1, 1)
    with jax.set_mesh(mesh):
        cache = copy_prefix(held, np.full(rows, length, np.int32), capacity=capacity, mesh=mesh)
        placed = to_mesh(mesh, tokens, "batch", "token"), to_mesh(mesh, counts, "batch")
        found, _ = _score(runtime.decoder.params, *placed, cache, cfg=config)
    return np.asarray(found)
