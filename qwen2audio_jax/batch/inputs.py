"""Inputs of a batch job, whatever their form, as files of lines: manifests, folders of sound files, tars, stdin."""

import glob
import gzip
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen2audio_jax.batch.parquet import parquet_lines
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage.bucket import BucketPath, is_url

STDIN = "-"
SOUNDS = (
    *(
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".spx",
        ".m4a",
        ".m4b",
        ".mp4",
        ".3gp",
        ".webm",
        ".mka",
        ".aac",
    ),
    *(".aif", ".aiff", ".aifc", ".caf", ".au", ".snd", ".w64", ".amr", ".awb", ".wma", ".mp2", ".ac3", ".wv", ".tta"),
)
"""Names of sound files in folders and tars; what a file holds is told by its content."""
MANIFESTS, TARS, TABLES = (".jsonl", ".ndjson", ".json"), (".tar", ".tar.gz", ".tgz"), (".parquet",)
_MOST = 1 << 40
"""Largest manifest or tar that is copied from a bucket."""


@dataclass(frozen=True)
class LineFile:
    """A file with a record on each line.

    Attributes:
        path: a local file.
        name: the input's, for messages.
        root: folder, or URL of one, that relative paths of clips start from.
        manifest: whether its lines are the user's own, so that their numbers mean something to the user.
    """

    path: Path
    name: str
    root: str
    manifest: bool


def line_files(inputs: Sequence[str | LineFile], *, scratch: Path) -> list[LineFile]:
    """The records of all inputs, in order.

    Args:
        inputs: JSONL files (also .gz), tars in WebDataset's layout, Parquet files with a column of sounds, sound files,
            folders of these, patterns such as "part-*.jsonl", URLs of any of these in buckets, or "-" for JSONL on
            stdin; or files of lines that are ready.
        scratch: an empty folder for what cannot be read in place.

    Raises:
        ValueError: an input is missing, unreadable, or of no known form.
    """
    found: list[LineFile] = []
    sounds: list[tuple[str, str]] = []  # id, path of consecutive sound files

    def place(name: str) -> Path:
        folder = scratch / f"{len(list(scratch.iterdir())):06d}"
        folder.mkdir()
        return folder / name

    def flush() -> None:
        if sounds:
            lines = ({"id": id, "audio": path} for id, path in sounds)
            found.append(LineFile(_write(place("sounds.jsonl"), lines), "the sound files", os.getcwd(), False))
            sounds.clear()

    if not inputs:
        raise ValueError("there is no input; name a JSONL file, a tar, or a folder of sound files")
    for each in _expanded(inputs):
        if isinstance(each, LineFile):
            flush()
            found.append(each)
            continue
        lower = each.lower()
        if each != STDIN and lower.endswith(SOUNDS):
            sounds.append((each, each))
            continue
        flush()
        if each == STDIN:
            path = place("stdin.jsonl")
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            found.append(LineFile(path, "stdin", os.getcwd(), True))
        elif lower.endswith(TARS):
            found.append(_tar(each, place))
        elif lower.endswith(TABLES):
            found.append(_table(each, place))
        elif lower.removesuffix(".gz").endswith(MANIFESTS):
            path, root = Path(each), os.path.dirname(each) or "."
            if is_url(each):
                path, root = _copied(each, place(each.rpartition("/")[2])), each.rpartition("/")[0]
            if lower.endswith(".gz"):
                path = _unzipped(path, place("manifest.jsonl"), name=each)
            found.append(LineFile(path, each, root, True))
        elif (listed := _folder(each)) is not None:
            lines = ({"id": name, "audio": name} for name in listed)
            found.append(LineFile(_write(place("sounds.jsonl"), lines), each, each.rstrip("/") or "/", False))
        else:
            raise ValueError(
                f"{each}: is no input; known are folders and names that end with "
                f"{', '.join((*MANIFESTS, *TARS, *TABLES, *SOUNDS))}"
            )
    flush()
    return found


def _expanded(inputs: Iterable[str | LineFile]) -> Iterator[str | LineFile]:
    for each in inputs:
        if isinstance(each, LineFile) or each == STDIN or is_url(each) or os.path.exists(each):
            yield each
        elif glob.has_magic(each):
            matches = sorted(glob.glob(each, recursive=True))
            if not matches:
                raise ValueError(f"{each}: no file matches this pattern")
            yield from matches
        else:
            raise ValueError(f"{each}: there is no such file or folder")


def _folder(place: str) -> list[str] | None:
    """The sound files in a folder and those below it, relative and sorted; None where it is no folder."""
    if is_url(place):
        names = list(BucketPath(place).objects())
    elif os.path.isdir(place):
        names = [
            os.path.relpath(os.path.join(folder, name), place).replace(os.sep, "/")
            for folder, _, files in os.walk(place)
            for name in files
        ]
    else:
        return None
    sounds = sorted(name for name in names if name.lower().endswith(SOUNDS))
    if not sounds:
        raise ValueError(f"{place}: holds no sound file (a name that ends with {', '.join(SOUNDS)})")
    return sounds


def _write(path: Path, lines: Iterable[Any]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    return path


def _copied(url: str, path: Path) -> Path:
    try:
        with path.open("wb") as file:
            file.writelines(BucketPath(url).pieces(most=_MOST))
    except FileNotFoundError:
        raise ValueError(f"{url}: there is no such object; check the URL") from None
    return path


def _unzipped(source: Path, path: Path, *, name: str) -> Path:
    try:
        with gzip.open(source, "rb") as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise ValueError(f"{name}: is no whole gzip file; copy it again") from None
    return path


def _tar(source: str, place: Any) -> LineFile:
    """A tar as lines whose clips are pieces of it; compressed ones are unpacked first."""
    path = _copied(source, place(source.rpartition("/")[2])) if is_url(source) else Path(source)
    if not path.name.lower().endswith(".tar"):
        path = _unzipped(path, place("unpacked.tar"), name=source)
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            return LineFile(_write(place("tar.jsonl"), _samples(tar, file, path.name)), source, str(path.parent), False)
    except tarfile.TarError:
        raise ValueError(f"{source}: is no whole tar; copy it again") from None


def _table(source: str, place: Any) -> LineFile:
    """A Parquet file as lines whose clips are pieces of another file."""
    path = _copied(source, place(source.rpartition("/")[2])) if is_url(source) else Path(source).absolute()
    lines = parquet_lines(path, place("sounds.bin"), name=source)
    return LineFile(_write(place("table.jsonl"), lines), source, str(path.parent), False)


def _samples(tar: tarfile.TarFile, file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """The records of a tar: consecutive members whose names agree up to the first dot are one."""
    key: str | None = None
    sample: dict[str, Any] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        own = f"{folder}/{stem}" if folder else stem
        if own != key:
            if sample.get("audio") or sample.get("prompt") or sample.get("messages"):
                yield sample
            key, sample = own, {"id": own, "audio": []}
        if f".{ending.lower()}".endswith(SOUNDS):
            sample["audio"].append({"file": name, "offset": member.offset_data, "size": member.size})
        elif ending.lower() in ("json", "txt") and member.size <= LIMITS.json_bytes:
            file.seek(member.offset_data)
            _add_text(sample, file.read(member.size), ending.lower())
    if sample.get("audio") or sample.get("prompt") or sample.get("messages"):
        yield sample


def _add_text(sample: dict[str, Any], content: bytes, ending: str) -> None:
    """Add the prompt in key.txt, or the record's other keys in key.json (what is no record there is kept as `meta`)."""
    text = content.decode("utf-8", errors="replace")
    if ending == "txt":
        sample.setdefault("prompt", text.strip())
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        sample["prompt"] = {"unreadable": "json"}  # refused with the record, as a prompt is text
        return
    if isinstance(value, dict):
        known = {name: value.pop(name) for name in ("prompt", "messages", "options", "meta") if name in value}
        sample |= known
        if value and "meta" not in known:
            sample["meta"] = value
