"""Long recordings for tests: strings of spoken digits with pauses, and what holds no speech."""

import numpy as np

RATE = 16_000


def spoken(seconds: float, *, seed: int, pauses: tuple[float, float] = (0.7, 3.0), snr_db: float | None = 40.0):
    """A recording of strings of 1 to 8 digits: samples [n], and (start, end, digits) of each string."""
    from qwen2audio_jax.speech.espeak import speak
    from qwen2audio_jax.speech.synthesis import WORDS, draw_digits, noise
    from qwen2audio_jax.speech.tasks import spaced
    from qwen2audio_jax.speech.voices import draw_voice

    rng = np.random.default_rng(seed)
    pieces, strings, position = [], [], 0
    while True:
        pause = np.zeros(int(rng.uniform(*pauses) * RATE), np.float32)
        digits = draw_digits(rng)
        samples = speak(" ".join(WORDS[digit] for digit in digits), **draw_voice(rng, unseen=False))
        samples = (samples * 10 ** (rng.uniform(-20, -1) / 20)).astype(np.float32)
        if position + len(pause) + len(samples) > seconds * RATE:
            break
        start = position + len(pause)
        pieces += [pause, samples]
        position = start + len(samples)
        strings.append((start / RATE, position / RATE, spaced(digits)))
    pieces.append(np.zeros(round(seconds * RATE) - position, np.float32))
    whole = np.concatenate(pieces)
    if snr_db is not None:
        power = np.mean(np.square(whole[np.abs(whole) > 0.01]))
        whole = whole + np.sqrt(power * 10 ** (-snr_db / 10)) * noise(rng, len(whole), 0)
    return whole.astype(np.float32), strings


def unspoken(kind: str, seconds: float, *, seed: int = 0) -> np.ndarray:
    """Sound without speech [n] float32: silence, noise, bursts of noise, tones, steady tones, chirps or hum."""
    from qwen2audio_jax.speech.synthesis import noise

    rng = np.random.default_rng(seed)
    count = round(seconds * RATE)
    if kind == "silence":
        return np.zeros(count, np.float32)
    if kind == "noise":
        third = count // 3
        return np.concatenate(
            [0.1 * noise(rng, size, color) for color, size in enumerate((third, third, count - 2 * third))]
        )
    pieces, made = [], 0
    while made < count:
        length = int(rng.uniform(0.2, 3.0) * RATE)
        t = np.arange(length) / RATE
        low, high = np.exp(rng.uniform(np.log(120), np.log(4000), 2))
        level = 10 ** (rng.uniform(-30, -3) / 20)
        if kind == "bursts":
            piece = level * noise(rng, length, int(rng.integers(3))) / 3
        elif kind == "tones":
            piece = level * np.sin(2 * np.pi * low * t)
        elif kind == "harmonics":
            piece = level / 2 * sum(np.sin(2 * np.pi * low * k * t) / k for k in range(1, 6) if low * k < 7500)
        else:
            assert kind == "chirps", kind
            piece = level * np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * t[-1])))
        ramp = min(400, length // 2)
        piece[:ramp] *= np.linspace(0, 1, ramp)
        piece[-ramp:] *= np.linspace(1, 0, ramp)
        pause = np.zeros(int(rng.uniform(0.0, 2.0) * RATE))
        pieces += [piece, pause]
        made += length + len(pause)
    return np.concatenate(pieces)[:count].astype(np.float32)
