"""Listed shapes that programs are compiled for: every count is padded up to the next listed one.

Padding never changes a result (rows are left-aligned, masked and independent); it only bounds the number of compiled
programs.
"""

from collections.abc import Sequence

from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig
from qwen2audio_jax.generation.grouping import Group, plan_groups
from qwen2audio_jax.model.cache_pieces import PIECE
from qwen2audio_jax.model.lengths import conv_length
from qwen2audio_jax.parallel.process_rows import Sizes, data_indices_per_group, share_of
from qwen2audio_jax.parallel.sharding import round_up

FRAMES = (*range(22, 203, 20), 252, *range(302, 3000, 100), 3000)
"""Mel frames (10 ms each) of an encoder call: every 0.2 s up to 2 s, 2.5 s, then whole seconds, each and two silent
frames."""

TOKENS = (
    *(16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832),
    *(896, 960, 1024, 1152, 1280, 1408, 1536, 1792, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
)
"""Prompt tokens of a prefill: at most a quarter more than the one before from 32 on."""

CAPACITIES = (*range(128, 1025, 128), 1280, 1536, 1792, 2048, 2560, 3072, 4096, 6144, 8192)
"""Positions of a cache, multiples of `PIECE`. Each compiles its own decoding step, the program that takes longest to
compile."""

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Rows of a batch; beyond them multiples of 32."""

FEW_ROWS = (1, 4, 16)
"""Rows that an engine's step may have besides those of all slots, where they are at most half as many."""

GROUPS = (1, 2, 4, 8, 16, 32)
"""Rows of a prefill and clips of an encoder call, times the parts that these are split over: see `grouping`."""

READING = {"cpu": 24}
READING_ELSEWHERE = 256
"""Positions that take as long as reading the weights, by platform: see `grouping.plan_groups`."""


def _padded(count: int, sizes: tuple[int, ...], *, limit: int) -> int:
    return min((size for size in (*sizes, limit) if count <= size <= limit), default=count)


def padded_frames(frames: int, *, config: Qwen2AudioEncoderConfig) -> int:
    """Frames to encode clips of at most `frames` valid ones in, exactly: even, with two of silence after each clip."""
    limit = config.max_frames
    return _padded(min(frames + 2, limit), FRAMES, limit=limit)


def padded_tokens(tokens: int, *, config: Qwen2AudioConfig) -> int:
    """Width of a prefill of at most `tokens` tokens a row."""
    return _padded(tokens, TOKENS, limit=config.text_config.max_position_embeddings)


def padded_capacity(tokens: int, *, config: Qwen2AudioConfig) -> int:
    """Positions of a cache whose longest row will hold `tokens`: as many as the model has at most, in whole pieces."""
    return round_up(_padded(tokens, CAPACITIES, limit=config.text_config.max_position_embeddings), PIECE)


def listed_capacities(tokens: int, *, config: Qwen2AudioConfig) -> list[int]:
    """All capacities of caches whose rows hold at most `tokens`, ascending."""
    return sorted({padded_capacity(each, config=config) for each in range(1, tokens + 1)})


def padded_row_count(rows: int, *, mesh: Mesh, dtype: str) -> int:
    """Rows of a process's batch, divisible over its part of `data`.

    One row alone is computed as one in float32 on CPUs. In half precision there a matrix-vector product is many times
    slower than one of two rows; elsewhere one row has not been measured.
    """
    alone = dtype == "float32" and isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    listed = next((size for size in ROWS if size >= rows), round_up(rows, 32))
    return round_up(max(listed, 1 if alone else 2), data_indices_per_group(mesh))


def step_rows(slots: int, *, mesh: Mesh, dtype: str) -> tuple[int, ...]:
    """Rows that an engine's step may have, ascending: the last are all slots."""
    rows = padded_row_count(slots, mesh=mesh, dtype=dtype)
    few = {padded_row_count(count, mesh=mesh, dtype=dtype) for count in FEW_ROWS}
    return (*sorted(count for count in few if 2 * count <= rows), rows)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def padded_clip_count(clips: int, *, mesh: Mesh) -> int:
    """Clips of a process's encoder call: a power of two, divisible by the number of its devices."""
    return round_up(_power_of_two(clips), data_indices_per_group(mesh) * mesh.shape["model"])


def prompt_groups(
    lengths: Sequence[int], *, config: Qwen2AudioConfig, mesh: Mesh, sizes: Sizes | None = None
) -> list[Group]:
    """How prompts of so many tokens are prefilled; over several processes in one call, whose `sizes` are agreed."""
    if not share_of(mesh).alone:
        assert sizes is not None
        rows = padded_row_count(sizes.rows, mesh=mesh, dtype=config.dtype)
        return [Group(tuple(range(len(lengths))), rows, padded_tokens(sizes.tokens, config=config))]
    widths = [padded_tokens(int(length), config=config) for length in lengths]
    return plan_groups(widths, counts=prompt_counts(len(widths), mesh=mesh), reading=reading_positions(mesh))


def prefill_rows(rows: int, *, mesh: Mesh) -> int:
    """The most rows of one prefill of a batch of `rows` (padded) rows of equal length."""
    return max(count for count in prompt_counts(rows, mesh=mesh) if count <= rows)


def prompt_counts(rows: int, *, mesh: Mesh) -> tuple[int, ...]:
    """Rows that a prefill of at most `rows` prompts may have."""
    return _counts(data_indices_per_group(mesh), most=rows)


def clip_counts(clips: int, *, mesh: Mesh) -> tuple[int, ...]:
    """Clips that an encoder call for at most `clips` may have."""
    return _counts(mesh.size, most=clips)


def clip_groups(frames: Sequence[int], *, config: Qwen2AudioEncoderConfig, mesh: Mesh) -> list[Group]:
    """How clips of so many valid frames are encoded, in one process; widths are frames."""
    padded = [padded_frames(int(count), config=config) for count in frames]
    # The encoder computes a position for two frames.
    positions = [conv_length(count) for count in padded]
    groups = plan_groups(positions, counts=clip_counts(len(padded), mesh=mesh), reading=reading_positions(mesh))
    return [Group(group.members, group.count, max(padded[clip] for clip in group.members)) for group in groups]


def _counts(parts: int, *, most: int) -> tuple[int, ...]:
    """The listed sizes up to the first one that is enough."""
    enough = next((count for count in GROUPS if parts * count >= most), GROUPS[-1])
    return tuple(parts * count for count in GROUPS if count <= enough)


def reading_positions(mesh: Mesh) -> int:
    """Positions of a device that take as long as reading the weights."""
    return READING.get(mesh.devices.flat[0].platform, READING_ELSEWHERE)
