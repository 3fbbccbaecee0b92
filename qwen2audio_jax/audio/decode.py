"""Audio decoding: soundfile for wav, flac, mp3 and ogg; `decode_av` for the other formats.

Both decoders return the mean over the channels at the file's own rate, and enforce the limits before and while
decoding.
"""

from typing import BinaryIO

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.decode_av import decode_av
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.formats import SOUNDFILE_FORMATS, Content
from qwen2audio_jax.audio.headers import corrupt, read_header, truncated
from qwen2audio_jax.audio.sound import Seekable, Sound, check_rate, mean
from qwen2audio_jax.limits import Limits

FLAC_LOST_SYNC = 158
"""libsndfile's error where the next FLAC frame cannot be found: at the end of the bytes, one is missing."""

MP3_TRIM = 4608
"""Maximum difference in samples between libsndfile's length of an MP3 and its blocks: four blocks."""


def decode(
    file: BinaryIO, content: Content, *, name: str, limits: Limits, truncation: bool, sampling_rate: int | None
) -> Sound:
    """Decode a seekable file whose format is known; `sampling_rate` is the rate that the caller says it has."""
    decoder = decode_soundfile if content.format in SOUNDFILE_FORMATS else decode_av
    return decoder(file, content, name=name, limits=limits, truncation=truncation, sampling_rate=sampling_rate)


def decode_soundfile(
    file: BinaryIO, content: Content, *, name: str, limits: Limits, truncation: bool, sampling_rate: int | None
) -> Sound:
    """Decode wav, flac, mp3 or ogg."""
    import soundfile

    stated = read_header(file, content, name=name)
    if stated.rate is not None and stated.channels is not None:
        check_rate(name, stated.rate, sampling_rate)
        budget = Budget(name=name, rate=stated.rate, channels=stated.channels, limits=limits, truncation=truncation)
        if stated.frames is not None:
            budget.frames_to_decode(stated.frames)
    file.seek(0)
    reader = Seekable(file)
    try:
        with soundfile.SoundFile(reader) as sound:
            if sound.format not in SOUNDFILE_FORMATS[content.format]:
                raise corrupt(name, f"it starts as {content.format} and is read as {sound.format}")
            rate, channels, frames = sound.samplerate, sound.channels, sound.frames
            check_rate(name, rate, sampling_rate)
            budget = Budget(name=name, rate=rate, channels=channels, limits=limits, truncation=truncation)
            # libsndfile returns the largest integer for an unstated length.
            known = frames if 0 <= frames < 1 << 62 else None
            if stated.frames is not None and known != stated.frames:
                raise corrupt(name, f"its header states {stated.frames} frames and {frames} are read")
            if stated.counted is not None and abs(frames - stated.counted) > MP3_TRIM:
                raise AudioError(
                    f"{name} is an MP3 of variable bit rate that does not state its length: {frames} of its "
                    f"{stated.counted} samples would be heard. Write it anew, for example with "
                    "`ffmpeg -i INPUT -c copy OUTPUT.mp3`",
                    kind="format",
                )
            wanted = budget.frames_to_decode(known)
            if known is None:
                # soundfile seeks to where a read ended, which libFLAC cannot do in a stream of unknown length.
                sound.seekable = lambda: False
            # In one read: soundfile seeks after each read, which changes the output of lossy codecs.
            samples = sound.read(frames=wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        # Its message holds memory addresses of this process, so it is not passed on, neither here nor in a traceback.
        if reader.ended and getattr(error, "code", None) == FLAC_LOST_SYNC:
            raise truncated(name, "its bytes end before the frames that its header states") from None
        raise corrupt(name, f"its {content.format} content cannot be decoded ({error_code(error)})") from None
    if known is None:
        budget.check(len(samples), more=True)
    elif len(samples) < wanted - (MP3_TRIM if stated.counted is not None else 0):
        raise truncated(name, f"{len(samples)} frames can be decoded of the {known} that its header states")
    return Sound(mean(samples.T), rate)


def error_code(error: Exception) -> str:
    """The code of a libsndfile error, the only part of it that is safe to report."""
    return f"libsndfile error {getattr(error, 'code', 'unknown')}"
