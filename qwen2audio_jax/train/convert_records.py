"""Files of training records in any form that is read, JSON arrays too, as JSONL in this package's own form."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2audio_jax.config.strict_json import BYTE_ORDER_MARK, without_nulls
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.json_lines import parse_line, read_lines
from qwen2audio_jax.storage.write_whole import draft_of
from qwen2audio_jax.train.other_forms import as_record
from qwen2audio_jax.train.records import read_record


def convert_records(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> int:
    """Write the records of a file, checked, one a line. Paths of clips stay as they are.

    Args:
        source: JSONL, or a JSON array; records of ms-swift, LLaMA-Factory, TRL or our own.
        destination: not there yet; it appears once it is whole.

    Returns:
        The number of records.

    Raises:
        ValueError: the file cannot be read, a record is invalid (named by its position), or `destination` exists.
    """
    if Path(destination).exists():
        raise ValueError(f"{destination}: is there already; name a file that is not")
    count = 0
    with draft_of(Path(destination)) as draft, open(draft, "w", encoding="utf-8") as file:
        for where, value in _values(source):
            record = _in_our_form(value, where=where)
            line = json.dumps(record, ensure_ascii=False)
            preferences = isinstance(record, dict) and "rejected" in record
            read_record(line.encode(), where=where, audio_root="", preferences=preferences)
            file.write(f"{line}\n")
            count += 1
    return count


def _values(source: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its position."""
    lines = read_lines(source)
    first = next(lines, None)
    if first is None:
        return
    if not first[1].lstrip(BYTE_ORDER_MARK.encode()).lstrip().startswith(b"["):
        yield first[0], _parsed(*first)
        for where, line in lines:
            yield where, _parsed(where, line)
        return
    if (size := Path(source).stat().st_size) > LIMITS.json_bytes:
        raise ValueError(
            f"{source}: has {size} bytes; an array has at most {LIMITS.json_bytes}. Write one object a line"
        )
    values = _parsed(str(source), Path(source).read_bytes())
    for number, value in enumerate(values):
        yield f"{source}[{number}]", value


def _in_our_form(value: Any, *, where: str) -> Any:
    try:
        return as_record(without_nulls(value)) if isinstance(value, dict) else value
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _parsed(where: str, line: bytes) -> Any:
    try:
        return parse_line(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
