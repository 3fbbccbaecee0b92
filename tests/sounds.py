"""Sound for tests: a seeded imitation of speech, and files of every accepted format that hold it."""

import io
from fractions import Fraction

import av
import numpy as np
import soundfile

# Name -> what soundfile is to write.
SOUNDFILE_KINDS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "wav24": {"format": "WAV", "subtype": "PCM_24"},
    "wavfloat": {"format": "WAV", "subtype": "FLOAT"},
    "wavulaw": {"format": "WAV", "subtype": "ULAW"},
    "wavalaw": {"format": "WAV", "subtype": "ALAW"},
    "wavex": {"format": "WAVEX", "subtype": "PCM_16"},
    "rf64": {"format": "RF64", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
}

# Name -> ffmpeg's container and codec.
AV_KINDS = {
    "m4a": ("ipod", "aac"),
    "mp4": ("mp4", "aac"),
    "m4aalac": ("ipod", "alac"),
    "webm": ("webm", "libopus"),
    "aac": ("adts", "aac"),
}


def speech(samples: int, *, rate: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Syllables of voiced harmonics under moving formants, with breath and noise: [samples] or [samples, channels]."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 10 * np.sin(2 * np.pi * 2.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = 500 + 250 * np.sin(2 * np.pi * 1.1 * time), 1500 + 600 * np.sin(2 * np.pi * 0.9 * time + 1)
    voice = np.zeros(samples)
    for harmonic in range(1, 40):
        hertz = harmonic * pitch
        weight = sum(np.exp(-(((hertz - formant) / 180) ** 2)) for formant in formants) + 0.1 / harmonic
        voice += np.where(hertz < 0.45 * rate, weight * np.sin(harmonic * phase), 0)
    syllables = np.clip(np.sin(2 * np.pi * 3.5 * time), 0, None) ** 0.5
    mono = (
        0.12 * voice * syllables + 0.02 * rng.normal(size=samples) * (1 - syllables) + 0.003 * rng.normal(size=samples)
    )
    if channels == 1:
        return mono.astype(np.float32)
    return np.stack([mono * (1 - 0.1 * c) + 0.002 * rng.normal(size=samples) for c in range(channels)], 1).astype(
        np.float32
    )


def encode(kind: str, samples: np.ndarray, rate: int) -> bytes:
    """The bytes of a file of one of the kinds above that holds [n] or [n, channels] samples."""
    if kind in SOUNDFILE_KINDS:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, **SOUNDFILE_KINDS[kind])
        return file.getvalue()
    container_format, codec = AV_KINDS[kind]
    return encode_av(container_format, codec, samples, rate)


class Pipe:
    """A file that can be written and not sought in, as a pipe is: writers leave placeholders in it."""

    def __init__(self):
        self.inner = io.BytesIO()
        self.write, self.getvalue = self.inner.write, self.inner.getvalue


def encode_av(
    container_format: str,
    codec: str,
    samples: np.ndarray,
    rate: int,
    *,
    tracks: int = 1,
    pipe: bool = False,
    options: dict[str, str] | None = None,
) -> bytes:
    """Bytes that ffmpeg writes for a container and codec; `tracks` copies of the sound."""
    file = Pipe() if pipe else io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(file, "w", format=container_format, options=options or {}) as container:
        streams = [container.add_stream(codec, rate=rate, layout=layout) for _ in range(tracks)]
        if codec.startswith("wma"):
            streams[0].bit_rate = 64_000  # it has no default
        for number, stream in enumerate(streams[1:], 1):
            stream.metadata["title"] = f"copy {number}"
        for stream in streams:
            pcm = (np.clip(samples.reshape(-1, channels), -1, 1) * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return file.getvalue()
