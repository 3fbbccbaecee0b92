"""Audio loading: `load_audio`, the single entry point for clips from any source."""

import io
import math
import os
import stat
import warnings
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import numpy as np

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.clip import SAMPLING_RATE, check_clip, check_finite, to_samples
from qwen2audio_jax.audio.data_url import BLANK, decode_data_url, looks_like_base64
from qwen2audio_jax.audio.decode import decode
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.formats import sniff
from qwen2audio_jax.audio.objects import unwrap
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
    if isinstance(source, str) and is_url(source):
        name, file = open_url(source, limits=limits, allow_private=allow_private_urls)
    elif isinstance(source, str | PathLike):
        name, file = open_path(source, limits=limits)
    elif isinstance(source, bytes | bytearray | memoryview):
        name, file = f"the sound in {len(source)} bytes", io.BytesIO(source)
        check_size(name, len(source), limits)
    elif hasattr(source, "read"):
        name, file = open_stream(source, limits=limits)
    else:
        return LoadedClip(from_array(source, sampling_rate=sampling_rate, truncation=truncation, limits=limits))
    with file:
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise AudioError(f"{name} is empty (0 bytes): pass a file that holds sound", kind="empty")
        sound = decode(
            file,
            sniff(file, size=size, name=name),
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


def is_url(source: str) -> bool:
    """Return True if a string is a URL rather than a path, with or without blanks around it."""
    source = source[:64].lstrip(BLANK)
    return "://" in source[:32] or source[:5].lower() == "data:"


def shorten(text: str, limit: int = 200) -> str:
    """A text for a message, its middle elided if it is long."""
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 4 :]}"


def open_url(url: str, *, limits: Limits, allow_private: bool) -> tuple[str, BinaryIO]:
    """The content of an http(s) or data: URL, and its name for messages."""
    # Imported here: local files need none of it.
    from qwen2audio_jax.audio.fetch import describe_url, fetch

    url = url.strip(BLANK)
    if url[:5].lower() == "data:":
        return "the sound in a data: URL", io.BytesIO(decode_data_url(url, limits=limits))
    return describe_url(url), io.BytesIO(fetch(url, limits=limits, allow_private=allow_private))


def open_path(path: str | PathLike[str], *, limits: Limits) -> tuple[str, BinaryIO]:
    """An existing regular file, opened, and its name for messages."""
    name = f"'{shorten(os.fspath(path))}'"
    try:
        # A file of this very name comes first: names may begin with ~.
        place = path if os.path.lexists(path) else os.path.expanduser(path)
        found = os.stat(place)
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            # Opening a pipe may wait for ever, so only those who know it is one open it.
            remedy = "a sound file in it" if stat.S_ISDIR(found.st_mode) else "open(path, 'rb') instead of the path"
            raise AudioError(f"{name} is {kind}, no regular file: pass {remedy}", kind="missing")
        check_size(name, found.st_size, limits)
        return name, open(place, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no path"
        remedy = "check the path"
        if looks_like_base64(os.fsdecode(path)):
            remedy = "if it is base64 of a sound, write 'data:;base64,' in front of it"
        raise AudioError(f"{name} cannot be opened ({reason}): {remedy}", kind="missing") from None


def open_stream(stream: Any, *, limits: Limits) -> tuple[str, BinaryIO]:
    """The rest of a file object, read up to the limit, and its name for messages."""
    title = getattr(stream, "name", None)
    name = f"'{shorten(title)}'" if isinstance(title, str) else "the file object"
    pieces, total = [], 0
    if isinstance(stream, io.TextIOBase):
        raise AudioError(f"{name} is open as text: open it in binary mode ('rb')", kind="dtype")
    while True:
        piece = stream.read(1 << 20)
        if hasattr(piece, "__await__"):
            piece.close()
            raise AudioError(f"{name} is read asynchronously: pass its bytes, as in await file.read()", kind="dtype")
        if isinstance(piece, np.ndarray):
            raise AudioError(
                f"{name} is an open {type(stream).__name__} that gives samples, not bytes: pass the file's path, or "
                "load_audio(file.read(), sampling_rate=file.samplerate)",
                kind="dtype",
            )
        if not isinstance(piece, bytes | bytearray):
            raise AudioError(
                f"{name} gives {type(piece).__name__}, not bytes: open it in binary mode ('rb')", kind="dtype"
            )
        if not piece:
            break
        pieces.append(piece)
        total += len(piece)
        check_size(name, total, limits)
    return name, io.BytesIO(b"".join(pieces))


def check_size(name: str, size: int, limits: Limits) -> None:
    """AudioError "too_large" for more bytes than a file may have."""
    if size > limits.file_bytes:
        raise AudioError(
            f"{name} has {size} bytes or more, and {limits.file_bytes} are read at most: split it, or compress it",
            kind="too_large",
        )


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
