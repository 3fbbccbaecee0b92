"""Signs that an answer is wrong, though it looks like success: loops, cut or empty answers, too much or too little."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any

from qwen2audio_jax.config.thresholds import read_thresholds
from qwen2audio_jax.tasks.checks import compression_ratio

_NUMBERS = ("loop_compression_ratio", "fastest", "slowest", "slowest_from_seconds")


@dataclass(frozen=True)
class Thresholds:
    """Beyond which an answer is suspect; the reasons for the defaults stand in configs/batch-suspect.toml.

    Attributes:
        loop_compression_ratio: UTF-8 bytes by zlib's; None: not looked at, as for the others.
        fastest: characters for a second of sound.
        slowest: characters for a second of sound.
        slowest_from_seconds: sound that `slowest` is for.
        retry: generation options of a second try.
    """

    loop_compression_ratio: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    slowest_from_seconds: float = 0.0
    retry: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | PathLike[str] | None = None) -> "Thresholds":
        """The thresholds in a TOML file; default: the package's.

        Raises:
            ValueError: the file cannot be read, or a key or value in it is wrong.
        """
        known = [each.name for each in fields(cls)]
        values = read_thresholds(path, default="batch-suspect.toml", known=known, numbers=_NUMBERS)
        if not isinstance(values.get("retry", {}), dict):
            raise ValueError(f"{path}: retry must be a table of generation options")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def judge(self, text: str, *, audio_seconds: float, finish_reason: str) -> dict[str, Any]:
        """The figures of an answer and its list `suspect`: of "loop", "cut", "empty", "too_fast", "too_slow"."""
        ratio = compression_ratio(text)
        rate = len(text) / audio_seconds if audio_seconds > 0 else None
        found = {
            "loop": self.loop_compression_ratio is not None and ratio > self.loop_compression_ratio,
            "cut": finish_reason == "length",
            "empty": not text.strip(),
            "too_fast": None not in (rate, self.fastest) and rate > self.fastest,  # type: ignore[operator]
            "too_slow": None not in (rate, self.slowest)
            and audio_seconds >= self.slowest_from_seconds
            and rate < self.slowest,  # type: ignore[operator]
        }
        return {
            "compression_ratio": round(ratio, 3),
            "characters_per_second": None if rate is None else round(rate, 3),
            "suspect": [name for name, is_so in found.items() if is_so],
        }
