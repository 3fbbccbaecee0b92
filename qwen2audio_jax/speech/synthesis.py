"""Synthetic clips: digits with pauses and truncated words, sums, tones and noise, at 16 kHz."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE as RATE
from qwen2audio_jax.speech.espeak import speak
from qwen2audio_jax.speech.voices import Sex, draw_voice

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOW_HZ, HIGH_HZ = 130.0, 175.0
SUM_PHRASES = ("what is {} plus {}", "what's {} plus {}", "how much is {} plus {}", "{} plus {}")


@dataclass(frozen=True)
class Clip:
    """A synthesised clip.

    Attributes:
        samples: [n] float32 at 16 kHz, within -1..1.
        pitch_hz: median fundamental frequency before noise was added; 0 where nothing is voiced.
        meta: how it was made.
    """

    samples: np.ndarray
    pitch_hz: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)


def draw_digits(rng: np.random.Generator, most: int = 8) -> list[int]:
    """1 to `most` digits, each equally likely."""
    return [int(d) for d in rng.integers(0, 10, rng.integers(1, most + 1))]


def digits_clip(rng: np.random.Generator, digits: list[int], *, unseen: bool, sex: Sex | None = None) -> Clip:
    """Speak `digits`, sometimes with pauses, and with an extra truncated word at one end.

    `sex` "low" or "high" takes a voice of clearly low or high measured pitch.
    """
    while True:
        how = draw_voice(rng, unseen=unseen, sex=sex)
        groups = _groups(rng, digits)
        spoken = [speak(" ".join(WORDS[d] for d in group), **how) for group in groups]
        hz = fundamental(np.concatenate(spoken))
        if sex is None or (0 < hz < LOW_HZ if sex == "low" else hz > HIGH_HZ):
            break
    pieces = [spoken[0]]
    for piece in spoken[1:]:
        pieces += [_silence(rng, 0.1, 0.6), piece]
    cut = rng.random()
    if cut < 0.12:
        word = speak(WORDS[rng.integers(10)], **how)
        kept = int(len(word) * rng.uniform(0.1, 0.35))
        gap = _silence(rng, 0.04, 0.3)
        pieces = [word[-kept:], gap, *pieces] if cut < 0.06 else [*pieces, gap, word[:kept]]
    long = rng.random() < 0.01
    if cut >= 0.06:
        pieces.insert(0, _silence(rng, 0, 5 if long else _edge(rng)))
    if not 0.06 <= cut < 0.12:
        pieces.append(_silence(rng, 0, 5 if long else _edge(rng)))
    return finish(rng, np.concatenate(pieces), hz=hz, meta={"kind": "digits", **how})


def sum_clip(rng: np.random.Generator, a: int, b: int, *, unseen: bool) -> Clip:
    """Ask for the sum of two digits."""
    how = draw_voice(rng, unseen=unseen)
    text = SUM_PHRASES[rng.integers(len(SUM_PHRASES))].format(WORDS[a], WORDS[b])
    spoken = speak(text, **how)
    samples = np.concatenate([_silence(rng, 0, _edge(rng)), spoken, _silence(rng, 0, _edge(rng))])
    return finish(rng, samples, hz=fundamental(spoken), meta={"kind": "sum", "text": text, **how})


def tone_clip(rng: np.random.Generator) -> Clip:
    """One to three beeps of one frequency, pure or with harmonics."""
    hz = float(np.exp(rng.uniform(np.log(150), np.log(3000))))
    harmonics = 10 ** (-rng.uniform(0.2, 1.5) * np.arange(rng.integers(1, 6)))
    pieces = []
    for _ in range(rng.integers(1, 4)):
        t = np.arange(int(rng.uniform(0.15, 0.9) * RATE)) / RATE
        wave = sum(a * np.sin(2 * np.pi * hz * (k + 1) * t) for k, a in enumerate(harmonics) if hz * (k + 1) < 7500)
        pieces += [_fade(wave, rng.uniform(0.005, 0.08)) * np.exp(-t * rng.uniform(0, 3)), _silence(rng, 0.05, 0.3)]
    samples = np.concatenate([_silence(rng, 0, 0.5), *pieces[: -1 if rng.random() < 0.5 else None]])
    return finish(rng, samples, meta={"kind": "tone", "hz": round(hz, 1)})


def noise_clip(rng: np.random.Generator) -> Clip:
    """One to three bursts of white, pink or brown noise."""
    color, pieces = int(rng.integers(3)), []
    for _ in range(rng.integers(1, 4)):
        burst = noise(rng, int(rng.uniform(0.2, 0.9) * RATE), color)
        pieces += [_fade(burst, rng.uniform(0.005, 0.08)), _silence(rng, 0.05, 0.3)]
    samples = np.concatenate([_silence(rng, 0, 0.5), *pieces[: -1 if rng.random() < 0.5 else None]])
    return finish(rng, samples, meta={"kind": "noise", "color": ("white", "pink", "brown")[color]})


def empty_clip(rng: np.random.Generator) -> Clip:
    """Silence or faint noise."""
    samples = np.zeros(int(rng.uniform(0.3, 10.0 if rng.random() < 0.1 else 2.0) * RATE), np.float32)
    if rng.random() < 0.7:
        samples += 10 ** (rng.uniform(-70, -35) / 20) * noise(rng, len(samples), int(rng.integers(3)))
    return Clip(samples, meta={"kind": "empty"})


def finish(rng: np.random.Generator, samples: np.ndarray, *, hz: float = 0.0, meta: dict[str, Any]) -> Clip:
    """Set the level (peak -30..0 dBFS), and for every second clip add noise (8..40 dB below the sound)."""
    samples = samples.astype(np.float32) / np.abs(samples).max()
    if rng.random() < 0.5:
        power = np.mean(np.square(samples[np.abs(samples) > 0.02]))
        snr = rng.uniform(8, 40)
        samples = samples + np.sqrt(power * 10 ** (-snr / 10)) * noise(rng, len(samples), int(rng.integers(3)))
        meta = {**meta, "snr_db": round(float(snr), 1)}
    level = 10 ** (rng.uniform(-30, 0) / 20)
    return Clip((samples * (level / np.abs(samples).max())).astype(np.float32), round(hz, 1), meta)


def noise(rng: np.random.Generator, n: int, color: int) -> np.ndarray:
    """Noise [n] float32 of mean square 1, whose power falls with frequency to the power of `color` (0 is white)."""
    spectrum = np.fft.rfft(rng.standard_normal(n).astype(np.float32))
    spectrum /= np.maximum(np.arange(len(spectrum)) * (RATE / max(n, 1)), 30.0) ** (color / 2)
    values = np.fft.irfft(spectrum, n)
    return (values / np.sqrt(np.mean(np.square(values)))).astype(np.float32)


def fundamental(samples: np.ndarray) -> float:
    """Median fundamental frequency in Hz of clean speech (60..400 Hz), by autocorrelation; 0 if none is found.

    A multiple of a short period may fit whole samples better than the period: of a high voice the result can be a
    fraction of the frequency, never more than it. So a high result is a high voice, and a low one needs a low variant.
    """
    size = 800
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 2] if len(samples) >= size else None
    if frames is None:
        return 0.0
    energy = np.mean(np.square(frames), axis=1)
    frames = frames[energy > 0.2 * energy.max()]
    window = np.hanning(size).astype(np.float32)
    correlation = np.fft.irfft(np.abs(np.fft.rfft((frames - frames.mean(1, keepdims=True)) * window, 2 * size)) ** 2)
    shape = np.fft.irfft(np.abs(np.fft.rfft(window, 2 * size)) ** 2)
    correlation = correlation / correlation[:, :1] / (shape / shape[0])
    low, high = RATE // 400, RATE // 60
    lags = correlation[:, low:high].argmax(1) + low
    voiced = correlation[np.arange(len(lags)), lags] > 0.5
    return float(np.median(RATE / lags[voiced])) if voiced.sum() >= 3 else 0.0


def _groups(rng: np.random.Generator, digits: list[int]) -> list[list[int]]:
    """Split digits at random positions for pauses; a third of the strings are not split."""
    share = rng.choice([0.0, 0.2, 0.5])
    groups = [[digits[0]]]
    for digit in digits[1:]:
        if rng.random() < share:
            groups.append([digit])
        else:
            groups[-1].append(digit)
    return groups


def _edge(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.3 else 0.3


def _silence(rng: np.random.Generator, least: float, most: float) -> np.ndarray:
    return np.zeros(int(rng.uniform(least, most) * RATE), np.float32)


def _fade(samples: np.ndarray, seconds: float) -> np.ndarray:
    n = max(1, min(int(seconds * RATE), len(samples) // 2))
    ramp = np.ones(len(samples))
    ramp[:n], ramp[-n:] = np.linspace(0, 1, n), np.linspace(1, 0, n)
    return samples * ramp
