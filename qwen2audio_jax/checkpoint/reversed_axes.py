"""Arrays with all axes reversed: kernels as torch stores them, and as they are multiplied here."""

import numpy as np

_STRIP_ROWS = 16
"""Rows transposed at once: few enough that their cache lines stay in cache while the columns are written."""


def copy_reversed(rows: np.ndarray, out: np.ndarray) -> None:
    """Copy an array with all axes reversed into one of the reversed shape."""
    for first in range(0, len(rows), _STRIP_ROWS):
        strip = rows[first : first + _STRIP_ROWS]
        out[..., first : first + len(strip)] = strip.T


def reversed_axes(array: np.ndarray) -> np.ndarray:
    """A contiguous array with all axes reversed."""
    out = np.empty(array.shape[::-1], array.dtype)
    copy_reversed(array, out)
    return out
