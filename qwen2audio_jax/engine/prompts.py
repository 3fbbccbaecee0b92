"""Prompts of waiting requests on the device: clips encoded, each content once, and put among the embedded tokens."""

from collections import OrderedDict
from collections.abc import Sequence

import jax
import numpy as np

from qwen2audio_jax.engine.work import Work
from qwen2audio_jax.generation.encoding import Embedded, embed_group, hear
from qwen2audio_jax.generation.grouping import Group
from qwen2audio_jax.generation.inputs import CheckedInputs, ClipFeatures, TextRows
from qwen2audio_jax.generation.runtime import Runtime


class Prompts:
    """Encoder and embedding, with the audio vectors of the clips that were heard last."""

    def __init__(self, runtime: Runtime, *, kept: int):
        """Args: the model's `runtime`; the vectors of how many clips are kept."""
        self._runtime, self._kept = runtime, kept
        self._vectors: OrderedDict[bytes, jax.Array] = OrderedDict()
        self.encoded = 0
        self.reused = 0

    def hear(self, works: Sequence[Work]) -> dict[bytes, jax.Array]:
        """The audio vectors [max_tokens, D] of all clips of some requests, by their content."""
        wanted: dict[bytes, tuple[np.ndarray, int]] = {}
        for work in works:
            if work.inputs is not None and work.inputs.clips is not None:
                clips = work.inputs.clips
                for digest, features, frames in zip(work.digests, clips.features, clips.frames, strict=True):
                    wanted[digest] = features, int(frames)
        found = {digest: self._vectors[digest] for digest in wanted if digest in self._vectors}
        new = {digest: clip for digest, clip in wanted.items() if digest not in found}
        if new:
            width = max(features.shape[1] for features, _ in new.values())
            stacked = np.zeros((len(new), len(next(iter(new.values()))[0]), width), np.float32)
            for row, (features, _) in zip(stacked, new.values(), strict=True):
                row[:, : features.shape[1]] = features
            frames = np.asarray([count for _, count in new.values()], np.int32)
            found |= zip(new, hear(self._runtime, ClipFeatures(stacked, frames)), strict=True)
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
        vectors: list[jax.Array] = []
        for work, start in zip(works, starts, strict=True):
            assert work.inputs is not None
            ids.append(work.inputs.rows.ids[0][start:])
            pairs = work.inputs.slots[0][start:].copy()
            pairs[pairs[:, 0] >= 0, 0] += len(vectors)
            slots.append(pairs)
            vectors += [heard[digest] for digest in work.digests]
        together = CheckedInputs(TextRows(ids, [], width), None, slots)
        group = Group(tuple(range(len(works))), count, width)
        return embed_group(self._runtime, together, vectors, group=group)
