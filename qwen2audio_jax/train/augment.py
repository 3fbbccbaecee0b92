"""Augmentation of training clips against overfitting: gain, noise, and SpecAugment masks.

Augmentation never changes a clip's length.
"""

import numpy as np

from qwen2audio_jax.train.settings import AugmentSettings


def augment_samples(samples: np.ndarray, settings: AugmentSettings, rng: np.random.Generator) -> np.ndarray:
    """Apply a random gain and white noise to a clip.

    Args:
        samples: [n] float32.
        settings: `gain_db`, `noise_snr_db` and `noise_probability` are read.
        rng: the random generator.

    Returns:
        [n] float32. A silent clip gets no noise, as its signal-to-noise ratio is undefined.
    """
    if settings.noise_probability > 0 and rng.random() < settings.noise_probability:
        decibels = rng.uniform(*settings.noise_snr_db)
        level = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
        noise = rng.standard_normal(len(samples), dtype=np.float32)
        samples = samples + noise * np.float32(level * 10 ** (-decibels / 20))
    if settings.gain_db is not None:
        samples = samples * np.float32(10 ** (rng.uniform(*settings.gain_db) / 20))
    return samples


def mask_features(features: np.ndarray, *, frames: int, settings: AugmentSettings, rng: np.random.Generator) -> None:
    """Mask stripes of a clip's features, in place.

    Masked values become the mean of the clip's valid features: Park et al. mask with 0, which is the mean of the
    features that they normalise.

    Args:
        features: [M, L] float32.
        frames: number of valid frames; time masks lie within them.
        settings: `time_masks`, `time_mask_frames`, `mel_masks` and `mel_mask_bins` are read.
        rng: the random generator.

    Source: Park et al. 2019, "SpecAugment", section 2: a mask's length is drawn from 0 to the limit, then its start.
    """
    if not settings.time_masks and not settings.mel_masks:
        return
    mean = features[:, :frames].mean()
    for _ in range(settings.time_masks):
        start, stop = _stripe(frames, settings.time_mask_frames, rng)
        features[:, start:stop] = mean
    for _ in range(settings.mel_masks):
        start, stop = _stripe(len(features), settings.mel_mask_bins, rng)
        features[start:stop, :frames] = mean


def _stripe(size: int, limit: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, min(limit, size) + 1))
    start = int(rng.integers(0, size - width + 1))
    return start, start + width
