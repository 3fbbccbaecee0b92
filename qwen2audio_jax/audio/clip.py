"""Clip checks for every source: mono, finite, long enough for a token, and no longer than the encoder's input."""

import math
from typing import Any

import numpy as np

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.limits import LIMITS, Limits

SAMPLING_RATE = 16_000
"""Samples per second of the model's input."""


def to_samples(source: Any, *, name: str = "the clip") -> np.ndarray:
    """An array or sequence of floats as float32 samples [n], checked to be finite.

    Anything that numpy can read as an array is taken: numpy and JAX arrays, lists of floats; tensors of torch too,
    wherever they are, with a gradient or in bfloat16.

    Raises:
        AudioError: not one-dimensional ("shape"), not floating point ("dtype"), empty ("empty"), or with NaN or
            infinity ("not_finite").
    """
    try:
        array = np.asarray(_plain_tensor(source))
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(
            f"{name} ({type(source).__name__}) is no array of samples: pass one clip as floats [n]",
            kind="shape",
        ) from error
    if array.ndim == 0 and array.dtype == object:
        raise AudioError(
            f"{name} is {_kind_of(source)}, no sound and no array of samples (shape ()): pass a path, bytes, an open "
            "binary file or floats [n]",
            kind="shape",
        )
    if array.ndim != 1:
        raise AudioError(
            f"{name} has shape {array.shape}: pass one mono clip [n]; mix channels down with their mean, "
            "for example samples.mean(axis=0) for [channels, n]",
            kind="shape",
        )
    if array.size == 0:
        raise AudioError(f"{name} is empty (0 samples): pass a clip that holds sound", kind="empty")
    if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
        remedy = "convert it with astype('float32')"
        if np.issubdtype(array.dtype, np.integer):
            remedy = f"divide it by {_full_scale(array)} to get floats from -1 to 1"
        raise AudioError(f"{name} has dtype {array.dtype}, not a float: {remedy}", kind="dtype")
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(array, np.float32)
    check_finite(samples, name=name)
    return samples


def _full_scale(array: np.ndarray) -> int:
    """The likely full scale of integers: their dtype's, or that of 16 or 24 bits where wider ones use no more."""
    peak, own = max(-int(array.min()), int(array.max())), min(8 * array.dtype.itemsize - 1, 31)
    bits = next((bits for bits in (15, 23) if bits < own and 0 < peak <= 1 << bits), own)
    return 1 << bits


def _plain_tensor(source: Any) -> Any:
    """A tensor of torch in a form that numpy reads; anything else as it is."""
    if not hasattr(source, "detach"):
        return source
    source = source.detach().cpu()
    return source.float() if "bfloat16" in str(source.dtype) else source


def _kind_of(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def check_finite(samples: np.ndarray, *, name: str) -> None:
    """AudioError "not_finite" that counts the samples which are NaN or infinite and names the first."""
    finite = np.isfinite(samples)
    if not finite.all():
        first = int(np.argmin(finite))
        raise AudioError(
            f"{name} holds NaN or infinity in {int((~finite).sum())} of its {len(samples)} samples, first at {first}: "
            "repair it or leave the clip out",
            kind="not_finite",
        )


def check_clip(
    samples: Any, *, limits: Limits = LIMITS, truncation: bool = False, name: str = "the clip"
) -> np.ndarray:
    """Check one clip at 16 kHz for the model.

    Args:
        samples: [n] floats, mono at 16 kHz.
        limits: the bounds.
        truncation: cut a clip that is too long to its first `limits.clip_seconds` instead of refusing it.
        name: the clip's name in error messages.

    Returns:
        samples [n] float32.

    Raises:
        AudioError: see `to_samples`, and for a clip that is too long ("too_long") or too short ("too_short"), or
            whose samples are far beyond full scale ("scale").
        ValueError: `truncation` is neither True nor False; None is False.
    """
    if not isinstance(truncation, bool | None):
        raise ValueError(f"truncation={truncation!r} must be True (cut long clips) or False (refuse them)")
    samples = to_samples(samples, name=name)
    most = limits.clip_seconds * SAMPLING_RATE
    if len(samples) > most:
        if not truncation:
            raise too_long(name, len(samples) / SAMPLING_RATE, limits)
        samples = samples[: math.floor(most)]
    if len(samples) < limits.min_clip_samples:
        raise AudioError(
            f"{name} has {len(samples)} samples ({len(samples) / SAMPLING_RATE * 1000:g} ms at 16 kHz), fewer than the "
            f"{limits.min_clip_samples} that give one audio token: pass a longer clip",
            kind="too_short",
        )
    check_scale(samples, limits=limits, name=name)
    return samples


def check_scale(samples: np.ndarray, *, limits: Limits, name: str) -> None:
    """AudioError "scale" for samples far beyond full scale: integers that became floats without a division."""
    peak = max(float(samples.max()), -float(samples.min()))
    if peak <= limits.peak:
        return
    # Resampling exceeds the largest integer by a little.
    factor = next((1 << bits for bits in (15, 23, 31) if peak <= 1.5 * (1 << bits)), None)
    eight = " (or by 128 if they had 8 bits)" if peak <= 1.5 * 128 else ""
    remedy = "these are no samples of sound, check where they come from"
    if factor is not None:
        remedy = f"they look like integers; divide them by {factor}{eight} to get floats from -1 to 1"
    raise AudioError(
        f"{name} has samples up to {peak:g}, and full scale is 1 (at most {limits.peak:g} is heard): {remedy}",
        kind="scale",
    )


def too_long(name: str, seconds: float | None, limits: Limits) -> AudioError:
    """The error for a clip of `seconds`; None if only known to be too long."""
    length = "goes on" if seconds is None else f"lasts {seconds:.10g} s, which is"
    return AudioError(
        f"{name} {length} longer than the {limits.clip_seconds:g} s that one clip may last: split it, or pass "
        f"truncation=True (--truncation) to keep its first {limits.clip_seconds:g} s",
        kind="too_long",
        seconds=seconds,
    )
