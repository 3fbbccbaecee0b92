"""Sequence lengths of a clip: mel frames to encoder steps and audio tokens, for the processor and the encoder.

All functions work on Python ints, numpy arrays and traced JAX arrays alike.
"""

from typing import TypeVar

Count = TypeVar("Count")


def conv_length(frames: Count) -> Count:
    """Valid steps after the two convolutions (the second has stride 2), for `frames` valid mel frames (>= 1)."""
    return (frames - 1) // 2 + 1  # type: ignore


def token_count(frames: Count) -> Count:
    """Audio tokens of a clip with `frames` valid mel frames; 0 for 1 or 2 frames.

    Source: `Qwen2AudioEncoder._get_feat_extract_output_lengths`: the convolutions halve, then the pooling halves.
    """
    return (conv_length(frames) - 2) // 2 + 1  # type: ignore
