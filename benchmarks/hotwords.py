"""What expected words change: errors of clips that hold one of them, and what is heard of them where they are not.

    python benchmarks/hotwords.py --listed 100 --bonus 0.25 0.5 1 2

The embedded model hears strings of digits in noise (needs espeak-ng). The listed words are some of these strings. The
others are different strings, and clips without speech; near ones are listed strings with one digit exchanged. A false
insertion is a listed string in the answer to a clip that does not hold it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.engine import Engine
from qwen2audio_jax.speech.espeak import speak
from qwen2audio_jax.speech.scoring import edit_distance
from qwen2audio_jax.speech.synthesis import WORDS, draw_digits, empty_clip, noise, noise_clip, tone_clip
from qwen2audio_jax.speech.tasks import spaced
from qwen2audio_jax.speech.voices import draw_voice
from qwen2audio_jax.tasks import Tasks, find_task


def main() -> None:
    """Print a line of figures for each bonus."""
    options = _options()
    rng = np.random.default_rng(options.seed)
    listed = draw_listed(rng, options.listed)
    held = Clips.drawn(rng, [listed[rng.integers(len(listed))] for _ in range(options.clips)], snr=options.snr)
    others = Clips.drawn(rng, draw_others(rng, listed, options.others), snr=options.snr)
    near = Clips.drawn(rng, draw_near(rng, listed, options.near), snr=options.snr)
    print("| bonus | strings wrong | digit errors | inserted in others | digit errors | inserted in near ones |")
    print("|---|---|---|---|---|---|")
    with Tasks.from_pretrained() as tasks:
        for bonus in (0.0, *options.bonus):
            given = {"hotwords": listed, "hotword_bonus": bonus} if bonus else {}
            texts = [clips.transcripts(tasks.engine, given) for clips in (held, others, near)]
            print(
                f"| {bonus or 'none'} | {held.wrong(texts[0])} of {options.clips} | {held.errors(texts[0]):.2%} | "
                f"{others.inserted(texts[1], listed)} of {options.others} | {others.errors(texts[1]):.2%} | "
                f"{near.inserted(texts[2], listed)} of {options.near} |",
                flush=True,
            )


@dataclass(frozen=True)
class Clips:
    """Clips, and what is said in each: digits, or nothing."""

    said: list[str]
    sounds: list[np.ndarray]

    @classmethod
    def drawn(cls, rng: np.random.Generator, said: list[str], *, snr: tuple[float, float]) -> "Clips":
        """Speak strings in noise of so many decibels; silence, noise and tones for the empty ones."""
        unspoken = (empty_clip, noise_clip, tone_clip)
        return cls(said, [noisy(rng, text, snr) if text else unspoken[rng.integers(3)](rng).samples for text in said])

    def transcripts(self, engine: Engine, options: dict) -> list[str]:
        """The transcript of each clip, as a whole."""
        task = find_task("transcribe", kind="embedded")
        answers = engine.answers(task.request(sound, options=options) for sound in self.sounds)
        return [task.clean(answer.text) for answer in answers]

    def wrong(self, texts: Sequence[str]) -> int:
        """Clips whose transcript is another string."""
        return sum(text != said for text, said in zip(texts, self.said, strict=True))

    def errors(self, texts: Sequence[str]) -> float:
        """Digits that are wrong, missing or too many, of those that were spoken."""
        wrong = sum(edit_distance(said.split(), text.split()) for text, said in zip(texts, self.said, strict=True))
        return wrong / sum(len(said.split()) for said in self.said)

    def inserted(self, texts: Sequence[str], listed: Sequence[str]) -> int:
        """Clips whose transcript holds a listed string that the clip does not."""
        pairs = zip(texts, self.said, strict=True)
        return sum(any(holds(text, word) and not holds(said, word) for word in listed) for text, said in pairs)


def holds(text: str, word: str) -> bool:
    """Whether a string of digits is in another one."""
    return f" {word} " in f" {text} "


def draw_listed(rng: np.random.Generator, count: int) -> list[str]:
    """Different strings of four to seven digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[spaced([int(digit) for digit in rng.integers(0, 10, rng.integers(4, 8))])] = None
    return list(found)


def draw_others(rng: np.random.Generator, listed: Sequence[str], count: int) -> list[str]:
    """Strings that hold no listed one, and nothing in each fifth clip."""
    said: list[str] = []
    while len(said) < count:
        text = "" if len(said) % 5 == 4 else spaced(draw_digits(rng))
        if not any(holds(text, word) for word in listed):
            said.append(text)
    return said


def draw_near(rng: np.random.Generator, listed: Sequence[str], count: int) -> list[str]:
    """Listed strings of which one digit is another one."""
    said: list[str] = []
    while len(said) < count:
        digits = listed[rng.integers(len(listed))].split()
        digits[rng.integers(len(digits))] = str(rng.integers(0, 10))
        text = " ".join(digits)
        if text not in listed:
            said.append(text)
    return said


def noisy(rng: np.random.Generator, said: str, snr: tuple[float, float]) -> np.ndarray:
    """A string of digits, spoken by a voice that the model was not trained on, in noise of so many decibels."""
    samples = speak(" ".join(WORDS[int(digit)] for digit in said.split()), **draw_voice(rng, unseen=True))
    edge = np.zeros(SAMPLING_RATE // 5, np.float32)
    samples = np.concatenate([edge, samples, edge])
    power = np.mean(np.square(samples[np.abs(samples) > 0.02]))
    level = np.sqrt(power * 10 ** (-rng.uniform(*snr) / 10))
    samples = samples + level * noise(rng, len(samples), int(rng.integers(3)))
    return (0.5 * samples / np.abs(samples).max()).astype(np.float32)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", type=int, default=100, help="words (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=500, help="that hold one of them")
    parser.add_argument("--others", type=int, default=2000, help="that hold none")
    parser.add_argument("--near", type=int, default=500, help="that hold one with another digit in it")
    parser.add_argument("--snr", type=float, nargs=2, default=(2.0, 10.0), help="decibels of noise: from, to")
    parser.add_argument("--bonus", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
