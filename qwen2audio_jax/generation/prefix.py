"""Prefix reuse: the leading tokens of a prompt whose keys and values are already cached.

The match is found on the host, the cache is copied and extended on the device. Tokens are compared by the decoder's
input at their position: a text token by its id, an audio token by its clip (a hash of the features) and the index of
its vector. A common prefix of two sequences has the same keys and values in both, because the decoder is causal.
"""

import hashlib
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.inputs import CheckedInputs, ClipFeatures, TextRows
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_tokens
from qwen2audio_jax.model.kv_cache import KVCache, moved
from qwen2audio_jax.parallel.process_rows import to_mesh

_moved = partial(jax.jit, static_argnames="capacity")(moved)


@dataclass(frozen=True)
class CachedPrefix:
    """A sequence whose keys and values are in row 0 of a cache.

    Attributes:
        tokens: [T, 3] int64 of `row_tokens`; later positions of the cache are to be ignored.
        cache: with as many rows as one prompt is padded to.
        shared: whether another session has the same cache, so that no step may donate it.
    """

    tokens: np.ndarray
    cache: KVCache
    shared: bool = False

    @property
    def alive(self) -> bool:
        """False once the cache's buffers are gone: an interrupted step may have donated it without returning one."""
        return not any(array.is_deleted() for array in jax.tree.leaves(self.cache))


def text_tokens(ids: np.ndarray) -> np.ndarray:
    """Tokens [T, 3] int64 of text ids [T]: (id, 0, 0)."""
    tokens = np.zeros((len(ids), 3), np.int64)
    tokens[:, 0] = ids
    return tokens


def row_tokens(checked: CheckedInputs) -> list[np.ndarray]:
    """The tokens of each row in the form that prefixes are compared in.

    Returns:
        For each row [T, 3] int64: (id, 0, 0) of a text token, (-1 - vector, hash, hash) of an audio token.
    """
    digests = np.zeros((0, 2), np.int64) if checked.clips is None else clip_digests(checked.clips)
    rows = []
    for ids, pairs in zip(checked.rows.ids, checked.slots, strict=True):
        tokens, audio = text_tokens(ids), pairs[:, 0] >= 0
        tokens[audio, 0] = -1 - pairs[audio, 1]
        tokens[audio, 1:] = digests[pairs[audio, 0]]
        rows.append(tokens)
    return rows


def clip_digests(clips: ClipFeatures) -> np.ndarray:
    """128-bit hashes of clips, whatever they are padded to: [A, 2] int64."""
    found = []
    for frames, features in zip(clips.frames, clips.features, strict=True):
        digest = hashlib.blake2b(str((int(frames), len(features))).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(features[:, :frames]).data)
        found.append(np.frombuffer(digest.digest(), np.int64))
    return np.stack(found)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the longest common prefix of two sequences of `row_tokens`."""
    shortest = min(len(a), len(b))
    differ = (a[:shortest] != b[:shortest]).any(axis=1)
    return int(differ.argmax()) if differ.any() else shortest


@dataclass(frozen=True)
class Prefix:
    """The beginnings of prompts, in a cache that is ready to be extended.

    Attributes:
        cache: for the padded rows of the prompts.
        starts: [rows] int32, number of tokens of each row that are in it.
    """

    cache: KVCache
    starts: np.ndarray


@dataclass(frozen=True)
class Continuation:
    """The plan by which rows resume from a cached sequence.

    Attributes:
        starts: [rows] int32, number of tokens of each row taken from the cache; at least one of each is not.
        capacity: positions that the cache needs.
    """

    starts: np.ndarray
    capacity: int


def plan_continuation(
    rows: list[np.ndarray], held: CachedPrefix | None, *, capacity: int, config: Qwen2AudioConfig
) -> Continuation:
    """Plan the resumption of rows from the held sequence.

    Args:
        rows: the result of `row_tokens`.
        held: the held sequence; None if there is none.
        capacity: positions that the rows and their new tokens need.
        config: for the maximum of positions.
    """
    known = text_tokens(np.zeros(0, int)) if held is None else held.tokens
    starts = np.array([min(common_prefix_length(row, known), len(row) - 1) for row in rows], np.int32)
    width = padded_tokens(max(len(row) - start for row, start in zip(rows, starts, strict=True)), config=config)
    capacity = max(capacity, padded_capacity(int(starts.max()) + width, config=config))
    # The remaining tokens are padded to a listed width, and the padding needs positions too. Where the model has no
    # more of them, the rows resume earlier: the padding is replaced by tokens that are computed again.
    capacity = min(capacity, config.text_config.max_position_embeddings)
    return Continuation(np.minimum(starts, capacity - width).astype(np.int32), capacity)


def without_prefix(checked: CheckedInputs, starts: np.ndarray) -> CheckedInputs:
    """The prompts without the first `starts` [rows] tokens of each, and the clips of the remaining tokens.

    A row may begin within a clip, which is then encoded whole.
    """
    return _cut(checked, [slice(int(start), None) for start in starts])


def first_tokens(checked: CheckedInputs, length: int) -> CheckedInputs:
    """The first `length` tokens of the first prompt, as one prompt, and their clips."""
    return _cut(checked, [slice(length)])


def _cut(checked: CheckedInputs, parts: list[slice]) -> CheckedInputs:
    """Cut a slice out of each of the first prompts, with its clips."""
    rows = [row[part] for row, part in zip(checked.rows.ids, parts, strict=False)]
    columns = [row[part] for row, part in zip(checked.rows.columns, parts, strict=False)]
    slots = [row[part].copy() for row, part in zip(checked.slots, parts, strict=False)]
    text = TextRows(rows, columns, checked.rows.width)
    needed = np.unique(np.concatenate([pairs[pairs[:, 0] >= 0, 0] for pairs in slots]))
    if checked.clips is None or not len(needed):
        return CheckedInputs(text, None, slots)
    for pairs in slots:
        audio = pairs[:, 0] >= 0
        pairs[audio, 0] = np.searchsorted(needed, pairs[audio, 0])
    return CheckedInputs(text, ClipFeatures(checked.clips.features[needed], checked.clips.frames[needed]), slots)


def copy_prefix(held: CachedPrefix, starts: np.ndarray, *, capacity: int, mesh: Mesh) -> KVCache:
    """A new cache of `len(starts)` rows, each with the first `starts` positions of the held sequence, kept intact."""
    return copy_rows(held.cache, np.zeros(len(starts), np.int32), starts, capacity=capacity, mesh=mesh)


def copy_rows(cache: KVCache, sources: np.ndarray, starts: np.ndarray, *, capacity: int, mesh: Mesh) -> KVCache:
    """A new cache: row i has the first `starts[i]` positions of row `sources[i]` of the given one, kept intact."""
    return _moved(cache, to_mesh(mesh, sources, "batch"), to_mesh(mesh, starts, "batch"), capacity=capacity)
