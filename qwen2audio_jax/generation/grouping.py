"""Grouping: which prompts are prefilled together, and which clips are encoded together.

A call of the model computes a rectangle: as many positions in every row as in its longest one. Rows of similar length
therefore share a call, and rows of different lengths do not, unless the padding costs less than another call would.
Pure Python on the host; what the sizes are and how they are padded is the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STARTING = 32
"""What starting a call costs, in positions of the model that it computes."""


@dataclass(frozen=True)
class Group:
    """Rows that are computed in one call.

    Attributes:
        members: their indices, ascending.
        count: rows of the call, those that pad it included.
        width: positions of each.
    """

    members: tuple[int, ...]
    count: int
    width: int


def plan_groups(widths: Sequence[int], *, counts: Sequence[int], reading: int) -> list[Group]:
    """The cheapest partition of rows into calls.

    A call of `count` rows takes the longer of two times, and `STARTING` positions for its start. One is what its
    devices compute, count / counts[0] x width positions; the other that of reading the weights once, `reading`
    positions. Of a weight of two bytes a position makes two FLOPs, so that reading it takes as long as computing so
    many positions as the device makes FLOPs while it reads a byte: some 200 to 250 on accelerators (an H200: 989
    TFLOP/s by 4.8 TB/s; a TPU v5e: 197 by 0.82), some 10 to 25 on CPUs.

    The rows are taken in order of width, so that every group is a range of them: exchanging two rows between groups
    never makes either narrower. A dynamic programme over the ranges finds the minimum; among equal ones the fewest
    calls.

    Args:
        widths: positions of each row, padded as they will be computed.
        counts: rows that a call may have, ascending; the first is the number of parts that rows are split over, and
            divides the others.
        reading: see above.

    Returns:
        The groups by ascending width; every row is in one.
    """
    order = sorted(range(len(widths)), key=lambda row: widths[row])
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # cost, calls, and the last call's rows, for so many rows
    for end in range(1, len(order) + 1):
        width = widths[order[end - 1]]
        choices = []
        for rows in range(1, min(end, counts[-1]) + 1):
            count = next(count for count in counts if count >= rows)
            before = best[end - rows]
            cost = max(count // counts[0] * width, reading) + STARTING
            choices.append((before[0] + cost, before[1] + 1, rows))
        best.append(min(choices))
    groups, end = [], len(order)
    while end:
        rows = best[end][2]
        members = order[end - rows : end]
        count = next(count for count in counts if count >= rows)
        groups.append(Group(tuple(sorted(members)), count, widths[members[-1]]))
        end -= rows
    return groups[::-1]
