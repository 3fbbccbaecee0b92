"""The sampler's state of each row: what it has said, how much, and whether it has ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.parallel.sharding import constrain


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["seen", "ids", "length", "step", "seeds", "finished"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplerState:
    """The sampler's state of each row."""

    seen: jax.Array
    """[B, V] bool: ids of the row's prompt and its generated tokens, to which the repetition penalty applies."""
    ids: jax.Array
    """[B, P] int32: the same in their order, -1 behind them; P is the most positions that a row may have."""
    length: jax.Array
    """[B] int32: how many they are."""
    step: jax.Array
    """[B] int32: number of tokens the row has generated, its stop token included."""
    seeds: jax.Array
    """[B] uint32."""
    finished: jax.Array
    """[B] bool: the row has generated a stop token."""


def init_state(prompts: Sequence[np.ndarray], seeds: np.ndarray, *, vocab_size: int, positions: int) -> SamplerState:
    """The state before the first token, on the host.

    Padding on either side is not marked as seen, so it changes nothing. The reference also excludes padding on the left
    since it uses the mask (transformers 5); earlier releases penalised the padding id in the padded rows of a batch,
    and with it the end-of-text token, which has the same id.

    Args:
        prompts: the ids [T] of each prompt, without padding.
        seeds: [B] uint32, from `row_seeds`; rows beyond the prompts only pad the batch.
        vocab_size: V, the last dimension of the logits (padded, if those are).
        positions: P, the most that a prompt and its answer have.
    """
    rows = len(seeds)
    seen, ids, length = np.zeros((rows, vocab_size), bool), np.full((rows, positions), -1, np.int32), np.zeros(rows)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
        ids[row, : len(prompt)] = prompt
        length[row] = len(prompt)
    arrays: Any = {
        "seen": seen,
        "ids": ids,
        "length": length.astype(np.int32),
        "step": np.zeros(rows, np.int32),
        "seeds": np.asarray(seeds, np.uint32),
        "finished": np.zeros(rows, bool),
    }
    return SamplerState(**arrays)


def constrained(state: SamplerState) -> SamplerState:
    """The state with its sharding pinned.

    Otherwise the compiler shards the first step's state differently from later ones, and the step is compiled twice.
    """
    return SamplerState(
        seen=constrain(state.seen, "batch", "vocab"),
        ids=constrain(state.ids, "batch", None),
        length=constrain(state.length, "batch"),
        step=constrain(state.step, "batch"),
        seeds=constrain(state.seeds, "batch"),
        finished=constrain(state.finished, "batch"),
    )
