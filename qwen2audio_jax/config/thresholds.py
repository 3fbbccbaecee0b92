"""Thresholds in TOML files: those of the package, or a user's own, judged key by key."""

import tomllib
from collections.abc import Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any


def read_thresholds(
    path: str | PathLike[str] | None,
    *,
    default: str,
    known: Sequence[str],
    numbers: Sequence[str],
    signed: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of a file of thresholds.

    Args:
        path: a TOML file; None: the package's.
        default: name of the package's in `configs`.
        known: keys that the file may have.
        numbers: those of them that are numbers.
        signed: those of the numbers that may be negative.

    Raises:
        ValueError: the file cannot be read, or a key or number in it is wrong.
    """
    file = resources.files("qwen2audio_jax.configs") / default if path is None else Path(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no TOML"
        raise ValueError(f"{path}: cannot be read ({reason}); copy configs/{default}") from None
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}; known are {', '.join(known)}")
        if name not in numbers:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or (value < 0 and name not in signed):
            raise ValueError(
                f"{path}: {name} is {value!r}; it must be a number{'' if name in signed else ', 0 or more'}"
            )
    return values
