"""int8 quantisation: symmetric, one float32 scale per channel of a weight (or token and head of the cache).

x ~ codes * scale. Only weights and cache are stored as int8; computation stays in the compute dtype: a product reads
the codes, converts each on its way into the dot, and is multiplied by the scales afterwards. So the large arrays are
read at one byte per number, and never copied to a wider dtype.

Quantised weights: every kernel of the decoder (a scale per output channel), its embedding (one per token), its head.
Norms, biases, encoder and projector stay as they are.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

INT8 = "int8"

_LARGEST = 127
_NOTHING = 1e-30
"""Channels without a larger magnitude are stored as zeros: the reciprocal of their scale would overflow."""

_CHANNELS = {"kernel": 1, "embedding": 0}
"""The channel axis of a weight, by its name."""


def channel_axis(parameter: str) -> int | None:
    """The channel axis of a parameter, by its path ("decoder/norm/scale"); None: it is not quantised."""
    part, _, rest = parameter.partition("/")
    return _CHANNELS.get(rest.rpartition("/")[2]) if part == "decoder" else None


def scale_name(parameter: str) -> str:
    """The path of an int8 parameter's scales, beside the parameter itself."""
    return f"{parameter.rpartition('/')[0]}/scale"


def quantize(x: Any, *, axis: int, xp: ModuleType = jnp) -> tuple[Any, Any]:
    """Quantise an array to codes and scales.

    Args:
        x: any shape and floating dtype; finite.
        axis: the axis that one scale spans.
        xp: `jax.numpy` or `numpy`: on the CPU both give the same bits.

    Returns:
        int8 codes of x's shape, in [-127, 127], and float32 scales without `axis`: the largest magnitude / 127, or 0
        for zeros. codes * scale differs from x by half a scale at most.
    """
    wide = x.astype(xp.float32)
    largest = xp.abs(wide).max(axis, keepdims=True)
    # Products with constants and reciprocals instead of divisions, which compilers would rewrite differently.
    scales = xp.where(largest > _NOTHING, largest * xp.float32(1 / _LARGEST), xp.float32(0))
    steps = xp.where(scales > 0, xp.float32(1) / xp.where(scales > 0, scales, xp.float32(1)), xp.float32(0))
    return xp.rint(wide * steps).astype(xp.int8), xp.squeeze(scales, axis)


def quantized_tree(
    tree: Mapping[str, Any], *, codes: Callable[[Any], Any], scales: Callable[[Any, int], Any]
) -> dict[str, Any]:
    """The tree of weight descriptions with int8 weights.

    Args:
        tree: nested dict of descriptions of weights: specs, or names of axes.
        codes: makes the description of a weight's codes.
        scales: makes the description of its scales, from the weight's description and the channel axis.
    """
    flat: dict[str, Any] = {}
    for name, leaf in flatten_dict(dict(tree), sep="/").items():
        axis = channel_axis(name)
        flat[name] = leaf if axis is None else codes(leaf)
        if axis is not None:
            flat[scale_name(name)] = scales(leaf, axis)
    return unflatten_dict(flat, sep="/")
