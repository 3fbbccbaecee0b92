"""Dataset index: every record and clip checked once before the first step, with lengths, problems and a hash.

The index is cached in a file, and rebuilt when a record, or a clip's size or modification time, changes.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio.mel import HOP
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.json_lines import read_lines
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.train.encoding import ExampleEncoder, Segment
from qwen2audio_jax.train.records import Record, read_record

VERSION = 1
"""Version of the index file; other versions are not read."""
THREADS = 4
CHUNK = 64
"""Clips per unit of work of a decoding thread."""


@dataclass(frozen=True)
class Index:
    """All valid records, N of them, as flat arrays; S sequences, A uses of P different clips.

    Attributes:
        ids: [N] str, names of the records.
        where: [N] str, "file:line".
        segment_starts: [N + 1] int64, sequences of record n: segment_starts[n] to segment_starts[n + 1].
        token_starts: [S + 1] int64, tokens of each sequence.
        token_ids: [...] int32, with one placeholder for each clip.
        learnt: [...] bool, tokens in the loss.
        clip_starts: [N + 1] int64, uses of clips by each record, in order.
        clips: [A] int64, indices into `paths`.
        paths: [P] str.
        frames: [P] int32, mel frames.
        problems: a message for each bad record, beginning with "file:line".
        sha256: over the records and their clips' bytes.
    """

    ids: Sequence[str]
    where: Sequence[str]
    segment_starts: np.ndarray
    token_starts: np.ndarray
    token_ids: np.ndarray
    learnt: np.ndarray
    clip_starts: np.ndarray
    clips: np.ndarray
    paths: Sequence[str]
    frames: np.ndarray
    problems: Sequence[str]
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)


ARRAYS = ("segment_starts", "token_starts", "token_ids", "learnt", "clip_starts", "clips", "frames")
TEXTS = ("ids", "where", "paths", "problems", "sha256")


@dataclass(frozen=True)
class _Clip:
    """The result of reading a clip file; `problem` is empty if it is a valid clip."""

    frames: int
    digest: bytes
    problem: str


def read_clip(path: str) -> tuple[np.ndarray, bytes]:
    """The samples of a file, [n] float32 at 16 kHz, and the SHA-256 of its bytes.

    Raises:
        ValueError: it cannot be read, or is not a valid clip.
    """
    try:
        if (size := os.stat(path).st_size) > LIMITS.file_bytes:
            raise AudioError(
                f"'{path}' has {size} bytes, and {LIMITS.file_bytes} are read at most: split it", kind="too_large"
            )
        content = Path(path).read_bytes()
    except OSError as error:
        raise AudioError(f"cannot read '{path}': {error.strerror}", kind="missing") from None
    try:
        return load_audio(content), hashlib.sha256(content).digest()
    except AudioError as error:
        # The decoder gets bytes, and does not know the file's name.
        raise AudioError(f"'{path}': {error}", kind=error.kind) from None


def build_index(
    files: Sequence[str | PathLike[str]],
    *,
    processor: Qwen2AudioProcessor,
    audio_root: str | PathLike[str] | None,
    preferences: bool,
    cache_dir: str | PathLike[str],
    show_progress: bool = True,
) -> Index:
    """Build the index from all records and clips, or read the cached one if nothing has changed.

    Args:
        files: JSONL files.
        processor: encodes the records.
        audio_root: base folder of relative clip paths; None: each file's folder.
        preferences: whether the records are pairs.
        cache_dir: the folder for cached indexes.
        show_progress: show a bar on a terminal if it takes long.

    Raises:
        ValueError: a JSONL file cannot be read. Bad records are listed in the index instead.
    """
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(files, processor, audio_root=audio_root, preferences=preferences)}.npz"
    # Several processes on one machine wait for the first.
    with FileLock(path.with_suffix(".lock")):
        if (index := _load(path)) is None:
            index, stamps, watched = _build(files, processor, audio_root, preferences, bar=_bars(show_progress))
            _save(path, index, stamps=stamps, watched=watched)
    return index


def _key(
    files: Sequence[str | PathLike[str]],
    processor: Qwen2AudioProcessor,
    *,
    audio_root: str | PathLike[str] | None,
    preferences: bool,
) -> str:
    """Cache key: everything that the index depends on except the clips."""
    digest = hashlib.sha256()
    tokenizer = processor.tokenizer
    settings = [VERSION, preferences, None if audio_root is None else os.path.abspath(audio_root)]
    described = [settings, tokenizer.settings, processor.chat_template, processor.audio_token, tokenizer.to_json()]
    digest.update(json.dumps(described, sort_keys=True).encode())
    for file in files:
        digest.update(json.dumps([os.fspath(file), os.path.abspath(file)]).encode())
        try:
            with Path(file).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise ValueError(f"cannot read the records {file}: {error.strerror}") from None
    return digest.hexdigest()[:32]


def _bars(show: bool) -> Callable[..., Any]:
    def bar(items: Any = None, **options: Any) -> Any:
        return tqdm(items, delay=2, disable=None if show else True, dynamic_ncols=True, **options)

    return bar


def _build(
    files: Sequence[str | PathLike[str]],
    processor: Qwen2AudioProcessor,
    audio_root: str | PathLike[str] | None,
    preferences: bool,
    *,
    bar: Callable[..., Any],
) -> tuple[Index, np.ndarray, list[str]]:
    """The index, and sizes and modification times [P', 2] of all files that any record names."""
    encoder = ExampleEncoder(processor)
    entries: list[tuple[Record, list[Segment]] | str] = []
    digest = hashlib.sha256()
    for where, line, root in bar(_lines(files, audio_root), desc="reading records", unit=" records"):
        digest.update(line.strip() + b"\n")
        try:
            record = read_record(line, where=where, audio_root=root, preferences=preferences)
            entries.append((record, encoder.encode(record)))
        except ValueError as error:
            entries.append(str(error))
    named = dict.fromkeys(path for entry in entries if not isinstance(entry, str) for path in entry[0].clips)
    watched = list(named)
    stamps = _stamps(watched)
    chunks = [watched[i : i + CHUNK] for i in range(0, len(watched), CHUNK)]
    found: dict[str, _Clip] = {}
    with ThreadPoolExecutor(THREADS) as pool, bar(total=len(watched), desc="decoding clips", unit=" clips") as shown:
        for chunk, clips in zip(chunks, pool.map(_look, chunks), strict=True):
            found.update(zip(chunk, clips, strict=True))
            shown.update(len(chunk))
    for clip in found.values():
        digest.update(clip.digest)
    return _flatten(entries, found, digest.hexdigest()), stamps, watched


def _lines(
    files: Sequence[str | PathLike[str]], audio_root: str | PathLike[str] | None
) -> Iterator[tuple[str, bytes, str | PathLike[str]]]:
    for file in files:
        root = Path(file).absolute().parent if audio_root is None else audio_root
        for where, line in read_lines(file):
            yield where, line, root


def _look(paths: Sequence[str]) -> list[_Clip]:
    clips = []
    for path in paths:
        try:
            samples, digest = read_clip(path)
            clips.append(_Clip(-(-len(samples) // HOP), digest, ""))
        except ValueError as error:
            clips.append(_Clip(0, b"", str(error)))
    return clips


def _stamps(paths: Sequence[str]) -> np.ndarray:
    """Size and modification time of each file, [P, 2] int64; -1 for a missing file."""
    stamps = np.full((len(paths), 2), -1, np.int64)
    for i, path in enumerate(paths):
        try:
            found = os.stat(path)
        except OSError:
            continue
        stamps[i] = found.st_size, found.st_mtime_ns
    return stamps


def _flatten(entries: Sequence[tuple[Record, list[Segment]] | str], found: dict[str, _Clip], sha256: str) -> Index:
    problems, good = [], []
    for entry in entries:
        if isinstance(entry, str):
            problems.append(entry)
        elif bad := next((path for path in entry[0].clips if found[path].problem), None):
            problems.append(f"{entry[0].where}: {found[bad].problem}")
        else:
            good.append(entry)
    segments = [segment for _, parts in good for segment in parts]
    numbers = {path: i for i, path in enumerate(dict.fromkeys(path for record, _ in good for path in record.clips))}
    return Index(
        ids=[record.id for record, _ in good],
        where=[record.where for record, _ in good],
        segment_starts=_starts([len(parts) for _, parts in good]),
        token_starts=_starts([len(segment.ids) for segment in segments]),
        token_ids=np.concatenate([np.zeros(0, np.int32), *(segment.ids for segment in segments)]),
        learnt=np.concatenate([np.zeros(0, bool), *(segment.learnt for segment in segments)]),
        clip_starts=_starts([len(record.clips) for record, _ in good]),
        clips=np.array([numbers[path] for record, _ in good for path in record.clips], np.int64),
        paths=list(numbers),
        frames=np.array([found[path].frames for path in numbers], np.int32),
        problems=problems,
        sha256=sha256,
    )


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64))])


def _save(path: Path, index: Index, *, stamps: np.ndarray, watched: list[str]) -> None:
    texts = json.dumps({name: getattr(index, name) for name in TEXTS} | {"watched": watched}).encode()
    arrays = {name: getattr(index, name) for name in ARRAYS} | {"stamps": stamps}
    buffer = io.BytesIO()
    np.savez(buffer, texts=np.frombuffer(texts, np.uint8), **arrays)
    write_whole(path, buffer.getvalue())


def _load(path: Path) -> Index | None:
    """The cached index, if it is readable and no clip has changed."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            texts = json.loads(stored["texts"].tobytes())
            if not np.array_equal(stored["stamps"], _stamps(texts["watched"])):
                return None
            return Index(**{name: texts[name] for name in TEXTS}, **{name: stored[name] for name in ARRAYS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
