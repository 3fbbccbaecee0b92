"""The output folder of a job: a part file a shard, each complete or absent, in a local or shared folder or a bucket.

Names say everything: one listing tells which shards are done. Parts are written once; a second writer of the same
shard replaces a file by one with the same answers (locally), or leaves the first (in a bucket).
"""

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2audio_jax.batch.manifest import Manifest, id_hash
from qwen2audio_jax.batch.shards import Host, Shards
from qwen2audio_jax.storage.bucket import BucketPath, PathOrUrl, folder_at
from qwen2audio_jax.storage.write_whole import draft_of, write_whole

Row = dict[str, Any]

LISTING_SECONDS = 5.0
"""Age up to which a listing is used again when the next shard is chosen."""
_BLOCK = 200_000
"""Records of a merge at a time."""


class Output:
    """The files of a job in its folder.

    Args:
        place: a folder, made if it is missing, or a bucket's URL.
    """

    def __init__(self, place: PathOrUrl):
        self.place = folder_at(place)
        # Several processes may write a part at the same time, on several hosts.
        self._writer = f"-{platform.node()}-{os.getpid()}"

    def names(self) -> set[str]:
        """All names in the folder, listed afresh."""
        if isinstance(self.place, BucketPath):
            return set(self.place.objects())
        return set(os.listdir(self.place)) if self.place.is_dir() else set()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if isinstance(self.place, Path):
            return (self.place / name).read_bytes()
        return b"".join((self.place / name).pieces(most=1 << 40))

    def write(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """Write a file whole; in a bucket an earlier one stays, unless it is to be replaced.

        Raises:
            OSError: the disk or the bucket fails.
        """
        if isinstance(self.place, Path):
            self.place.mkdir(parents=True, exist_ok=True)
            write_whole(self.place / name, content, writer=self._writer)
            return
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "content")
            local.write_bytes(content)
            if replace and name in self.names():
                self.remove(name)
            try:
                (self.place / name).write_once(local)
            except ValueError:
                if name not in self.names():  # else another host was faster
                    raise

    def remove(self, name: str) -> None:
        """Remove a file."""
        if isinstance(self.place, Path):
            (self.place / name).unlink(missing_ok=True)
        else:
            (self.place / name).remove()


class Parts:
    """The parts of one job; `shards` says what belongs into each."""

    def __init__(self, output: Output, *, fingerprint: str, shards: Shards):
        self.output, self._fingerprint, self._shards = output, fingerprint[:12], shards
        self._name = re.compile(rf"part-(\d{{5}})-of-{shards.count:05d}\.{self._fingerprint}\.jsonl")
        self._done: set[int] = set()
        self._listed = -float("inf")

    def name(self, shard: int) -> str:
        """The name of a shard's part."""
        return f"part-{shard:05d}-of-{self._shards.count:05d}.{self._fingerprint}.jsonl"

    def done(self, *, within: float = 0.0) -> set[int]:
        """The shards whose parts are there; a listing of the last `within` seconds will do. Foreign names do not count.

        Shards without records are always done.
        """
        if time.monotonic() - self._listed > within:
            found = filter(None, map(self._name.fullmatch, self.output.names()))
            numbers = {int(match[1]) for match in found}
            empty = np.flatnonzero(self._shards.sizes() == 0).tolist()
            self._done = {number for number in numbers if number < self._shards.count} | set(empty)
            self._listed = time.monotonic()
        return self._done

    def write(self, shard: int, rows: Sequence[Row], *, replace: bool = False) -> None:
        """Write a shard's part, its rows in input order."""
        self.output.write(self.name(shard), b"".join(map(to_line, rows)), replace=replace)
        self._done.add(shard)

    def read(self, shard: int, *, hashes: np.ndarray) -> list[Row]:
        """The rows of a part that is there, one for each of its records' hashes [n].

        Raises:
            ValueError: it does not hold them.
        """
        lines = self.output.read(self.name(shard)).splitlines(keepends=True)
        expected = hashes[self._shards.positions(shard)].tolist()
        lines += [b""] * (len(expected) - len(lines))
        return [json.loads(self._checked(line, hash, shard)) for line, hash in zip(lines, expected, strict=True)]

    def merge(self, path: Path, *, manifest: Manifest) -> None:
        """Write all rows into one local file, in input order, whole or not at all.

        Raises:
            ValueError: a part does not hold the rows of its shard; the message names it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, draft_of(path, writer=f"-{os.getpid()}") as draft:
            local = self._local(Path(scratch))
            offsets = [0] * self._shards.count
            with draft.open("wb") as file:
                for start in range(0, len(manifest), _BLOCK):
                    file.writelines(self._block(start, hashes=manifest.hashes, offsets=offsets, local=local))

    def _block(
        self, start: int, *, hashes: np.ndarray, offsets: list[int], local: Callable[[int], Path]
    ) -> Iterator[bytes]:
        """The lines of the records from `start` on; each part is opened once and read from where it was left."""
        of = self._shards.of[start : start + _BLOCK]
        lines: list[bytes] = [b""] * len(of)
        for shard in np.unique(of).tolist():
            with local(shard).open("rb") as part:
                part.seek(offsets[shard])
                for position in np.flatnonzero(of == shard).tolist():
                    lines[position] = self._checked(part.readline(), int(hashes[start + position]), shard)
                offsets[shard] = part.tell()
        yield from lines

    def _checked(self, line: bytes, expected: int, shard: int) -> bytes:
        try:
            if line.endswith(b"\n") and id_hash(json.loads(line)["id"]) == expected:
                return line
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ValueError(
            f"{self.output.place / self.name(shard)}: does not hold the records of its shard; remove it, and the same "
            "command does that shard again"
        )

    def _local(self, scratch: Path) -> Callable[[int], Path]:
        """Where parts are read: in place, or copied from a bucket once."""
        if isinstance(self.output.place, Path):
            folder = self.output.place
            return lambda shard: folder / self.name(shard)

        def copied(shard: int) -> Path:
            path = scratch / self.name(shard)
            if not path.exists():
                path.write_bytes(self.output.read(self.name(shard)))
            return path

        return copied


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON, UTF-8."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def prove_shared(output: Output, host: Host, *, fingerprint: str, timeout: float) -> bool:
    """Whether this host sees in the folder what others wrote; it leaves a token there for them.

    A bucket is shared by its nature, and a host alone shares with nobody. Otherwise another host's token must appear
    within `timeout` seconds.

    Raises:
        ValueError: none did.
    """
    if host.count == 1 or isinstance(output.place, BucketPath):
        return True
    mine = f"host-{host.index}-of-{host.count}.{fingerprint[:12]}"
    others = re.compile(rf"host-\d+-of-\d+\.{fingerprint[:12]}")
    output.write(mine, f"{platform.node()}\n".encode())
    end = time.monotonic() + timeout
    while not any(others.fullmatch(name) for name in output.names() - {mine}):
        if timeout <= 0:
            return False
        if time.monotonic() > end:
            raise ValueError(
                f"{output.place}: after {timeout:g} s there is no trace of another of the {host.count} hosts "
                f"({host.told_by}), so the folder is not shared, or they have not started: give a folder that all "
                "hosts see, or a bucket; with --peer-timeout 0 this host does its own shards and no others"
            )
        time.sleep(min(0.2, timeout))
    return True
