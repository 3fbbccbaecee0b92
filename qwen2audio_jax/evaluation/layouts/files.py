"""Files of data sets: tables and lists that others wrote, and the paths they name, which stay inside the folder."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qwen2audio_jax.config.strict_json import BYTE_ORDER_MARK, describe
from qwen2audio_jax.limits import LIMITS

Records = Iterator[dict[str, Any]]
LONGEST_LINE = 1 << 20
"""Characters of a line; a sentence has far fewer."""


def inside(folder: Path, name: Any, *, where: str) -> str:
    """The absolute path of a file that an index names, relative to a folder.

    Raises:
        ValueError: it is no name, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise ValueError(f"{where}: {describe(name)} is no path of a file")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"{where}: {name!r} leads out of {folder}; paths in an index are relative to it")
    return str(folder.absolute() / path)


def existing(*paths: Path, what: str) -> Path:
    """The first of some paths that is there.

    Raises:
        ValueError: none is; the message names them.
    """
    for path in paths:
        if path.exists():
            return path
    raise ValueError(f"{what} is missing: there is no {' nor '.join(map(str, paths))}; name the folder that has it")


def chosen(name: str, value: str, there: Iterable[str], *, folder: Path) -> str:
    """The value, which is one of those that are there.

    Raises:
        ValueError: it is not; the message lists them.
    """
    found = list(there)
    if value not in found:
        listed = ", ".join(found) or "none"
        raise ValueError(f"{folder} has no {name} {value!r}; there are: {listed}")
    return value


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its "file:line".

    Raises:
        ValueError: it cannot be read, is not UTF-8, or has a line that is too long.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"{path}:{number}: the line has more than {LONGEST_LINE} characters")
                if text := line.removeprefix(BYTE_ORDER_MARK if number == 1 else "").strip("\r\n"):
                    yield f"{path}:{number}", text
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8: write it as UTF-8") from None


def table(path: Path, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a file with a line of names and tabs between fields, in which quotes are characters.

    Raises:
        ValueError: a column is missing, or a row has another number of fields.
    """
    rows = ((where, line.split("\t")) for where, line in lines(path))
    yield from _named(rows, path, columns)


def comma_table(path: Path, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with a line of names, in which quotes hold commas and line breaks; as `table`."""
    reader = csv.reader(f"{line}\n" for _, line in lines(path))
    try:
        yield from _named(((f"{path}:{reader.line_num}", row) for row in reader if row), path, columns)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _named(
    rows: Iterator[tuple[str, list[str]]], path: Path, columns: Iterable[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    _, names = next(rows, ("", []))
    if missing := [name for name in columns if name not in names]:
        raise ValueError(
            f"{path} has no column {missing[0]!r}; its first line has {', '.join(names)[:200] or 'nothing'}"
        )
    for where, fields in rows:
        if len(fields) != len(names):
            raise ValueError(f"{where}: {len(fields)} fields where the first line has {len(names)}")
        yield where, dict(zip(names, fields, strict=True))


def json_list(path: Path, *, key: str | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON list, or of the list under a key, each with its place.

    Raises:
        ValueError: the file cannot be read, is too large, or holds something else.
    """
    try:
        if (size := path.stat().st_size) > LIMITS.json_bytes:
            raise ValueError(f"{path} has {size} bytes, more than {LIMITS.json_bytes}")
        value = json.loads(path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if key is not None:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        raise ValueError(f"{path}: {describe(value)} stands where a list belongs")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"{path}, item {number}: {describe(item)} stands where an object belongs")
    return [(f"{path}, item {number}", item) for number, item in enumerate(value)]


def text_of(item: Mapping[str, Any], key: str, *, where: str) -> str:
    """The text under a key, which is not blank.

    Raises:
        ValueError: there is none.
    """
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} is {describe(value)}; it must be text")
    return value


def begun(records: Records, first: Callable[[dict[str, Any]], None], *, what: str) -> Records:
    """The same records, of which the first has been made and judged already.

    Raises:
        ValueError: there is none, or what `first` raises.
    """
    head = next(records, None)
    if head is None:
        raise ValueError(f"{what} has no clips; name the folder that its archive was unpacked into")
    first(head)

    def all_of() -> Records:
        yield head
        yield from records

    return all_of()
