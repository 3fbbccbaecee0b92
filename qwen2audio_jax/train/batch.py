"""Training batch of one optimiser step: rows of packed examples and their clips."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

Array = Any
"""A `jax.Array` or `np.ndarray`."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "targets", "segments", "positions", "slots", "features", "frames"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainBatch:
    """Rows of width T, each with room for C clips of L mel frames; W = L // 4 audio vectors per clip.

    A row holds one or more examples, packed from the left, and then padding. Rows are independent of each other, so
    that they can be split freely over devices and micro-batches.

    Attributes:
        ids: [R, T] int32 token ids; 0 on padding.
        targets: [R, T] int32, the token that follows each position in its example if the loss counts it, else -100.
        segments: [R, T] int32, index of the position's example in its row, from 1; 0 on padding. For DPO the examples
            come in pairs: 2i + 1 is chosen, 2i + 2 the rejected answer to the same prompt, whose clips it shares.
        positions: [R, T] int32, position within the example, from 0.
        slots: [R, T] int32, for each audio position the index into the row's audio vectors as [C * W, D]; else -1.
        features: [R, C, M, L] float32 log-mel; after a clip the log-mel of silence, zeros where there is no clip.
        frames: [R, C] int32, valid frames of each clip; 0 where there is none.
    """

    ids: Array
    targets: Array
    segments: Array
    positions: Array
    slots: Array
    features: Array
    frames: Array
