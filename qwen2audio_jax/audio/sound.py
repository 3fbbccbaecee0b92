"""Types shared by the decoders: decoded sound, and a seekable file."""

import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from qwen2audio_jax.audio.errors import AudioError


@dataclass(frozen=True)
class Sound:
    """Decoded sound.

    Attributes:
        samples: [n] float32, the mean over the channels.
        rate: samples a second.
        missing: why the file is known to hold less than it says, for messages; None where nothing says so.
    """

    samples: np.ndarray
    rate: int
    missing: str | None = None


class Seekable:
    """A file for libsndfile and ffmpeg: invalid seeks in a damaged file do nothing.

    Python would raise, which cffi prints and swallows. There is no `name`, by whose suffix soundfile would choose.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.tell, self.read = file.tell, file.read
        self.readinto = file.readinto  # type: ignore[attr-defined]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, or stay where the target lies before the file."""
        try:
            return self.file.seek(offset, whence)
        except (ValueError, OSError, OverflowError):
            return self.file.tell()


def check_rate(name: str, rate: int, sampling_rate: int | None) -> None:
    """AudioError "rate" where the caller stated another rate than the file does."""
    if sampling_rate is not None and sampling_rate != rate:
        raise AudioError(
            f"{name} has {rate} samples a second by its header and {sampling_rate} by sampling_rate=: leave "
            "sampling_rate away for files, whose own rate is used",
            kind="rate",
        )


def mean(channels: np.ndarray) -> np.ndarray:
    """Mix [channels, n] down to [n], as `librosa.to_mono` does."""
    return channels[0].copy() if len(channels) == 1 else np.mean(channels, axis=0)
