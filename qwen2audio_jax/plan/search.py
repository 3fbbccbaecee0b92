"""Search for the largest batch that fits: few sizes are listed, so each is tried by compiling it."""

from collections.abc import Callable
from dataclasses import dataclass

from jax.sharding import Mesh

from qwen2audio_jax.generation.padded_shapes import padded_row_count
from qwen2audio_jax.plan.request import MOST_ROWS
from qwen2audio_jax.plan.stages import Stage


@dataclass(frozen=True)
class Refusal:
    """The reason why a batch does not fit.

    Attributes:
        rows: of the batch.
        stage: the first of its stages that was found not to fit.
        needed: bytes on one chip, if known.
        reason: the compiler's message, or the arithmetic.
    """

    rows: int
    stage: Stage
    needed: int | None
    reason: str


@dataclass(frozen=True)
class Largest:
    """The largest batch.

    Attributes:
        rows: 0 if even the smallest does not fit.
        refusal: of the next listed size; None if that is beyond the maximum of a plan.
    """

    rows: int
    refusal: Refusal | None


def sizes_of(mesh: Mesh, *, dtype: str) -> list[int]:
    """The batch sizes that are tried on a mesh: powers of two where they divide, ascending."""
    sizes, rows = [], 1
    while rows <= MOST_ROWS:
        sizes.append(padded_row_count(rows, mesh=mesh, dtype=dtype))
        rows = 1 << sizes[-1].bit_length()
    return sizes


def largest_batch(
    attempt: Callable[[int], Refusal | None],
    *,
    sizes: list[int],
    resident: Callable[[int], int],
    limit: int,
    start: int,
) -> Largest:
    """Search the listed sizes for the largest batch that fits.

    A size whose weights and cache alone exceed the limit is assumed too large during the search; but that the size
    above the largest does not fit is always confirmed by `attempt`.

    The search moves up or down from the start one size at a time: sizes double, and the start is a good guess.

    Args:
        attempt: tries a batch of a number of rows; None if it fits.
        sizes: ascending.
        resident: bytes of weights and cache of a batch on one chip.
        limit: bytes that programs may use there.
        start: the first size to try; one of `sizes`.
    """
    tried: dict[int, Refusal | None] = {}

    def refused(rows: int) -> Refusal | None:
        if rows not in tried:
            tried[rows] = attempt(rows)
        return tried[rows]

    possible = [rows for rows in sizes if resident(rows) <= limit]
    low, high = -1, len(possible)  # possible[low] fits, possible[high] does not
    place = min(possible.index(start), high - 1) if start in possible else high - 1
    while high - low > 1:
        if refused(possible[place]) is None:
            low, place = place, place + 1
        else:
            high, place = place, place - 1
    rows = possible[low] if low >= 0 else 0
    above = [size for size in sizes if size > rows]
    return Largest(rows, refused(above[0]) if above else None)
