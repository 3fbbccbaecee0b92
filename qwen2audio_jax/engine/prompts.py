"""Prompts of waiting requests on the device: clips encoded, each content once, and put among the embedded tokens."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.engine.work import Work, side_by_side
from qwen2audio_jax.generation.encoding import Embedded, embed_group, hear
from qwen2audio_jax.generation.grouping import Group
from qwen2audio_jax.generation.inputs import CheckedInputs, TextRows
from qwen2audio_jax.generation.runtime import Runtime


class Prompts:
    """Encoder and embedding, with the audio vectors of the clips that were heard last; for several threads."""

    def __init__(self, runtime: Runtime, *, kept: int, together: int):
        """Args: the model's `runtime`; the vectors of how many clips are kept, and how many are encoded together."""
        self._runtime, self._kept, self._together = runtime, kept, together
        self._vectors: OrderedDict[bytes, jax.Array] = OrderedDict()
        self._lock = threading.Lock()
        self.encoded = 0
        self.reused = 0

    def hear(self, works: Sequence[Work], starts: Sequence[int]) -> dict[bytes, jax.Array]:
        """The audio vectors [max_tokens, D] of the clips that prompts have from `starts` on, by their content."""
        with self._lock:
            return self._hear(works, starts)

    def _hear(self, works: Sequence[Work], starts: Sequence[int]) -> dict[bytes, jax.Array]:
        wanted: dict[bytes, tuple[np.ndarray, int]] = {}
        for work, start in zip(works, starts, strict=True):
            if work.inputs is not None and work.inputs.clips is not None:
                clips, needed = work.inputs.clips, np.unique(work.inputs.slots[0][start:, 0])
                for clip in needed[needed >= 0]:
                    wanted[work.digests[clip]] = clips.features[clip], int(clips.frames[clip])
        found = {digest: self._vectors[digest] for digest in wanted if digest in self._vectors}
        new = [digest for digest in wanted if digest not in found]
        # Requests may have many clips each; more of them in one call would be shapes that no warm-up knows.
        for begin in range(0, len(new), self._together):
            part = new[begin : begin + self._together]
            own = [wanted[digest] for digest in part]
            width = max(features.shape[1] for features, _ in own)
            found |= zip(part, hear(self._runtime, side_by_side(own, width=width)), strict=True)
        self.encoded, self.reused = self.encoded + len(new), self.reused + len(wanted) - len(new)
        for digest in wanted:
            self._vectors[digest] = found[digest]
            self._vectors.move_to_end(digest)
        while len(self._vectors) > self._kept:
            self._vectors.popitem(last=False)
        return found

    def embed(
        self, works: Sequence[Work], starts: Sequence[int], heard: dict[bytes, jax.Array], *, count: int, width: int
    ) -> Embedded:
        """Embeddings [count, width, D] of the prompts from `starts` on."""
        ids, slots = [], []
        vectors: list[Any] = []  # None for a clip that the rest of its prompt does not have
        for work, start in zip(works, starts, strict=True):
            assert work.inputs is not None
            ids.append(work.inputs.rows.ids[0][start:])
            pairs = work.inputs.slots[0][start:].copy()
            pairs[pairs[:, 0] >= 0, 0] += len(vectors)
            slots.append(pairs)
            vectors += [heard.get(digest) for digest in work.digests]
        together = CheckedInputs(TextRows(ids, [], width), None, slots)
        group = Group(tuple(range(len(works))), count, width)
        return embed_group(self._runtime, together, vectors, group=group)
