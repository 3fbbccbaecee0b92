"""Embeddings: the audio features of sound of any length, before and after the projector, one vector for 40 ms."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.stream import blocks_of, stream_audio
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.generation.decoding import LogitsError, not_numbers
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage.write_whole import draft_of

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
    from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

FRAME_SECONDS = 0.04
"""Of a vector."""
TOGETHER = 4
"""Clips of 30 s that are encoded at a time."""
FORMATS = ("npz", "safetensors")
LAYERS = ("encoded", "projected")
"""The encoder's output, and the same projected to the decoder's width."""


@dataclass(frozen=True)
class Embeddings:
    """The audio features of a sound.

    Attributes:
        vectors: [n, D] float32; [1, D] if they are pooled.
        times: [n] float64, the second at which each begins.
        length: vectors that the sound has, before they were pooled.
        seconds: that it lasts.
        layer: "encoded" or "projected".
    """

    vectors: np.ndarray
    times: np.ndarray
    length: int
    seconds: float
    layer: str


def embed(
    model: "Qwen2AudioForConditionalGeneration",
    processor: "Qwen2AudioProcessor",
    source: Any,
    *,
    layer: str = "encoded",
    pool: str = "none",
    hearing: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Encode a sound.

    What is longer than a clip is encoded in pieces of 30 s, of which none hears the others.

    Args:
        model: the model.
        processor: of the same checkpoint.
        source: as for `stream_audio`.
        layer: one of `LAYERS`.
        pool: "none", or "mean" for the mean of all vectors.
        hearing: other arguments of `stream_audio`.

    Raises:
        AudioError: the sound cannot be heard, or is too short for a vector.
        ValueError: there is no such layer or pooling.
        LogitsError: the features are not numbers; a ValueError.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer={layer!r} is none of {', '.join(LAYERS)}")
    if pool not in ("none", "mean"):
        raise ValueError(f"pool={pool!r} is neither none nor mean")
    vectors: list[np.ndarray] = []
    times: list[np.ndarray] = []
    heard = [0.0]
    blocks = stream_audio(open_clip(source), **(hearing or {}))
    for begin, found in _encoded(model, processor, _pieces(blocks, heard), layer=layer):
        times.append(begin + FRAME_SECONDS * np.arange(len(found)))
        vectors.append(found.sum(axis=0, dtype=np.float64)[None] if pool == "mean" else found)
    length = sum(map(len, times))
    if not length:
        raise AudioError("the sound is too short for an audio token: pass a longer one", kind="too_short")
    whole, starts = np.concatenate(vectors), np.concatenate(times)
    if pool == "mean":
        whole, starts = (whole.sum(axis=0, keepdims=True) / length), starts[:1]
    return Embeddings(whole.astype(np.float32), starts, length, heard[0], layer)


def _pieces(blocks: Iterable[np.ndarray], heard: list[float]) -> Iterator[np.ndarray]:
    for piece in blocks_of(blocks, round(LIMITS.clip_seconds * SAMPLING_RATE)):
        heard[0] += len(piece) / SAMPLING_RATE
        if len(piece) >= LIMITS.min_clip_samples:
            yield piece


def _encoded(
    model: "Qwen2AudioForConditionalGeneration",
    processor: "Qwen2AudioProcessor",
    pieces: Iterator[np.ndarray],
    *,
    layer: str,
) -> Iterator[tuple[float, np.ndarray]]:
    """The second at which each piece begins, and its vectors [n, D] float32."""
    begin = 0.0
    while group := [piece for _, piece in zip(range(TOGETHER), pieces, strict=False)]:
        inputs = processor.feature_extractor(group)
        features = model.encode_audio(inputs["input_features"], inputs["feature_attention_mask"])
        found = np.asarray(getattr(features, layer)).astype(np.float32)
        for piece, vectors, length in zip(group, found, np.asarray(features.lengths), strict=True):
            if not np.isfinite(vectors[:length]).all():
                where = f"the piece at {begin:g} s"
                raise LogitsError(not_numbers("audio features", where=where, dtype=model.config.dtype))
            yield begin, vectors[:length]
            begin += len(piece) / SAMPLING_RATE


def write_embeddings(path: Path, found: Mapping[str, Embeddings], *, form: str) -> None:
    """Write embeddings of sounds, by name, into one file, whole or not at all.

    Arrays: "NAME" (vectors), "NAME.times", "NAME.length" and "NAME.seconds".

    Args:
        path: of the file; an earlier one is replaced.
        found: name -> embeddings.
        form: one of `FORMATS`.

    Raises:
        ValueError: there is no such format.
        OSError: it cannot be written.
    """
    if form not in FORMATS:
        raise ValueError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
    arrays: dict[str, np.ndarray] = {}
    for name, each in found.items():
        arrays[name] = np.ascontiguousarray(each.vectors)
        arrays[f"{name}.times"] = np.ascontiguousarray(each.times)
        arrays[f"{name}.length"] = np.asarray([each.length], np.int64)
        arrays[f"{name}.seconds"] = np.asarray([each.seconds], np.float64)
    about = {"layers": json.dumps({name: each.layer for name, each in found.items()}), "frame_seconds": "0.04"}
    with draft_of(path) as draft, open(draft, "wb") as file:
        if form == "npz":
            np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            from safetensors.numpy import save

            file.write(save(arrays, metadata=about))
