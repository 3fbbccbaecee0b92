"""Input preparation: the reference's inputs checked, left-aligned, padded to listed shapes and placed on the mesh.

Host-side numpy only; invalid inputs are refused here, before anything is computed.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig, Qwen2AudioEncoderConfig
from qwen2audio_jax.generation.padded_shapes import padded_clip_count, padded_frames, padded_row_count, padded_tokens
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.parallel.process_rows import Sizes, global_rows, to_mesh


@dataclass(frozen=True)
class TextRows:
    """Prompts on the host.

    Attributes:
        ids: one int32 array a row, without its padding.
        columns: for each row, the input columns of its tokens (int64).
        width: width of the input, padding included.
    """

    ids: list[np.ndarray]
    columns: list[np.ndarray]
    width: int

    @property
    def lengths(self) -> np.ndarray:
        """[B] int32: tokens of each row."""
        return np.array([len(row) for row in self.ids], np.int32)


@dataclass(frozen=True)
class ClipFeatures:
    """Log-mel features on the host: features [A, M, max_frames] float32 and frames [A] int32."""

    features: np.ndarray
    frames: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[A] int32: audio tokens of each clip."""
        return np.asarray(token_count(self.frames), np.int32)

    @property
    def sizes(self) -> Sizes:
        """The sizes of its arrays."""
        return Sizes(clips=len(self.frames), frames=int(self.frames.max()))


def text_rows(input_ids: object, attention_mask: object | None, *, config: Qwen2AudioConfig) -> TextRows:
    """Check token ids and strip each row's padding, on either side.

    Args:
        input_ids: [B, T] (or [T]) integers in 0..vocab_size-1.
        attention_mask: [B, T] of 0 and 1, or None if there is no padding.
        config: for the vocabulary size.

    Raises:
        ValueError: another shape or type, an id outside the vocabulary, a row without tokens.
    """
    ids = np.atleast_2d(np.asarray(input_ids))
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise ValueError(f"input_ids has shape {ids.shape} and dtype {ids.dtype}; integers [batch, tokens] are needed")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.atleast_2d(np.asarray(attention_mask))
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, but input_ids has {ids.shape}: they must be equal")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask may hold only 0 (padding) and 1 (a token)")
    mask = mask.astype(bool)
    vocab = config.text_config.vocab_size
    wrong = np.argwhere(mask & ((ids < 0) | (ids >= vocab)))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, but the vocabulary has ids 0 to {vocab - 1}: "
            "was the prompt made with this checkpoint's processor?"
        )
    empty = np.flatnonzero(~mask.any(1))
    if len(empty):
        raise ValueError(f"row {empty[0]} has no tokens: attention_mask is 0 everywhere in it")
    columns = [np.flatnonzero(row) for row in mask]
    return TextRows(
        ids=[row[kept].astype(np.int32) for row, kept in zip(ids, columns, strict=True)],
        columns=columns,
        width=ids.shape[1],
    )


def check_contiguous(rows: TextRows) -> None:
    """Raise a `ValueError` if there is padding between a row's tokens."""
    for row, columns in enumerate(rows.columns):
        if columns[-1] - columns[0] + 1 != len(columns):
            raise ValueError(
                f"attention_mask of row {row} has a 0 between tokens, which leaves the positions after it unclear: "
                "0 may stand only before or after a row's tokens; take the masked tokens out"
            )


def label_rows(labels: object, rows: TextRows, *, config: Qwen2AudioConfig) -> np.ndarray:
    """Check labels: [B, T] int32, each an id of the vocabulary or `config.ignore_index`.

    Raises:
        ValueError: another shape or type, or another label.
    """
    array = np.atleast_2d(np.asarray(labels))
    shape, vocab = (len(rows.ids), rows.width), config.text_config.vocab_size
    if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels has shape {array.shape} and dtype {array.dtype}; integers {shape} are needed")
    wrong = array[(array != config.ignore_index) & ((array < 0) | (array >= vocab))]
    if wrong.size:
        raise ValueError(
            f"labels holds {wrong[0]}; only {config.ignore_index} (ignored) and 0 to {vocab - 1} are labels"
        )
    return array.astype(np.int32)


def check_clips(
    input_features: object, feature_attention_mask: object | None, *, config: Qwen2AudioEncoderConfig
) -> ClipFeatures:
    """Check log-mel features and count each clip's valid frames.

    Args:
        input_features: [A, M, max_frames] floats.
        feature_attention_mask: [A, max_frames] of 0 and 1, ones first. Required.
        config: for M and max_frames.

    Raises:
        ValueError: another shape, a mask with holes, a clip too short to give an audio token, NaN or Inf.
    """
    features = np.asarray(input_features)
    wanted = (config.num_mel_bins, config.max_frames)
    if features.ndim != 3 or features.shape[1:] != wanted or features.shape[0] == 0:
        raise ValueError(
            f"input_features has shape {features.shape}; this model takes (clips, {wanted[0]} mels, {wanted[1]} frames)"
            ": use this checkpoint's processor"
        )
    if feature_attention_mask is None:
        raise ValueError("input_features came without feature_attention_mask, which says where each clip ends")
    mask = np.asarray(feature_attention_mask)
    if mask.shape != (features.shape[0], wanted[1]):
        raise ValueError(
            f"feature_attention_mask has shape {mask.shape}, but ({features.shape[0]}, {wanted[1]}) is needed"
        )
    frames = mask.astype(bool).sum(1).astype(np.int32)
    for clip, count in enumerate(frames):
        if not mask[clip, :count].all() or not np.isin(mask[clip], (0, 1)).all():
            raise ValueError(f"feature_attention_mask of clip {clip} must be ones up to the clip's end, then zeros")
        if token_count(int(count)) < 1:
            raise ValueError(f"clip {clip} has {count} valid frames; at least 3 (over 20 ms) give an audio token")
    features = features.astype(np.float32, copy=False)
    finite = np.isfinite(features).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(f"input_features of clip {int(np.argmin(finite))} holds NaN or Inf: check its samples")
    return ClipFeatures(features, frames)


def audio_slots(rows: TextRows, clips: ClipFeatures | None, *, config: Qwen2AudioConfig) -> list[np.ndarray]:
    """Assignment of audio vectors to audio positions.

    Clips are assigned to rows in order: each row takes as many whole clips as its audio positions need.

    Returns:
        One int64 array [tokens, 2] a row: (clip, vector within the clip) for audio positions, (-1, -1) for text.

    Raises:
        ValueError: the positions and the vectors do not match, in total or within a row.
    """
    remedy = "each <|AUDIO|> must stand as often as its clip has vectors; the processor does this"
    counts = [] if clips is None else clips.tokens.tolist()
    positions = [np.flatnonzero(row == config.audio_token_index) for row in rows.ids]
    total = sum(len(row) for row in positions)
    if total != sum(counts):
        raise ValueError(
            f"the prompts hold {total} audio positions, but the {len(counts)} clips given have {sum(counts)} audio "
            f"vectors: {remedy}"
        )
    slots, clip = [], 0
    for index, (row, where) in enumerate(zip(rows.ids, positions, strict=True)):
        pairs = np.full((len(row), 2), -1, np.int64)
        filled = 0
        while filled < len(where):
            if filled + counts[clip] > len(where):
                raise ValueError(
                    f"row {index} has {len(where)} audio positions, which does not end where a clip ends (clip {clip} "
                    f"has {counts[clip]} vectors and {len(where) - filled} positions are left): {remedy}"
                )
            here = where[filled : filled + counts[clip]]
            pairs[here, 0], pairs[here, 1] = clip, np.arange(counts[clip])
            filled += counts[clip]
            clip += 1
        slots.append(pairs)
    return slots


@dataclass(frozen=True)
class CheckedInputs:
    """The checked inputs of a call.

    Attributes:
        rows: the prompts.
        clips: their clips; None for text alone.
        slots: the result of `audio_slots`.
    """

    rows: TextRows
    clips: ClipFeatures | None
    slots: list[np.ndarray]

    @property
    def sizes(self) -> Sizes:
        """The sizes of its arrays."""
        rows = Sizes(rows=len(self.rows.ids), tokens=int(self.rows.lengths.max()), width=self.rows.width)
        if self.clips is None:
            return rows
        return replace(rows, clips=self.clips.sizes.clips, frames=self.clips.sizes.frames)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All input arrays."""
        own = (self.rows.lengths, *self.rows.ids, *self.rows.columns)
        return own if self.clips is None else (*own, self.clips.frames, self.clips.features)


def check_inputs(
    input_ids: object,
    attention_mask: object | None,
    input_features: object | None,
    feature_attention_mask: object | None,
    *,
    config: Qwen2AudioConfig,
) -> CheckedInputs:
    """Check the inputs of `generate` and of the model's call.

    Raises:
        ValueError: as `text_rows`, `clips` and `audio_slots`.
    """
    rows = text_rows(input_ids, attention_mask, config=config)
    if input_features is None:
        if feature_attention_mask is not None:
            raise ValueError("feature_attention_mask came without input_features")
        clips = None
    else:
        clips = check_clips(input_features, feature_attention_mask, config=config.audio_config)
    return CheckedInputs(rows, clips, audio_slots(rows, clips, config=config))


def clips_to_mesh(
    clips: ClipFeatures | None, *, config: Qwen2AudioEncoderConfig, mesh: Mesh, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """Pad clips to listed shapes and place them: features [A, M, L] and frames [A] (0 for padding clips).

    Args:
        clips: this process's clips; None if only other processes have some.
        config: for M.
        mesh: the target devices.
        sizes: agreed between the processes.
    """
    length = padded_frames(sizes.frames, config=config)
    padded = padded_clip_count(sizes.clips, mesh=mesh)
    features = np.zeros((padded, config.num_mel_bins, length), np.float32)
    frames = np.zeros(padded, np.int32)
    if clips is not None:
        count = len(clips.frames)
        features[:count] = clips.features[:, :, :length]
        frames[:count] = clips.frames
    return to_mesh(mesh, features, "clip", "mels", "position"), to_mesh(mesh, frames, "clip")


@dataclass(frozen=True)
class PaddedPrompts:
    """Left-aligned prompts padded to listed shapes: ids and slots [B, T], lengths [B]; numpy int32.

    A padding row has one token, so that nothing in it is undefined.
    """

    ids: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray


def pad_prompts(
    checked: CheckedInputs, *, vectors: int, config: Qwen2AudioConfig, mesh: Mesh, sizes: Sizes
) -> PaddedPrompts:
    """Pad prompts to listed shapes.

    Args:
        checked: the prompts and their audio slots.
        vectors: W, the width of the encoder's output: audio vectors per clip.
        config: for the longest prompt.
        mesh: the row count must divide by its `data` axis.
        sizes: agreed between the processes.
    """
    lengths = checked.rows.lengths
    shape = (padded_row_count(sizes.rows, mesh=mesh, dtype=config.dtype), padded_tokens(sizes.tokens, config=config))
    ids, flat = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for index, (row, pairs) in enumerate(zip(checked.rows.ids, checked.slots, strict=True)):
        ids[index, : len(row)] = row
        clip = global_rows(mesh, np.maximum(pairs[:, 0], 0), size=padded_clip_count(sizes.clips, mesh=mesh))
        flat[index, : len(row)] = np.where(pairs[:, 0] >= 0, clip * vectors + pairs[:, 1], -1)
    padded = np.ones(shape[0], np.int32)
    padded[: len(lengths)] = lengths
    return PaddedPrompts(ids, padded, flat)
