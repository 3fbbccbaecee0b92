"""Questions about sound of any length: what is longer than a clip is several clips of one prompt."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.stream import stream_audio
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.engine.request import Request
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.tasks.task import Task
from qwen2audio_jax.tasks.windows import Cutting, cut

TOKENS_A_SECOND = 25
"""Audio tokens, and so positions, that a second of sound takes."""
_RESERVED = 64
"""Positions for the words of a prompt and the beginning of its answer."""


def question_request(
    source: Any,
    task: Task,
    *,
    positions: int,
    options: Mapping[str, Any] | None = None,
    hearing: Mapping[str, Any] | None = None,
    **request: Any,
) -> Request:
    """The request for one answer about a sound.

    Args:
        source: as for `stream_audio`.
        task: with its question.
        positions: of the engine, for prompt and answer together.
        options: of generation, before the task's own.
        hearing: other arguments of `stream_audio`.
        **request: other fields of the request: seed, id, priority.

    Raises:
        AudioError: the sound cannot be heard.
        ValueError: it is too long for the positions, or for the most clips of a prompt.
    """
    most = min((positions - _RESERVED) / TOKENS_A_SECOND, LIMITS.clips_per_text * LIMITS.clip_seconds * 2 / 3)
    blocks = _bounded(stream_audio(open_clip(source), **(hearing or {})), most=most, positions=positions)
    windows = cut(blocks, detector="none", cutting=Cutting(margin=0.0, least=0.0))
    clips = tuple(window.samples for window in windows)
    if not clips:
        raise AudioError(
            f"the sound has fewer than the {LIMITS.min_clip_samples} samples at 16 kHz that give one audio token",
            kind="too_short",
        )
    return replace(task.request(*clips, options=options), **request)


def _bounded(blocks: Iterator[np.ndarray], *, most: float, positions: int) -> Iterator[np.ndarray]:
    seconds = 0.0
    for block in blocks:
        seconds += len(block) / SAMPLING_RATE
        if seconds > most:
            raise ValueError(
                f"the sound is longer than the {most:.0f} s that fit a question here: {TOKENS_A_SECOND} positions a "
                f"second, of {positions}; raise positions (--positions) up to the model's, ask about a part, or "
                "transcribe it"
            )
        yield block
