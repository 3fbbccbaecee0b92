"""The manifest of a job: where each record stands, found in one pass, in some 30 bytes a record."""

import hashlib
import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from qwen2audio_jax.batch.inputs import LineFile, line_files
from qwen2audio_jax.batch.records import Problem, Record, line_id, read_record
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.json_lines import iter_lines

DUPLICATES = 100_000
"""Most records whose id another has; a manifest with more is refused."""
_LOOKED_AT = 100
"""Records that are read in full before anything else; if none of them can be used, the manifest is refused."""


def id_hash(id: str) -> int:
    """The stable 8-byte hash of an id."""
    digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Manifest:
    """All records of a job by their position, N of them; a context manager, as it keeps temporary files.

    Attributes:
        hashes: [N] uint64, `id_hash` of each id, in input order.
        sha256: over all lines.
        files: what the lines are read from.
    """

    def __init__(self, inputs: Sequence[str | LineFile], *, prompt: str | None = None):
        """Read the inputs (see `line_files`); `prompt` is for records that have none.

        Raises:
            ValueError: an input cannot be read, holds no record, or no record that can be used.
        """
        self._prompt = prompt
        self._scratch = tempfile.TemporaryDirectory(prefix="qwen2audio-batch-")
        self._open: tuple[int, BinaryIO] | None = None
        try:
            self.files = line_files(inputs, scratch=Path(self._scratch.name))
            self._read()
            self._find_duplicates()
            self._check_usable()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.hashes)

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary files."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
        self._scratch.cleanup()

    def record(self, position: int) -> Record:
        """The record at a position, read from its file."""
        line, file = self._line(position), self.files[self._file_numbers[position]]
        id = self._id(position, line)
        if position in self._duplicates:
            first = self._duplicates[position]
            where = self._where(position, id)
            stated = line_id(line)
            message = f"{where}: the id {stated!r} is that of {self._where(first, str(stated))} too; ids must differ"
            return Record(id, where, problem=Problem("duplicate", message))
        return read_record(line, id=id, where=self._where(position, id), root=file.root, prompt=self._prompt)

    def _read(self) -> None:
        hashes, offsets, numbers, files = array("Q"), array("q"), array("I"), array("H")
        digest = hashlib.sha256()
        names = [os.path.basename(file.name.rstrip("/")) for file in self.files]
        self._labels = [
            name if names.count(name) == 1 else file.name for name, file in zip(names, self.files, strict=True)
        ]
        if len(self.files) > 0xFFFF:
            raise ValueError(f"{len(self.files)} inputs; the limit is {0xFFFF}. Join some of them")
        for index, source in enumerate(self.files):
            try:
                with source.path.open("rb") as file:
                    for number, offset, line in iter_lines(file):
                        digest.update(line.strip() + b"\n")
                        hashes.append(id_hash(_stated_id(line) or f"{self._labels[index]}:{number}"))
                        offsets.append(offset)
                        numbers.append(number)
                        files.append(index)
            except OSError as error:
                raise ValueError(f"{source.name}: cannot be read ({error.strerror})") from None
        if not hashes:
            raise ValueError(f"{', '.join(file.name for file in self.files)}: there is no record in it")
        self.hashes = np.frombuffer(hashes, np.uint64).copy()
        self._offsets, self._numbers = np.frombuffer(offsets, np.int64), np.frombuffer(numbers, np.uint32)
        self._file_numbers = np.frombuffer(files, np.uint16)
        self.sha256 = digest.hexdigest()

    def _find_duplicates(self) -> None:
        """Find the records whose id an earlier one has, and give them ids of their own."""
        self._duplicates: dict[int, int] = {}
        ordered = np.sort(self.hashes)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(repeated):
            return
        first: dict[str, int] = {}
        for position in np.flatnonzero(np.isin(self.hashes, repeated)).tolist():
            id = self._id(position, self._line(position))
            before = first.setdefault(id, position)
            if before != position:
                self._duplicates[position] = before
            if len(self._duplicates) > DUPLICATES:
                raise ValueError(
                    f"more than {DUPLICATES} records have the id of another, such as {id!r}; leave the ids out, and "
                    "each record is named by its line"
                )
        for position in self._duplicates:
            self.hashes[position] = id_hash(self._id(position, b""))

    def _check_usable(self) -> None:
        problems = []
        for position in range(min(len(self), _LOOKED_AT)):
            record = self.record(position)
            if record.problem is None:
                return
            problems.append(record.problem.message)
        raise ValueError(f"no record can be used; the first: {problems[0]}")

    def _line(self, position: int) -> bytes:
        index = int(self._file_numbers[position])
        if self._open is None or self._open[0] != index:
            if self._open is not None:
                self._open[1].close()
            self._open = (index, self.files[index].path.open("rb"))
        file = self._open[1]
        file.seek(int(self._offsets[position]))
        return file.readline(LIMITS.json_bytes + 1)

    def _id(self, position: int, line: bytes) -> str:
        if position in self._duplicates:
            return f"{self._place(position)} (duplicate)"
        return _stated_id(line) or self._place(position)

    def _place(self, position: int) -> str:
        return f"{self._labels[self._file_numbers[position]]}:{self._numbers[position]}"

    def _where(self, position: int, id: str) -> str:
        file: LineFile = self.files[self._file_numbers[position]]
        return f"{file.name}:{self._numbers[position]}" if file.manifest else f"{file.name}: {id}"


def _stated_id(line: bytes) -> str | None:
    try:
        return line_id(line)
    except ValueError:
        return None
