"""Speech synthesis with the espeak-ng library: text to samples."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import soxr

from qwen2audio_jax.audio.clip import SAMPLING_RATE

_LIBRARY = "libespeak-ng.so.1"
_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

_pieces: list[bytes] = []


@_CALLBACK
def _collect(samples, count, events):
    if samples and count > 0:
        _pieces.append(ctypes.string_at(samples, 2 * count))
    return 0


@cache
def _engine() -> tuple[ctypes.CDLL, int]:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as e:
        raise ValueError(
            f"{_LIBRARY} cannot be loaded ({e}); speech is synthesised with it. Install the Debian package: "
            f"apt-get install libespeak-ng1 espeak-ng-data"
        ) from e
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, None, _DONT_EXIT)
    if rate <= 0:
        raise ValueError("espeak-ng finds no data; install the Debian package espeak-ng-data")
    library.espeak_SetSynthCallback(_collect)
    return library, rate


def version() -> str:
    """espeak-ng's version, such as "1.51".

    Raises:
        ValueError: espeak-ng is missing.
    """
    return _info()[0]


def variants() -> set[str]:
    """The names of this espeak-ng's voice variants.

    Raises:
        ValueError: espeak-ng is missing.
    """
    return {file.name for file in Path(_info()[1], "voices", "!v").iterdir()}


def _info() -> tuple[str, str]:
    """Version and data folder."""
    library, _ = _engine()
    library.espeak_Info.restype = ctypes.c_char_p
    folder = ctypes.c_char_p()
    number = library.espeak_Info(ctypes.byref(folder))
    return number.decode(), (folder.value or b"").decode()


def speak(text: str, *, voice: str, rate: int, pitch: int, range: int) -> np.ndarray:
    """Speak one utterance, without the silence around it.

    espeak-ng's breath and flutter keep state between calls: samples are reproducible only by the same calls in a new
    process.

    Args:
        text: English.
        voice: an accent and a variant of espeak-ng, such as "en-US+f2"; it ignores a variant that it does not have.
        rate: words a minute.
        pitch: 0..99.
        range: of the pitch, 0..99.

    Returns:
        samples [n] float32 at 16 kHz, largest magnitude 1.

    Raises:
        ValueError: espeak-ng is missing, or has no such voice, or made no sound.
    """
    library, original_rate = _engine()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(
            f"espeak-ng has no voice {voice!r}; list them with `espeak-ng --voices=en` and --voices=variant"
        )
    for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, range)):
        library.espeak_SetParameter(parameter, int(value), 0)
    _pieces.clear()
    data = text.encode() + b"\0"
    status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, _UTF8, None, None)
    samples = np.frombuffer(b"".join(_pieces), np.int16).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max(initial=0))
    if status != 0 or not len(loud):
        raise ValueError(f"espeak-ng made no sound of {text!r} with voice {voice!r} (status {status})")
    samples = soxr.resample(samples[loud[0] : loud[-1] + 1], original_rate, SAMPLING_RATE)
    return samples / np.abs(samples).max()
