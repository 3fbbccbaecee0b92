"""Log-mel features, the encoder's input: `log_mel` for one clip in numpy on the host.

`mel_batch` is the same for many clips in JAX on a device.
Source: `WhisperFeatureExtractor` padding to its maximum length, as `Qwen2AudioProcessor` calls it.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE

WINDOW = 400
HOP = 160
FLOOR = 1e-10
"""Least mel power of which the logarithm is taken."""
BLOCK = 256
"""Frames at a time: few enough that what is computed of them stays in the processor's cache."""
SHARED = 1000
"""Frames from which on the main thread lets another compute half of them: below, it costs more than it saves.

Other threads compute theirs alone: where there are some, each has a clip of its own.
"""
BAND = 16
"""Most filters of one matrix product, which then reads the few frequencies that they hear and not all of them."""
PRODUCT = 1 << 18
"""Largest product, in multiplications, that OpenBLAS computes in one thread."""
RANGE = 8.0
"""Decades below a clip's loudest value at which its features are cut off."""


@functools.cache
def mel_filters(num_mel_bins: int) -> np.ndarray:
    """Slaney mel filters with slaney normalisation over 0 to 8000 Hz: [1 + WINDOW / 2, num_mel_bins] float64.

    Source: `librosa.filters.mel`, which takes seconds to import; the numbers are its own to the last bit.
    """
    step, corner, growth = 200.0 / 3, 1000.0, np.log(6.4) / 27.0  # Hz a mel below the corner, and per mel above it
    corner_mel = corner / step
    mels = np.linspace(0.0, corner_mel + np.log(SAMPLING_RATE / 2 / corner) / growth, num_mel_bins + 2)
    edges = np.where(mels < corner_mel, step * mels, corner * np.exp(growth * (mels - corner_mel)))  # Hz, [M + 2]
    slopes = np.subtract.outer(edges, np.fft.rfftfreq(WINDOW, 1.0 / SAMPLING_RATE))
    widths = np.diff(edges)[:, None]
    triangles = np.maximum(0, np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]))
    filters = np.ascontiguousarray((triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).T)
    filters.flags.writeable = False
    return filters


@functools.cache
def filter_bands(num_mel_bins: int) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """The filters in bands: the frequencies that a band hears, its filters, and their weights [filter, frequency].

    The weights are float32. `BLOCK` frames of a band are a product that stays in the thread that asks for it: in larger
    ones the threads of BLAS wait for each other, which on a busy machine takes longer than the product.
    """
    filters, bands, first = mel_filters(num_mel_bins), [], 0
    while first < num_mel_bins:
        count = BAND
        while True:
            heard = np.flatnonzero(filters[:, first : first + count].any(axis=1))
            rows, columns = slice(heard[0], heard[-1] + 1), slice(first, first + count)
            weights = np.ascontiguousarray(filters[rows, columns].T, np.float32)
            if weights.size * BLOCK <= PRODUCT or count == 1:
                break
            count //= 2
        bands.append((rows, columns, weights))
        first += count
    return tuple(bands)


@functools.cache
def hann_window() -> np.ndarray:
    """Periodic Hann window: [WINDOW] float64."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    window.flags.writeable = False
    return window


def log_mel(samples: np.ndarray, *, num_mel_bins: int = 128, max_frames: int = 3000) -> tuple[np.ndarray, int]:
    """Log-mel features of one clip, padded with silence, and its number of valid frames.

    Args:
        samples: [n] float, mono at 16 kHz, n <= max_frames * 160.
        num_mel_bins: mel filters M.
        max_frames: frames that are returned; 3000 are 30 s.

    Returns:
        features [M, max_frames] float32, and the number of valid frames, ceil(n / 160).

    Raises:
        ValueError: `samples` is not one-dimensional or longer than `max_frames` hold, or that is below 2.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1:
        raise ValueError(f"samples of shape {samples.shape}: pass one clip [n]; mix channels down with their mean")
    if max_frames < 2:
        raise ValueError(f"max_frames={max_frames}: at least 2, as a window reaches over two frames")
    if len(samples) > max_frames * HOP:
        raise ValueError(
            f"{len(samples)} samples are more than the {max_frames * HOP} that {max_frames} frames hold: cut the clip"
        )
    # Beyond the sound every frame is silence, whose value is known. Four hops of zeros behind the sound are enough for
    # the last window that touches it (200 samples past its centre) and for the reflection behind it to hold zeros only.
    frames = min(max_frames, -(-len(samples) // HOP) + 4)
    half = WINDOW // 2
    padded = np.zeros(frames * HOP + WINDOW, np.float32)
    padded[half : half + len(samples)] = samples
    padded[:half] = padded[WINDOW:half:-1]  # reflected, as numpy.pad does it more slowly
    padded[-half:] = padded[-half - 2 : -WINDOW - 2 : -1]
    windows = np.ndarray((frames, WINDOW), np.float32, buffer=padded, strides=(HOP * 4, 4))
    features = np.empty((num_mel_bins, max_frames), np.float32)
    heard = features[:, :frames]
    if frames < SHARED or threading.current_thread() is not threading.main_thread():
        _log_mel_of(windows, heard, _Scratch(num_mel_bins))
    else:
        middle = -(-frames // (2 * BLOCK)) * BLOCK  # the same blocks, so that the result is the same to the last bit
        with ThreadPoolExecutor(1) as helper:
            # What the thread works in is made here: in a new thread memory is fresh, and the slower for it.
            rest = helper.submit(_log_mel_of, windows[middle:], heard[:, middle:], _Scratch(num_mel_bins))
            _log_mel_of(windows[:middle], heard[:, :middle], _Scratch(num_mel_bins))
            rest.result()
    lowest = max(heard.max() - np.float32(RANGE / 4), np.float32((np.log10(FLOOR) + 4) / 4))
    np.maximum(heard, lowest, out=heard)
    features[:, frames:] = lowest
    return features, -(-len(samples) // HOP)


class _Scratch:
    """Memory for what is computed of a block: fresh for every block it would cost more time than the computation."""

    def __init__(self, num_mel_bins: int) -> None:
        self.windowed = np.empty((BLOCK, WINDOW))  # float64, as float32 is not near enough
        self.spectrum = np.empty((BLOCK, WINDOW // 2 + 1), np.complex128)
        self.power = np.zeros(self.spectrum.shape, np.float32)
        self.mel_power = np.empty((num_mel_bins, BLOCK), np.float32)


def _log_mel_of(windows: np.ndarray, out: np.ndarray, scratch: _Scratch) -> None:
    """Features [M, F], before they are cut off, of the frames whose windows of sound are [F, WINDOW]."""
    filters_by_band, mel_power = filter_bands(len(out)), scratch.mel_power
    for start in range(0, len(windows), BLOCK):
        rows = min(BLOCK, len(windows) - start)
        windowed, spectrum, power = scratch.windowed[:rows], scratch.spectrum[:rows], scratch.power[:rows]
        np.multiply(windows[start : start + rows], hann_window(), out=windowed)
        np.fft.rfft(windowed, out=spectrum)
        parts = spectrum.view(np.float64)  # real, imaginary, real, ...
        np.square(parts, out=parts)
        np.add(parts[:, ::2], parts[:, 1::2], out=power)
        for frequencies, filters, weights in filters_by_band:
            np.matmul(weights, scratch.power[:, frequencies].T, out=mel_power[filters])
        # (decades + 4) / 4; numpy's natural logarithm takes a fourth of the time of its decimal one. That of silence is
        # infinite until it is raised to the floor's.
        with np.errstate(divide="ignore"):
            np.log(mel_power, out=mel_power)
        np.multiply(mel_power, np.float32(0.25 / np.log(10)), out=mel_power)
        np.add(mel_power[:, :rows], np.float32(1), out=out[:, start : start + rows])
