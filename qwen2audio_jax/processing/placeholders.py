"""Assignment of clips to texts: the processor's `audio` argument matched with the placeholders."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from qwen2audio_jax.audio import AudioError
from qwen2audio_jax.audio.objects import is_pair
from qwen2audio_jax.limits import LIMITS, Limits
from qwen2audio_jax.processing.conversation import ClipSource

T = TypeVar("T")

THREADS = 8
"""Most clips that are loaded at a time: each may take the memory of `LIMITS.decoded_bytes`."""


def assign_clips(
    audio: Any, *, texts: Sequence[str], counts: Sequence[int], audio_token: str, limits: Limits = LIMITS
) -> list[list[ClipSource]]:
    """The clips of each text.

    Args:
        audio: None, one clip, a flat list of clips in the order of the placeholders over all texts, or a list with a
            list of clips for each text.
        texts: the texts, quoted in error messages.
        counts: placeholders in each text.
        audio_token: the placeholder.
        limits: bound on the clips of a text.

    Raises:
        ValueError: the clips do not fit the placeholders; the message names the text.
    """
    if hasattr(audio, "shape") and len(audio.shape) > 1:
        raise ValueError(
            f"audio is one array of shape {list(audio.shape)}; pass one clip as [samples] (mixed down with "
            f"audio.mean(axis) where it has channels), several clips as a list of such arrays"
        )
    for i, count in enumerate(counts):
        if count > limits.clips_per_text:
            raise ValueError(
                f"text {i} ({_quote(texts[i])}) has {count} {audio_token} placeholders; the limit is "
                f"{limits.clips_per_text}"
            )
    if audio is None:
        nested: list[list[ClipSource]] = [[] for _ in texts]
    elif is_clip(audio):
        nested = _split([ClipSource("audio", audio)], texts, counts, audio_token)
    elif any(part is None for part in audio):
        raise ValueError("audio holds None; pass one list of clips for each text, [] for a text without any")
    elif any(_is_clip_list(part) for part in audio):
        for i, part in enumerate(audio):
            if not _is_clip_list(part):
                raise ValueError(
                    f"audio[{i}] is a clip but others are lists of clips; pass one list of clips for each text"
                )
        if len(audio) != len(texts):
            raise ValueError(
                f"audio has {len(audio)} lists of clips for {len(texts)} texts; pass one list for each text, [] for "
                "none"
            )
        nested = [[ClipSource(f"audio[{i}][{j}]", clip) for j, clip in enumerate(part)] for i, part in enumerate(audio)]
    else:
        nested = _split([ClipSource(f"audio[{i}]", clip) for i, clip in enumerate(audio)], texts, counts, audio_token)
    for i, (clips, count) in enumerate(zip(nested, counts, strict=True)):
        if len(clips) != count:
            raise ValueError(
                f"text {i} ({_quote(texts[i])}) has {count} {audio_token} placeholder{'s' * (count != 1)} but "
                f"{len(clips)} clip{'s' * (len(clips) != 1)} {'were' if len(clips) != 1 else 'was'} given; write "
                f"{audio_token} once for each clip"
            )
    return nested


def load_clips(clips: Sequence[ClipSource], load: Callable[[Any], T]) -> list[T]:
    """What `load` makes of the clips' sources, in order; several are loaded at a time.

    Decoding, resampling and log-mel release Python's lock, and a URL is mostly waited for. File objects are read one
    after another in the caller's thread: two clips may be the same one.

    Raises:
        AudioError: a clip cannot be used; the message begins with its position and the kind is `load_audio`'s. Of
            several such clips the first is named.
        ValueError: a clip has no source.
    """

    def load_one(clip: ClipSource) -> T:
        if clip.source is None:
            raise ValueError(
                f"{clip.where} names no sound; give its path, URL, bytes or samples under 'audio', or use "
                f"tokenize=False and pass the clips to the processor"
            )
        try:
            return load(clip.source)
        except AudioError as error:
            raise AudioError(f"{clip.where}: {error}", kind=error.kind) from error

    threads = min(len(clips), os.cpu_count() or 1, THREADS)
    if threads < 2 or any(hasattr(clip.source, "read") for clip in clips):
        return [load_one(clip) for clip in clips]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(load_one, clips))


def _split(
    clips: list[ClipSource], texts: Sequence[str], counts: Sequence[int], audio_token: str
) -> list[list[ClipSource]]:
    """Clips split in order over the texts, by the number of placeholders in each."""
    if len(texts) == 1:
        return [clips]
    if len(clips) != sum(counts):
        listing = ", ".join(f"text {i} ({_quote(text)}) {counts[i]}" for i, text in enumerate(texts[:20]))
        raise ValueError(
            f"{len(clips)} clip{'s' * (len(clips) != 1)} for {sum(counts)} {audio_token} placeholders: {listing}"
            f"{', ...' if len(texts) > 20 else ''}; write {audio_token} once for each clip"
        )
    rest = iter(clips)
    return [[next(rest) for _ in range(count)] for count in counts]


def is_clip(value: Any) -> bool:
    """Return True for one clip: no list or tuple, or one of plain numbers, or (samples, rate) or (rate, samples)."""
    if not isinstance(value, list | tuple) or is_pair(value):
        return True
    return len(value) > 0 and isinstance(value[-1], int | float | np.number)


def _is_clip_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not is_clip(value)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
