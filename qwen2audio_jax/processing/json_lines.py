"""JSON lines: files with one object a line, read one line at a time, no line longer than the limit."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from qwen2audio_jax.config.strict_json import BYTE_ORDER_MARK
from qwen2audio_jax.limits import LIMITS


def read_lines(path: str | PathLike[str]) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with its "file:line".

    Raises:
        ValueError: there is no such file.
    """
    try:
        with Path(path).open("rb") as file:
            for number, _, line in iter_lines(file):
                yield f"{path}:{number}", line
    except OSError as error:
        raise ValueError(f"cannot read the records {path}: {error.strerror}") from None


def iter_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """The lines of an open file that are not blank: number from 1, offset in bytes, content.

    Of a line beyond the limit one byte more than that is given, which `parse_line` refuses.
    """
    number, offset, most = 0, 0, LIMITS.json_bytes + 1
    while line := file.readline(most):
        number, start, offset = number + 1, offset, offset + len(line)
        rest = line
        while len(rest) == most and not rest.endswith(b"\n"):
            rest = file.readline(most)
            offset += len(rest)
        if line.strip():
            yield number, start, line


def parse_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        ValueError: the line is too long, not UTF-8, not JSON, or nested too deep.
    """
    if len(line) > LIMITS.json_bytes:
        raise ValueError(f"the line has {len(line)} bytes or more; the limit is {LIMITS.json_bytes}. Split the record")
    try:
        return json.loads(line.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8; write the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at character {error.pos}: {error.msg}; write one object a line") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deep; write a flat record") from None
