"""Upload of local results to a bucket: each object is written once, the decisive one last.

Orbax joins its files by renaming, which object stores cannot do, so a result is first assembled in a staging folder:
the disk must hold one copy of it. A journal there lists the objects to send and those that have arrived; after any
interruption the same command sends the rest.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, Timeout

from qwen2audio_jax.checkpoint.conversion_cache import default_cache_dir, named
from qwen2audio_jax.checkpoint.progress import Progress, Report
from qwen2audio_jax.storage.bucket import BucketPath

_JOURNAL = "upload.jsonl"
_LOCK = "lock"
_THREADS = 4
"""Number of objects sent at once."""


class Upload:
    """An upload in progress; see `uploading`."""

    def __init__(self, bucket: BucketPath, place: Path, *, last: str):
        self.folder = place / "result"
        """The staging folder of the result."""
        self.made: dict[str, Any] | None = None
        """The work that an earlier attempt passed to `record_made`: its result is complete."""
        self._bucket = bucket
        self._last = last
        self._journal = place / _JOURNAL
        self._planned: dict[str, list[int]] = {}
        self._arrived: set[str] = set()
        self._sent = False
        for entry in _read_lines(self._journal):
            self._sent = entry.get("sent", self._sent)
            self.made = entry.get("made", self.made)
            if "planned" in entry:
                self._planned, self._arrived = entry["planned"], set()
            self._arrived.update(entry.get("arrived", ()))

    def is_finished(self) -> bool:
        """Return True if the bucket's folder holds a complete result, of this command or another.

        Raises:
            ValueError: there is no such bucket, or its folder holds something that this upload has not sent.
        """
        self._bucket.check_bucket()
        if self._sent or not self._planned:  # then the rest of the folder need not be checked
            foreign = next((path.name for path in self._bucket.iterdir()), None)
            finished = (self._bucket / self._last).exists()
        else:
            there = self._bucket.objects()
            foreign = next((name for name in there if name not in self._planned), None)
            finished = self._last in there and not self._sent_by_us(self._last)
        if foreign is not None and not finished:
            raise ValueError(
                f"{self._bucket}: is not empty (it has {foreign}) and not this command's unfinished upload; choose "
                "another folder, or remove what is there"
            )
        return finished

    def _sent_by_us(self, name: str) -> bool:
        """Return True if an object is a file of the result or its beginning: some stores show partial uploads."""
        local = self.folder / name
        return local.is_file() and local.read_bytes().startswith((self._bucket / name).read_bytes())

    def record_made(self, work: Mapping[str, Any]) -> None:
        """Record that the result of `work` is complete and need not be made again."""
        self.made = dict(work)
        self._note({"made": self.made})

    def send(self, *, on_progress: Progress | None = None) -> None:
        """Send the missing objects, the decisive one last, and then remove the local result.

        Raises:
            ValueError: the bucket refuses, or another process has written there meanwhile.
            OSError: an object did not arrive after several attempts. The same command resumes.
        """
        planned = {
            path.relative_to(self.folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        there = self._bucket.objects()
        if planned != self._planned:
            if foreign := sorted(there.keys() - self._planned.keys()):
                raise self._taken(foreign[0])
            # The result has been made again: leftovers of an earlier one are useless.
            for name in [name for name in there if self._planned[name] != planned.get(name)]:
                (self._bucket / name).remove()
                del there[name]
            self._planned, self._arrived = planned, set()
            self._note({"planned": planned})
        left = [name for name in planned if not self._is_there(name, there)]
        total = sum(size for size, _ in planned.values())
        report = Report(on_progress, total, done=total - sum(planned[name][0] for name in left))
        for name in left:
            if name in there:  # a partial upload, in stores that show them
                (self._bucket / name).remove()
        self._send_all([name for name in left if name != self._last], report)
        if self._last in left:
            there = self._bucket.objects()
            wrong = [name for name in {*there, *planned} - {self._last} if there.get(name) != planned.get(name, [0])[0]]
            if wrong or self._last in there:
                raise self._taken([*wrong, self._last][0])
            self._send_all([self._last], report)
        self._note({"sent": True})
        report.finish()

    def _taken(self, name: str) -> ValueError:
        return ValueError(
            f"{self._bucket / name}: is not what was sent: somebody else writes there; choose another folder, or "
            f"remove that one and {self.folder.parent}"
        )

    def _is_there(self, name: str, there: Mapping[str, int]) -> bool:
        if there.get(name) != self._planned[name][0]:
            return False
        return name in self._arrived or (self._bucket / name).holds(self.folder / name)

    def _send_all(self, names: list[str], report: Report) -> None:
        stopped = Event()

        def send(name: str) -> str | None:
            if stopped.is_set():
                return None
            try:
                (self._bucket / name).write_once(self.folder / name)
            except BaseException:
                stopped.set()
                raise
            return name

        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for future in as_completed([pool.submit(send, name) for name in names]):
                    if (name := future.result()) is not None:
                        self._arrived.add(name)
                        self._note({"arrived": [name]})
                        report.add(self._planned[name][0])
            finally:
                stopped.set()

    def _note(self, entry: Mapping[str, Any]) -> None:
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def uploading(bucket: BucketPath, *, last: str, staging: str | os.PathLike[str] | None) -> Iterator[Upload]:
    """Make a result in `Upload.folder` and `send` it: when the block ends, the staging folder is removed.

    A block that raises leaves the partial result, to resume from. A block need not send, if the result is finished.

    Args:
        bucket: the target folder: empty, or with objects of an earlier attempt.
        last: the file without which the folder does not count as complete; it is sent last.
        staging: the folder in which the staging folder is made; default: `uploads` in the cache folder.

    Raises:
        ValueError: the bucket is missing, or its folder holds something else, or another process is sending there.
    """
    base = default_cache_dir() / "uploads" if staging is None else Path(staging)
    place = named(base, label=bucket.name, told_by=(str(bucket),))
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / _LOCK)
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise ValueError(
            f"{place}: cannot be written ({error.strerror}); name another by staging= (--staging)"
        ) from None
    except Timeout:
        raise ValueError(f"{bucket}: another process is writing it, by {place}; wait for it to end") from None
    try:
        upload = Upload(bucket, place, last=last)
        try:
            yield upload
        except BaseException:
            if not upload.folder.exists() and not (place / _JOURNAL).exists():
                shutil.rmtree(place)
            raise
        shutil.rmtree(place)
    finally:
        lock.release()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a torn last line is cut off, so that lines can be appended."""
    entries: list[dict[str, Any]] = []
    kept = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        entries.append(entry)
        kept += len(line)
    if path.exists():
        os.truncate(path, kept)
    return entries
