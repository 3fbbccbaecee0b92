"""Example clips of the package, and their contents."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from qwen2audio_jax.speech.dataset import write_wav
from qwen2audio_jax.speech.synthesis import Clip, digits_clip, noise_clip, sum_clip, tone_clip

# A separate random stream: the data's seeds are (seed, split 0..2, index).
_STREAM = (0, 3)

EXAMPLES: dict[str, Callable[[np.random.Generator], Clip]] = {
    "digits-4719": lambda rng: digits_clip(rng, [4, 7, 1, 9], unseen=False),
    "sum-two-plus-three": lambda rng: sum_clip(rng, 2, 3, unseen=False),
    "high-voice-306": lambda rng: digits_clip(rng, [3, 0, 6], unseen=False, sex="high"),
    "low-voice-58": lambda rng: digits_clip(rng, [5, 8], unseen=False, sex="low"),
    "tone": tone_clip,
    "noise": noise_clip,
}
"""File name -> how the clip is drawn, in the same way as test clips."""


def write_examples(out: str | PathLike[str]) -> list[Path]:
    """Write the clips, always the same ones, into the folder `out` as 16-bit wav files at 16 kHz.

    Identical bytes require a new process (see `speak`).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for i, (name, draw) in enumerate(EXAMPLES.items()):
        write_wav(out / f"{name}.wav", draw(np.random.default_rng([*_STREAM, i])).samples)
    return [out / f"{name}.wav" for name in EXAMPLES]
