"""Epoch planning: examples to rows and steps, a function of lengths alone, so that all processes agree.

Examples are shuffled per epoch, grouped by the mel frames that their longest clip is padded to, packed into rows, and
the rows gathered into steps. Rows that do not fill a step move to the group of longer clips; every example occurs
exactly once, so the last step of an epoch may have empty rows.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen2audio_jax.train.settings import DataSettings

WINDOW_STEPS = 16
"""Number of steps packed together: with fewer, rows are emptier; with more, they are less varied."""
ABOUT_EQUAL = 32
"""Examples whose lengths differ by less than this share of a row are shuffled between epochs."""
PATIENCE = 8
"""Rows tried for an example with several clips before a new row is started."""

WIDTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
"""Tokens of a row that holds one example: fewer than in generation, as a training step takes longer to compile."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of N examples; a pair of answers to one prompt counts as one.

    Attributes:
        tokens: [N] int, all sequences together.
        clips: [N] int.
        frames: [N] int, mel frames of the longest clip; 0 without clips.
    """

    tokens: np.ndarray
    clips: np.ndarray
    frames: np.ndarray


@dataclass(frozen=True)
class Step:
    """One global batch.

    Attributes:
        rows: indices of the examples of each row.
        frames: L, mel frames that clips are padded to.
        tokens: T, width of the rows.
        clips: C, clip slots of a row.
    """

    rows: tuple[tuple[int, ...], ...]
    frames: int
    tokens: int
    clips: int


def frame_buckets(settings: DataSettings, *, limit: int) -> tuple[int, ...]:
    """The mel frames that clips are padded to, ascending: the settings' values, capped at the encoder's maximum.

    Args:
        settings: `frames` is read.
        limit: maximum of frames that the encoder takes; replaces anything above it.
    """
    return tuple(sorted({min(frames, limit) for frames in settings.frames}))


def longest_clip(buckets: Sequence[int], *, limit: int) -> int:
    """Maximum frames of a clip that fits: two frames of silence must follow, except at the encoder's own maximum."""
    return buckets[-1] if buckets[-1] == limit else buckets[-1] - 2


def bucket_of(frames: np.ndarray, *, buckets: Sequence[int]) -> np.ndarray:
    """Index of each example's bucket in `buckets`; [N] int."""
    # A clip as long as the last bucket belongs there, with or without silence after it.
    return np.minimum(np.searchsorted(buckets, frames + 2), len(buckets) - 1)


def plan_epoch(
    lengths: Lengths,
    settings: DataSettings,
    *,
    buckets: Sequence[int],
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> list[Step]:
    """The steps of an epoch.

    Args:
        lengths: within the settings' limits.
        settings: `rows`, `max_tokens`, `max_clips`, `packing` and `short_first` are read.
        buckets: see `frame_buckets`.
        seed: of the run.
        epoch: from 0; the first `short_first` ones go from short to long, except for what is left over at the end.
        shuffle: False keeps the order of the data within a bucket, as needed for evaluation, and goes from short to
            long too.

    Returns:
        Steps of `rows` rows; a pure function of the arguments.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths.tokens)) if shuffle else np.arange(len(lengths.tokens))
    places = bucket_of(lengths.frames, buckets=buckets)[order]
    steps: list[Step] = []
    carried: list[int] = []
    for place in range(len(buckets)):
        group = [*carried, *order[places == place].tolist()]
        last = place == len(buckets) - 1
        rows = _rows(group, lengths, settings)
        whole = len(rows) if last else len(rows) // settings.rows * settings.rows
        if not last:
            # The emptiest rows are deferred: with the next group's examples they can be packed better.
            rows.sort(key=lambda row: -int(lengths.tokens[list(row)].sum()))
        carried = [example for row in rows[whole:] for example in row]
        rows = _mix(rows[:whole], lengths, settings, buckets=buckets, rng=rng if shuffle else None)
        steps += [
            _step(rows[i : i + settings.rows], lengths, settings, buckets=buckets)
            for i in range(0, whole, settings.rows)
        ]
    if shuffle and epoch >= settings.short_first:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    else:
        steps.sort(key=lambda step: step.frames)
    # The step with empty rows, which may be a short one, must remain the epoch's last.
    steps.sort(key=lambda step: not all(step.rows))
    return steps


def _mix(
    rows: list[tuple[int, ...]],
    lengths: Lengths,
    settings: DataSettings,
    *,
    buckets: Sequence[int],
    rng: np.random.Generator | None,
) -> list[tuple[int, ...]]:
    """Order the rows into the sequence of steps."""
    if rng is not None:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    if not settings.packing:
        # One example per row: neighbours of similar length, from a window, need little padding.
        window = WINDOW_STEPS * settings.rows
        windows = [rows[i : i + window] for i in range(0, len(rows), window)]
        rows = [row for part in windows for row in sorted(part, key=lambda row: -int(lengths.tokens[row[0]]))]
    # Rows that were carried over from a group of shorter clips stay together.
    longest = np.array([lengths.frames[list(row)].max() for row in rows], np.int64)
    return [rows[i] for i in np.argsort(bucket_of(longest, buckets=buckets), kind="stable")]


def _step(rows: Sequence[tuple[int, ...]], lengths: Lengths, settings: DataSettings, *, buckets: Sequence[int]) -> Step:
    examples = [example for row in rows for example in row]
    longest = int(lengths.frames[examples].max(initial=0))
    frames = buckets[int(bucket_of(np.array([longest]), buckets=buckets)[0])]
    tokens, clips = settings.max_tokens, settings.max_clips
    if not settings.packing:
        widest = int(lengths.tokens[examples].max(initial=1))
        tokens = min((size for size in WIDTHS if size >= widest), default=tokens)
        tokens = min(tokens, settings.max_tokens)
        most = int(lengths.clips[examples].max(initial=1))
        clips = min(1 << max(most - 1, 0).bit_length(), settings.max_clips)
    empty: tuple[tuple[int, ...], ...] = ((),) * (settings.rows - len(rows))
    return Step((*rows, *empty), frames, tokens, clips)


def _rows(examples: Sequence[int], lengths: Lengths, settings: DataSettings) -> list[tuple[int, ...]]:
    if not settings.packing:
        return [(example,) for example in examples]
    rows: list[tuple[int, ...]] = []
    window: list[int] = []
    tokens = clips = 0
    for example in examples:
        window.append(example)
        tokens += int(lengths.tokens[example])
        clips += int(lengths.clips[example])
        if max(tokens / settings.max_tokens, clips / settings.max_clips) >= WINDOW_STEPS * settings.rows:
            rows += _pack(window, lengths, settings)
            window, tokens, clips = [], 0, 0
    return rows + _pack(window, lengths, settings)


def _pack(examples: Sequence[int], lengths: Lengths, settings: DataSettings) -> list[tuple[int, ...]]:
    """Pack examples into rows, longest first and each into the emptiest row, so that rows are about equally full.

    Filling rows one after the other would use up the examples that fit well and leave poorly filled rows.
    """
    tokens = {example: int(lengths.tokens[example]) for example in examples}
    clips = {example: int(lengths.clips[example]) for example in examples}
    least = max(-(-sum(tokens.values()) // settings.max_tokens), -(-sum(clips.values()) // settings.max_clips), 1)
    rows: list[list[int]] = [[] for _ in range(least)]
    taken = [0] * least
    used = [0] * least
    heap = [(0, row) for row in range(least)]
    about = max(settings.max_tokens // ABOUT_EQUAL, 1)
    for example in sorted(examples, key=lambda example: -(tokens[example] // about)):
        tried: list[tuple[int, int]] = []
        while heap and len(tried) < PATIENCE:
            entry = heapq.heappop(heap)
            row = entry[1]
            if used[row] + clips[example] <= settings.max_clips:
                tried.append(entry)
                break
            if used[row] < settings.max_clips:  # a full row is done
                tried.append(entry)
        row = tried[-1][1] if tried else -1
        fits = (
            row >= 0
            and used[row] + clips[example] <= settings.max_clips
            and taken[row] + tokens[example] <= settings.max_tokens
        )
        if fits:
            tried.pop()
        else:
            row = len(rows)
            rows.append([])
            taken.append(0)
            used.append(0)
        for entry in tried:
            heapq.heappush(heap, entry)
        rows[row].append(example)
        taken[row] += tokens[example]
        used[row] += clips[example]
        heapq.heappush(heap, (taken[row], row))
    return [tuple(row) for row in rows if row]
