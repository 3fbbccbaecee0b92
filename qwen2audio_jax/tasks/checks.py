"""Checks of transcripts: signs that a text is not what was said, though it looks like success.

The flags: "not_heard" (voice, and hardly a word), "invented" (words that nobody said: those of the prompt, an answer,
more than can be said in the time), "loop", and "cut" (ended by the limit of tokens).
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from qwen2audio_jax.config.thresholds import read_thresholds

FLAGS = ("not_heard", "invented", "loop", "cut")
_NUMBERS = (
    *("fastest", "slowest", "slowest_from_seconds", "silent_from_seconds", "loop_compression_ratio"),
    *("unsure_log_prob", "prompt_words"),
)


@dataclass(frozen=True)
class Checks:
    """Thresholds; the reasons for the defaults stand in configs/tasks-checks.toml. None: not looked at.

    Attributes:
        fastest: characters for a second of voice.
        slowest: characters for a second of voice.
        slowest_from_seconds: voice that `slowest` is for.
        silent_from_seconds: voice that has at least a word.
        loop_compression_ratio: UTF-8 bytes by zlib's.
        unsure_log_prob: mean log-probability of a text.
        prompt_words: words of the prompt in a row.
        answers: regular expressions of what is no transcript.
        retry: generation options of further tries, in turn.
    """

    fastest: float | None = None
    slowest: float | None = None
    slowest_from_seconds: float = 0.0
    silent_from_seconds: float | None = None
    loop_compression_ratio: float | None = None
    unsure_log_prob: float | None = None
    prompt_words: int | None = None
    answers: Sequence[str] = ()
    retry: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, path: str | PathLike[str] | None = None) -> "Checks":
        """The thresholds in a TOML file; default: the package's.

        Raises:
            ValueError: the file cannot be read, or a key or value in it is wrong.
        """
        known = [each.name for each in fields(cls)]
        values = read_thresholds(
            path, default="tasks-checks.toml", known=known, numbers=_NUMBERS, signed=("unsure_log_prob",)
        )
        for pattern in values.get("answers", ()):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"{path}: answers: {pattern!r} is no regular expression ({error})") from None
        return cls(**values)

    def judge(self, text: str, *, voiced: float, prompt: str, finish_reason: str) -> tuple[str, ...]:
        """The flags of a text.

        Args:
            text: what was answered.
            voiced: seconds in which the detector heard voice.
            prompt: what was asked.
            finish_reason: the answer's.
        """
        text = text.strip()
        loop = self.loop_compression_ratio is not None and compression_ratio(text) > self.loop_compression_ratio
        long = self._is_long(text, voiced) and not loop
        found = {
            "not_heard": self._is_short(text, voiced),
            "invented": long or self._is_answer(text) or self._has_leaked(text, prompt),
            "loop": loop,
            "cut": finish_reason == "length",
        }
        return tuple(name for name, is_so in found.items() if is_so)

    def is_unsure(self, mean_log_prob: float) -> bool:
        """Whether the model doubts its own text."""
        return self.unsure_log_prob is not None and not mean_log_prob >= self.unsure_log_prob

    def _is_short(self, text: str, voiced: float) -> bool:
        if not text:
            return self.silent_from_seconds is not None and voiced >= self.silent_from_seconds
        return self.slowest is not None and voiced >= self.slowest_from_seconds and len(text) < self.slowest * voiced

    def _is_long(self, text: str, voiced: float) -> bool:
        return self.fastest is not None and len(text) > self.fastest * voiced

    def _is_answer(self, text: str) -> bool:
        return any(re.search(pattern, text, re.IGNORECASE) for pattern in self.answers)

    def _has_leaked(self, text: str, prompt: str) -> bool:
        if self.prompt_words is None:
            return False
        words, asked = (re.findall(r"\w+", each.lower()) for each in (text, prompt))
        size = int(self.prompt_words)
        runs = {tuple(asked[start : start + size]) for start in range(len(asked) - size + 1)}
        return any(tuple(words[start : start + size]) in runs for start in range(len(words) - size + 1))


def compression_ratio(text: str) -> float:
    """UTF-8 bytes of a text by zlib's; 0 for none."""
    content = text.encode("utf-8", "surrogatepass")
    return len(content) / len(zlib.compress(content)) if content else 0.0
