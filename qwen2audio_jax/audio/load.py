"""Audio loading: `load_audio`, the single entry point for clips from any source."""

import math
import warnings
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import numpy as np

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.clip import SAMPLING_RATE, check_clip, check_finite, to_samples
from qwen2audio_jax.audio.decode import decode
from qwen2audio_jax.audio.errors import AudioError, read_faults
from qwen2audio_jax.audio.objects import unwrap
from qwen2audio_jax.audio.opening import open_sound
from qwen2audio_jax.audio.sound import Sound
from qwen2audio_jax.limits import LIMITS, Limits


@dataclass(frozen=True)
class LoadedClip:
    """A clip, and what is known to be missing of it.

    Attributes:
        samples: [n] float32 at 16 kHz.
        missing: what shows that the file holds less than it says, for messages; None where nothing does.
    """

    samples: np.ndarray
    missing: str | None = None


def load_audio(
    source: str | PathLike[str] | bytes | BinaryIO | Any,
    *,
    sampling_rate: int | None = None,
    truncation: bool = False,
    allow_truncated: bool = False,
    track: int | None = None,
    limits: Limits = LIMITS,
    allow_private_urls: bool = False,
) -> np.ndarray:
    """Load one clip from any source as mono samples at 16 kHz.

    The samples of a file are those of `librosa.load(source, sr=16000)`: the mean over the channels, resampled with
    soxr's high quality. They are the same for a path, bytes, a file object and a URL. The format is detected from the
    content, not from the name; `qwen2audio_jax.audio.formats.ACCEPTED` lists the formats. What ffmpeg plays is heard
    whole, whatever a header states of its length; what is provably shorter than it says is refused.

    Args:
        source: a path, an http(s) or data: URL, bytes, a binary file object (read from its current position), or an
            array [n] of floats: numpy, JAX, torch, a list. Objects that state their own rate are taken too: rows of
            `datasets` ({"array", "sampling_rate"}, {"bytes", "path"}), decoders of torchcodec, segments of pydub, and
            pairs (rate, samples) as scipy and Gradio give them.
        sampling_rate: samples per second of an array (None: 16000); for a file or such an object, the rate that it must
            state.
        truncation: keep the first `limits.clip_seconds` of a longer clip instead of refusing it. The rest is not
            decoded.
        allow_truncated: hear a file that is provably shorter than it says, as far as it goes, instead of refusing it; a
            warning says so.
        track: number, from 0, of the audio track that is meant in a file that has several.
        limits: bounds on bytes, seconds, channels, rates and samples, checked before the work that they bound.
        allow_private_urls: also fetch from addresses that are not public.

    Returns:
        samples [n] float32, `limits.min_clip_samples` <= n <= `limits.clip_seconds` * 16000.

    Raises:
        AudioError: the clip is invalid; see there for the kinds.
    """
    clip = load_clip(
        source,
        sampling_rate=sampling_rate,
        truncation=truncation,
        allow_truncated=allow_truncated,
        track=track,
        limits=limits,
        allow_private_urls=allow_private_urls,
    )
    if clip.missing is not None:
        warnings.warn(f"a clip is heard in part: {clip.missing}", stacklevel=2)
    return clip.samples


def load_clip(
    source: str | PathLike[str] | bytes | BinaryIO | Any,
    *,
    sampling_rate: int | None = None,
    truncation: bool = False,
    allow_truncated: bool = False,
    track: int | None = None,
    limits: Limits = LIMITS,
    allow_private_urls: bool = False,
) -> LoadedClip:
    """Load one clip as `load_audio` does, and say what is known to be missing of it.

    Args:
        source: as for `load_audio`; so are the other arguments.
        sampling_rate: see there.
        truncation: see there.
        allow_truncated: see there.
        track: see there.
        limits: see there.
        allow_private_urls: see there.

    Raises:
        AudioError: the clip is invalid.
    """
    if sampling_rate is not None and (isinstance(sampling_rate, bool) or int(sampling_rate) != sampling_rate):
        raise AudioError(f"sampling_rate={sampling_rate!r} is not a whole number of samples a second", kind="rate")
    if track is not None and (isinstance(track, bool) or not isinstance(track, int) or track < 0):
        raise AudioError(f"track={track!r} is no track: a whole number from 0", kind="format")
    source, sampling_rate = unwrap(source, sampling_rate=sampling_rate, truncation=truncation, limits=limits)
    opened = open_sound(source, limits=limits, allow_private_urls=allow_private_urls)
    if opened is None:
        return LoadedClip(from_array(source, sampling_rate=sampling_rate, truncation=truncation, limits=limits))
    name = opened.name
    with opened.file as file, read_faults(name):
        sound = decode(
            file,
            opened.content,
            name=name,
            limits=limits,
            truncation=truncation,
            allow_truncated=allow_truncated,
            sampling_rate=sampling_rate,
            track=track,
        )
    if len(sound.samples) == 0:
        raise AudioError(f"{name} is empty (0 samples): pass a file that holds sound", kind="empty")
    check_finite(sound.samples, name=name)
    samples = check_clip(resample(sound), limits=limits, truncation=truncation, name=name)
    return LoadedClip(samples, sound.missing)


def from_array(source: Any, *, sampling_rate: int | None, truncation: bool, limits: Limits) -> np.ndarray:
    """A clip from samples in memory, resampled where they have another rate than 16 kHz."""
    samples = to_samples(source)
    rate = SAMPLING_RATE if sampling_rate is None else int(sampling_rate)
    budget = Budget(name="the clip", rate=rate, channels=1, limits=limits, truncation=truncation)
    samples = samples[: budget.frames_to_decode(len(samples))]
    return check_clip(resample(Sound(samples, rate)), limits=limits, truncation=truncation)


def resample(sound: Sound) -> np.ndarray:
    """Samples at 16 kHz, as `librosa.load` resamples them: `librosa.resample` with `soxr_hq`, bit for bit."""
    if sound.rate == SAMPLING_RATE:
        return sound.samples
    # Imported here: sound that is at 16 kHz already needs none of it.
    import soxr

    samples = soxr.resample(sound.samples, sound.rate, SAMPLING_RATE, quality="HQ")
    # The resampler rounds the length to the nearest number of samples, librosa rounds it up.
    wanted = math.ceil(len(sound.samples) * (SAMPLING_RATE / sound.rate))
    return np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
