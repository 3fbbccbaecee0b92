"""Writes a tiny random checkpoint in the Hugging Face layout and a short clip beside it: `make_tiny_checkpoint.py DIR`.

It answers gibberish, but through the same code as the published weights; torch is not needed.
"""

import sys
from pathlib import Path

import numpy as np
import soundfile
from hf_layout import write_hf_checkpoint


def write_clip(path: Path, *, seconds: float = 2.0, rate: int = 16_000) -> None:
    """A voice-like glide: harmonics of a moving pitch, in syllables."""
    time = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 0.8 * time)) / rate
    voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    soundfile.write(path, 0.1 * voice * np.abs(np.sin(2 * np.pi * 2 * time)), rate)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make_tiny_checkpoint.py DIR")
    folder = Path(sys.argv[1])
    write_hf_checkpoint(folder, "base", seed=6)
    write_clip(folder / "speech.wav")
    print(f"{folder}: a tiny random checkpoint, and speech.wav")


if __name__ == "__main__":
    main()
