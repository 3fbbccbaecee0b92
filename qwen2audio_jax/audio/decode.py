"""Audio decoding: plain samples as they stand, mp3 and ogg as librosa hears them, everything else by `decode_av`.

Every decoder returns the mean over the channels at the file's own rate, and enforces the limits before and while
decoding.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.decode_av import decode_av, joined, survey
from qwen2audio_jax.audio.errors import corrupt, truncated
from qwen2audio_jax.audio.formats import SEARCHED, Content, recognise
from qwen2audio_jax.audio.pcm import Pcm, read_pcm
from qwen2audio_jax.audio.sound import Seekable, Sound, check_rate, mean
from qwen2audio_jax.limits import Limits

SAMPLES = ("wav", "w64", "aiff", "au", "caf")
"""Formats of files that hold plain samples, or may."""

LIBROSA = {"mp3": ("MP3", "MPEG"), "ogg": ("OGG",)}
"""Formats whose decoders differ in the last bits -> the names that soundfile, librosa's decoder, has for them."""

FLAC_START = b"fLaC\x00\x00\x00\x22"
"""The beginning of every FLAC file: its mark, and the header of its first block."""

MP3_TRIM = 4608
"""Maximum difference in samples between libsndfile's length of an MP3 and its blocks: four blocks."""

OGG_TRIM = 0.15
"""The same for Ogg, in seconds: a block of Vorbis or of Opus at both ends."""


def decode(
    file: BinaryIO,
    content: Content,
    *,
    name: str,
    limits: Limits,
    truncation: bool = False,
    allow_truncated: bool = False,
    sampling_rate: int | None = None,
    track: int | None = None,
) -> Sound:
    """Decode a seekable file whose format is known.

    Args:
        file: the file.
        content: its format and place.
        name: what messages call it.
        limits: bounds on rates, channels and samples.
        truncation: whether the beginning is enough where it is too long.
        allow_truncated: whether a file that is shorter than it says is heard as far as it goes.
        sampling_rate: the rate that the caller says it has.
        track: which of several tracks.

    Raises:
        AudioError: see there.
    """
    options: dict[str, Any] = {
        "name": name,
        "limits": limits,
        "truncation": truncation,
        "sampling_rate": sampling_rate,
    }
    sound, header = None, None
    if content.format in SAMPLES:
        header = read_pcm(file, content, name=name)
        if header.subtype is not None and not track:
            sound = decode_samples(file, content, header, **options)
    elif content.format in LIBROSA and not track:
        sound = decode_as_librosa(file, content, **options)
    elif content.format == "flac" and not track:
        sound = decode_flac_files(file, content, **options)
    if sound is None:
        sound = decode_av(file, content, track=track, **options)
        if header is not None:
            whole = len(sound.samples) > limits.clip_seconds * sound.rate
            sound = replace(sound, missing=None if whole else missing_bytes(header))
    silent = len(sound.samples) == 0
    if sound.missing is not None and (silent or not allow_truncated):
        raise truncated(name, sound.missing, silent=silent)
    return sound


def missing_bytes(header: Pcm) -> str | None:
    """What shows that a file holds fewer samples than it says; None where nothing does."""
    if header.stated is None or header.stated <= header.there:
        return None
    return f"its header states {header.stated} bytes of sound and {header.there} are there"


def decode_samples(
    file: BinaryIO,
    content: Content,
    header: Pcm,
    *,
    name: str,
    limits: Limits,
    truncation: bool,
    sampling_rate: int | None,
) -> Sound:
    """Decode plain samples; of files that stand one behind the other, all."""
    import soundfile

    check_rate(name, header.rate, sampling_rate)
    parts = list(files_in_a_row(file, content, header, name=name))
    pieces, frames = [], 0.0
    for part in parts:
        Budget(name=name, rate=part.rate, channels=part.channels, limits=limits, truncation=truncation)
        frames += part.there // part.frame_bytes * header.rate / part.rate
    budget = Budget(
        name=name,
        rate=header.rate,
        channels=max(part.channels for part in parts),
        limits=limits,
        truncation=truncation,
    )
    wanted = budget.frames_to_decode(round(frames))
    left = wanted
    for part in parts:
        count = min(part.there // part.frame_bytes, -(-left * part.rate // header.rate))
        file.seek(part.start)
        # The decoder gets the samples alone: headers are not read twice.
        samples, _ = soundfile.read(
            io.BytesIO(file.read(count * part.frame_bytes)),
            dtype="float32",
            always_2d=True,
            format="RAW",
            samplerate=part.rate,
            channels=part.channels,
            subtype=part.subtype,
            endian="LITTLE" if part.order == "<" else "BIG",
        )
        pieces.append((part.rate, mean(samples.T)))
        left -= round(count * header.rate / part.rate)
    missing = missing_bytes(parts[-1]) if wanted >= round(frames) else None
    return Sound(joined(pieces, header.rate), header.rate, missing)


def files_in_a_row(file: BinaryIO, content: Content, header: Pcm, *, name: str) -> Iterator[Pcm]:
    """The headers of a file and of those behind it: pieces of a recording or of speech are put together like that."""
    yield header
    while header.stated is not None and header.end + 8 < content.size:
        end = header.end
        file.seek(end)
        if recognise(file.read(512)) != content.format:
            return
        content = replace(content, start=end)
        header = read_pcm(file, content, name=name)
        if header.subtype is None:
            raise corrupt(name, f"at byte {end} another file of another coding begins")
        yield header


def decode_flac_files(
    file: BinaryIO, content: Content, *, name: str, limits: Limits, truncation: bool, sampling_rate: int | None
) -> Sound | None:
    """Decode FLAC files that stand one behind the other, each by itself, as ffmpeg loses blocks where they meet.

    None for a single file.
    """
    starts = [*find_all(file, FLAC_START, start=content.start), content.size]
    if len(starts) < 3:
        return None
    options: dict[str, Any] = {"name": name, "limits": limits, "truncation": truncation, "sampling_rate": sampling_rate}
    pieces, missing, total = [], None, 0.0
    for start, end in itertools.pairwise(starts):
        file.seek(start)
        part = io.BytesIO(file.read(end - start))
        sound = decode_av(part, Content("flac", 0, end - start), **options)
        pieces.append((sound.rate, sound.samples))
        missing, rate = missing or sound.missing, pieces[0][0]
        total += len(sound.samples) / sound.rate
        budget = Budget(name=name, rate=rate, channels=1, limits=limits, truncation=truncation)
        budget.check(round(total * rate), more=end < content.size)
        if total > limits.clip_seconds:
            break
    return Sound(joined(pieces, rate), rate, missing)


def find_all(file: BinaryIO, mark: bytes, *, start: int) -> Iterator[int]:
    """Where the mark stands in a file."""
    file.seek(start)
    tail, position = b"", start
    while piece := file.read(SEARCHED):
        data = tail + piece
        at = data.find(mark)
        while at >= 0:
            yield position - len(tail) + at
            at = data.find(mark, at + 1)
        tail, position = data[1 - len(mark) :], position + len(piece)


def decode_as_librosa(
    file: BinaryIO, content: Content, *, name: str, limits: Limits, truncation: bool, sampling_rate: int | None
) -> Sound | None:
    """Decode mp3 or ogg with the decoder that librosa uses; None for what it would not hear whole."""
    import soundfile

    walk = survey(file, content, name=name, limits=limits)
    if walk is None:
        return None
    file.seek(0)
    try:
        with soundfile.SoundFile(Seekable(file)) as sound:
            rate, frames = sound.samplerate, sound.frames
            trimmed = MP3_TRIM if content.format == "mp3" else OGG_TRIM * rate
            if sound.format not in LIBROSA[content.format] or abs(frames - walk.seconds * rate) > trimmed:
                return None
            check_rate(name, rate, sampling_rate)
            budget = Budget(name=name, rate=rate, channels=sound.channels, limits=limits, truncation=truncation)
            wanted = budget.frames_to_decode(frames)
            # In one read: soundfile seeks after each read, which changes the output of lossy codecs.
            samples = sound.read(frames=wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError:
        return None
    return Sound(mean(samples.T), rate) if len(samples) == wanted else None
