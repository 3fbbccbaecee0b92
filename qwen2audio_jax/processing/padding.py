"""Padding of token id rows of different lengths into one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np

MODES = {True: "longest", "longest": "longest", False: "do_not_pad", None: "do_not_pad", "do_not_pad": "do_not_pad"}


def check_side(side: Any) -> None:
    """Raise a ValueError unless `side` is "left" or "right"."""
    if side not in ("left", "right"):
        raise ValueError(f'padding_side={side!r} is unknown; use "left" or "right"')


def pad_rows(
    rows: Sequence[np.ndarray],
    *,
    pad_id: int,
    padding: bool | str | None = True,
    padding_side: str = "left",
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, np.ndarray]:
    """Pad rows with `pad_id`.

    Args:
        rows: [T_i] int32 each.
        pad_id: the padding id.
        padding: True or "longest"; "max_length", to `max_length`; False or "do_not_pad", for rows of equal length.
        padding_side: "left" or "right".
        max_length: with "max_length", the length; a longer row is an error, rows are never truncated.
        pad_to_multiple_of: round the length up to a multiple of this.

    Returns:
        input_ids and attention_mask, [B, T] int32.

    Raises:
        ValueError: an option is unknown, or the rows do not fit it.
    """
    mode = "max_length" if padding == "max_length" else MODES.get(padding)
    if mode is None:
        raise ValueError(f'padding={padding!r} is unknown; use True ("longest"), "max_length" or False ("do_not_pad")')
    check_side(padding_side)
    for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of tokens, 1 or more")
    if mode == "max_length" and max_length is None:
        raise ValueError('padding="max_length" needs max_length=N; padding=True pads to the longest text')
    if mode != "max_length" and max_length is not None:
        raise ValueError(
            f'max_length={max_length} alone has no meaning, as texts are never cut: add padding="max_length", or '
            f"leave max_length out"
        )
    lengths = [len(row) for row in rows]
    length = max(lengths)
    if mode == "do_not_pad":
        if min(lengths) != length:
            raise ValueError(f"padding={padding!r}, but the texts have {lengths} tokens; arrays need padding=True")
        if pad_to_multiple_of is not None:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of} needs padding=True")
    if max_length is not None:
        if length > max_length:
            raise ValueError(
                f"text {lengths.index(length)} has {length} tokens, more than max_length={max_length}; texts are never "
                f"cut: shorten it or raise max_length"
            )
        length = max_length
    if pad_to_multiple_of is not None:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
