"""Streams of samples: sound of any length in blocks, so that memory does not grow with it.

Files are decoded by PyAV, block by block, and judged at their end as `decode` judges clips: what is damaged or shorter
than it says is the same error, after the blocks that could be heard.
"""

import warnings
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, BinaryIO

import numpy as np

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.clip import SAMPLING_RATE, check_finite, check_scale, to_samples
from qwen2audio_jax.audio.decode import SAMPLES, missing_bytes
from qwen2audio_jax.audio.decode_av import choose_track, codec_name, decoded
from qwen2audio_jax.audio.decode_av import opened as opened_container
from qwen2audio_jax.audio.errors import AudioError, read_faults, truncated
from qwen2audio_jax.audio.formats import Content
from qwen2audio_jax.audio.objects import unwrap
from qwen2audio_jax.audio.opening import open_sound
from qwen2audio_jax.audio.pcm import read_pcm
from qwen2audio_jax.audio.sound import Sound
from qwen2audio_jax.audio.walk import Walk, check_heard, find_missing, stated_seconds
from qwen2audio_jax.limits import LONG_LIMITS, Limits

BLOCK = SAMPLING_RATE
"""Samples of a block at 16 kHz: one second."""


def stream_audio(
    source: str | PathLike[str] | bytes | BinaryIO | Any,
    *,
    sampling_rate: int | None = None,
    allow_truncated: bool = False,
    track: int | None = None,
    limits: Limits = LONG_LIMITS,
    allow_private_urls: bool = False,
) -> Iterator[np.ndarray]:
    """Decode sound of any length, block by block.

    A path is read as it is decoded; what a URL or a file object holds is in memory, compressed as it is.

    Args:
        source: a path, an http(s) or data: URL, bytes, a binary file object, or an array [n] of floats, as for
            `load_audio`.
        sampling_rate: of an array (None: 16000).
        allow_truncated: hear a file that is provably shorter than it says, as far as it goes; a warning says so.
        track: number, from 0, of the audio track of a file that has several.
        limits: bounds on bytes, seconds, channels and rates.
        allow_private_urls: also fetch from addresses that are not public.

    Yields:
        blocks [16000] float32 at 16 kHz, one second each; the last one is shorter.

    Raises:
        AudioError: as `load_audio`, except that nothing is too long; at the first block, or where the fault is.
    """
    source, sampling_rate = unwrap(source, sampling_rate=sampling_rate, truncation=False, limits=limits)
    opened = open_sound(source, limits=limits, allow_private_urls=allow_private_urls)
    if opened is None:
        rate = SAMPLING_RATE if sampling_rate is None else int(sampling_rate)
        samples = to_samples(source)
        Budget(name="the sound", rate=rate, channels=1, limits=limits, truncation=True)
        yield from _checked(_at_16_khz([Sound(samples, rate)]), name="the sound", limits=limits)
        return
    name = opened.name
    with opened.file as file, read_faults(name):
        sounds = _decoded(file, opened.content, name=name, track=track, limits=limits, allow_truncated=allow_truncated)
        yield from _checked(_at_16_khz(sounds), name=name, limits=limits)


def _decoded(
    file: BinaryIO, content: Content, *, name: str, track: int | None, limits: Limits, allow_truncated: bool
) -> Iterator[Sound]:
    """The sound of a file, packet by packet, and the errors of its end."""
    walk, heard = Walk(), 0.0
    with opened_container(file, content, name=name) as container:
        stream = choose_track(container, name=name, track=track)
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        Budget(name=name, rate=rate, channels=channels, limits=limits, truncation=True)
        if codec_name(stream) in ("flac", "wavpack", "tta"):
            # Left alone, these decoders make noise of damage.
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        stated = stated_seconds(container, stream, content, limits=limits)
        for packet in container.demux(stream):
            if packet.size:
                walk.add(packet)
            for sound in decoded(packet, walk):
                heard += len(sound.samples) / sound.rate
                if heard > limits.decoded_seconds:
                    raise AudioError(
                        f"{name} lasts longer than the {limits.decoded_seconds:g} s that are heard at most: split it",
                        kind="too_large",
                    )
                yield sound
        check_heard(file, content, walk, stated=stated, heard=heard, name=name)
        missing = find_missing(file, content, walk, stated=stated, heard=heard)
    if content.format in SAMPLES:
        missing = missing_bytes(read_pcm(file, content, name=name))
    if heard == 0 and missing is None:
        raise AudioError(f"{name} is empty (0 samples): pass a file that holds sound", kind="empty")
    if missing is not None:
        if heard == 0 or not allow_truncated:
            raise truncated(name, missing, silent=heard == 0)
        warnings.warn(f"{name} is heard in part: {missing}", stacklevel=2)


def _at_16_khz(sounds: Iterable[Sound]) -> Iterator[np.ndarray]:
    """Samples at 16 kHz in blocks of any size; a file may change its rate on the way."""
    rate, resampler = SAMPLING_RATE, None
    for sound in sounds:
        if sound.rate != rate:
            if resampler is not None:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            rate, resampler = sound.rate, None
            if rate != SAMPLING_RATE:
                # Imported here: sound that is at 16 kHz already needs none of it.
                import soxr

                resampler = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
        yield sound.samples if resampler is None else resampler.resample_chunk(sound.samples)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _checked(pieces: Iterable[np.ndarray], *, name: str, limits: Limits) -> Iterator[np.ndarray]:
    """Blocks of `BLOCK` samples of pieces of any size, each of numbers within full scale."""
    for block in blocks_of(pieces, BLOCK):
        check_finite(block, name=name)
        check_scale(block, limits=limits, name=name)
        yield block


def blocks_of(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The samples of pieces of any size in blocks of `size`; the last one is shorter, and never empty."""
    waiting: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count >= size:
            whole = np.concatenate(waiting)
            for start in range(0, count - size + 1, size):
                yield whole[start : start + size]
            waiting = [whole[count - count % size :].copy()]
            count %= size
    if count:
        yield np.concatenate(waiting)
