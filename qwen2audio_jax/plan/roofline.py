"""Roofline bounds: minimum times of a stage from the chips' rated FLOP/s, memory and link bandwidth."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen2audio_jax.plan.chips import Chip
from qwen2audio_jax.plan.program import Collective
from qwen2audio_jax.plan.work import Work

HOP_SECONDS = 1e-6
"""Latency in seconds of one hop between chips; "How to Scale Your Model", chapter on sharded matrices."""

ASSUMPTIONS = (
    "bf16 products at the chip's full rate, memory and links at their full bandwidth: a bound, not a prediction",
    "products and memory traffic overlap, communication overlaps with neither",
    f"exchanges run around one ring of the chips that take part, {HOP_SECONDS * 1e6:g} us a hop beside the bytes",
    "every batch is full, and all its rows run to the last new token; the host costs nothing",
    "a decode step reads every weight that it uses and the whole capacity of the cache once; activations are free",
)


@dataclass(frozen=True)
class Bound:
    """The minimum time of one run of a stage, in seconds, and of its parts."""

    compute: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        """The total time."""
        return max(self.compute, self.memory) + self.communication


def bound_of(work: Work, exchanges: Sequence[Collective], *, chip: Chip) -> Bound:
    """The bound of a stage's work and exchanges on a chip."""
    # Both ways around a ring the farthest chip is half of it away; a sum goes around twice.
    hops = sum(one.group / 2 * (2 if one.kind == "all-reduce" else 1) for one in exchanges)
    return Bound(
        compute=work.flops / chip.bf16_flops,
        memory=work.bytes / chip.hbm_bandwidth,
        communication=sum(one.sent for one in exchanges) / chip.link_bandwidth + hops * HOP_SECONDS,
    )
