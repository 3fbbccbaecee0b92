"""Shape buckets that programs are compiled for: every count is padded up to the next bucket.

Padding never changes a result (rows are left-aligned, masked and independent); it only bounds the number of compiled
programs.
"""

from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig
from qwen2audio_jax.parallel.process_rows import data_indices_per_group
from qwen2audio_jax.parallel.sharding import round_up

FRAMES = (100, 200, 300, 500, 800, 1000, 1500, 2000, 3000)
"""Mel frames (10 ms each) of an encoder call."""

TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
"""Prompt tokens of a prefill, and positions of a cache."""

SMALLEST_ROWS = 2
"""One row alone takes a matrix-vector path that is many times slower in bfloat16 on CPUs; two rows do not."""


def _bucket(count: int, sizes: tuple[int, ...], *, limit: int) -> int:
    return min((size for size in (*sizes, limit) if count <= size <= limit), default=count)


def padded_frames(frames: int, *, config: Qwen2AudioEncoderConfig) -> int:
    """Padded frames for clips of at most `frames` valid ones, exact: even, with two frames of silence after each."""
    limit = config.max_frames
    return _bucket(min(frames + 2, limit), FRAMES, limit=limit)


def padded_tokens(tokens: int, *, config: Qwen2AudioConfig) -> int:
    """Width of a prefill of at most `tokens` tokens a row."""
    return _bucket(tokens, TOKENS, limit=config.text_config.max_position_embeddings)


def padded_capacity(tokens: int, *, config: Qwen2AudioConfig) -> int:
    """Positions of a cache whose longest row holds `tokens`; never more than the model's."""
    return _bucket(tokens, TOKENS, limit=config.text_config.max_position_embeddings)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def padded_row_count(rows: int, *, mesh: Mesh) -> int:
    """Rows of a process's batch: a power of two, at least `SMALLEST_ROWS`, divisible over its part of `data`."""
    return round_up(max(_power_of_two(rows), SMALLEST_ROWS), data_indices_per_group(mesh))


def padded_clip_count(clips: int, *, mesh: Mesh) -> int:
    """Clips of a process's encoder call: a power of two, divisible by the number of its devices."""
    return round_up(_power_of_two(clips), data_indices_per_group(mesh) * mesh.shape["model"])
