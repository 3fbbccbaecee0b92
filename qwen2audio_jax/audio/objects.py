"""Objects that carry samples and their rate: rows of `datasets`, decoders, pairs of both, segments of pydub.

They are recognised by what they offer, since none of their libraries is imported here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qwen2audio_jax.audio.clip import too_long
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.limits import Limits

PAIRS = "{'array': samples, 'sampling_rate': rate}, {'bytes': ...} or {'path': ...}"


class Unwrapped(NamedTuple):
    """What `load_audio` goes on with: a path, URL, bytes, file object or array, and the rate that an array has."""

    source: Any
    sampling_rate: int | None


def unwrap(source: Any, *, sampling_rate: int | None, truncation: bool, limits: Limits) -> Unwrapped:
    """The sound in an object, or the source as it is.

    Args:
        source: any source of `load_audio`.
        sampling_rate: as the caller states it.
        truncation: as in `load_audio`.
        limits: bounds on seconds and channels.

    Raises:
        AudioError: the object holds no sound ("shape"), integers of unknown scale ("dtype"), more than the limits
            allow, or another rate than is stated ("rate").
    """
    if isinstance(source, Mapping):
        return _unwrap_row(source, sampling_rate=sampling_rate)
    if is_pair(source):
        rate, samples = source if _is_rate(source[0]) else reversed(source)
        samples = _scaled(samples)
        # Gradio and soundfile give [n, channels], torchaudio [channels, n]; no clip has fewer samples than channels.
        axis = 0 if samples.ndim == 2 and samples.shape[0] <= limits.max_channels < samples.shape[1] else -1
        return Unwrapped(_mix(samples, axis=axis, limits=limits), _agreed(rate, sampling_rate))
    if hasattr(source, "get_all_samples"):
        source = _decoded(source, truncation=truncation, limits=limits)
    if hasattr(source, "sample_rate") and hasattr(source, "data"):
        return Unwrapped(_mix(source.data, axis=0, limits=limits), _agreed(source.sample_rate, sampling_rate))
    if hasattr(source, "get_array_of_samples") and hasattr(source, "frame_rate"):
        samples = np.asarray(source.get_array_of_samples(), np.float32).reshape(-1, source.channels)
        samples /= 1 << 8 * source.sample_width - 1
        return Unwrapped(_mix(samples, axis=-1, limits=limits), _agreed(source.frame_rate, sampling_rate))
    return Unwrapped(source, sampling_rate)


def is_pair(source: Any) -> bool:
    """Return True for (rate, samples), as scipy and Gradio give them, and for librosa's and vLLM's (samples, rate)."""
    if not isinstance(source, list | tuple) or len(source) != 2:
        return False
    first, second = source
    return (_is_rate(first) and _is_samples(second)) or (_is_samples(first) and _is_rate(second))


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_samples(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], int | float)
    return len(getattr(value, "shape", ())) > 0


def _unwrap_row(row: Mapping[str, Any], *, sampling_rate: int | None) -> Unwrapped:
    """A row of `datasets`, decoded or not, or the same under the names of transformers' pipelines."""
    for key in ("array", "raw"):
        if row.get(key) is not None:
            rate = row.get("sampling_rate")
            if rate is None:
                raise AudioError(
                    f"the clip is a dict with {key!r} and no 'sampling_rate': add the samples a second that it has, "
                    f"as in {{{key!r}: samples, 'sampling_rate': 16000}}",
                    kind="shape",
                )
            return Unwrapped(row[key], _agreed(rate, sampling_rate))
    for key in ("bytes", "path"):
        if row.get(key) is not None:
            return Unwrapped(row[key], sampling_rate)
    found = ", ".join(repr(key) for key in list(row)[:8]) or "no key"
    raise AudioError(f"the clip is a dict with {found} and no sound in it: pass {PAIRS}", kind="shape")


def _decoded(decoder: Any, *, truncation: bool, limits: Limits) -> Any:
    """The samples of a decoder of torchcodec, no more than are heard."""
    seconds = getattr(getattr(decoder, "metadata", None), "duration_seconds", None)
    if isinstance(seconds, int | float) and seconds > limits.clip_seconds:
        if not truncation:
            raise too_long("the clip", seconds, limits)
        if hasattr(decoder, "get_samples_played_in_range"):
            return decoder.get_samples_played_in_range(0.0, limits.clip_seconds + 1)
    return decoder.get_all_samples()


def _agreed(rate: Any, stated: int | None) -> int:
    """The object's own rate; AudioError "rate" where it is no rate, or the caller states another."""
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or float(rate) % 1 != 0:
        raise AudioError(f"the clip's rate is {rate!r}, not a whole number of samples a second", kind="rate")
    if stated is not None and stated != rate:
        raise AudioError(
            f"the clip has {int(rate)} samples a second by its own word and {stated} by sampling_rate=: leave "
            "sampling_rate away, and its own rate is used",
            kind="rate",
        )
    return int(rate)


def _scaled(samples: Any) -> Any:
    """Samples of a pair as floats: integers of 8, 16 or 32 bits have a known full scale."""
    array = samples if hasattr(samples, "dtype") else np.asarray(samples)
    kind, size = getattr(array.dtype, "kind", ""), getattr(array.dtype, "itemsize", 0)
    if kind == "u" and size == 1:
        return (np.asarray(array, np.float32) - 128) / 128
    if kind == "i" and size in (1, 2, 4):
        return (np.asarray(array) / (1 << 8 * size - 1)).astype(np.float32)
    return array


def _mix(samples: Any, *, axis: int, limits: Limits) -> Any:
    """The mean over the channels; one clip [n] as it is."""
    if samples.ndim != 2:
        return samples
    if not 1 <= samples.shape[axis] <= limits.max_channels:
        raise AudioError(
            f"the clip has shape {tuple(samples.shape)}, so {samples.shape[axis]} channels, not 1 to "
            f"{limits.max_channels}: pass its samples [n] and sampling_rate=, mixed down",
            kind="shape",
        )
    return samples.mean(axis)
