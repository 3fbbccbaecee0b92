"""Signs that an answer is wrong, though it looks like success: loops, cut or empty answers, too much or too little."""

import tomllib
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

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
        file = resources.files("qwen2audio_jax.configs") / "batch-suspect.toml" if path is None else Path(path)
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no TOML"
            raise ValueError(f"{path}: cannot be read ({reason}); copy configs/batch-suspect.toml") from None
        for name, value in values.items():
            if name not in {each.name for each in fields(cls)}:
                raise ValueError(f"{path}: unknown key {name!r}; known are {', '.join((*_NUMBERS, 'retry'))}")
            if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise ValueError(f"{path}: {name} is {value!r}; it must be a number, 0 or more")
        if not isinstance(values.get("retry", {}), dict):
            raise ValueError(f"{path}: retry must be a table of generation options")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def judge(self, text: str, *, audio_seconds: float, finish_reason: str) -> dict[str, Any]:
        """The figures of an answer and its list `suspect`: of "loop", "cut", "empty", "too_fast", "too_slow"."""
        content = text.encode("utf-8", "surrogatepass")
        ratio = len(content) / len(zlib.compress(content)) if content else 0.0
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
