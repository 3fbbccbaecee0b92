"""The folder for conversions and copies of checkpoints: $QWEN2AUDIO_CACHE, else ~/.cache/qwen2audio_jax.

Where there is no home folder, or it cannot be written (containers, functions in a cloud), it is a folder of the user's
own among the temporary files.

The name of an entry encodes its source and the source's state, so a source that changes gets a new entry.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qwen2audio_jax.checkpoint.reader import MARKER, is_checkpoint


def default_cache_dir() -> Path:
    """The default folder for conversions."""
    configured = os.environ.get("QWEN2AUDIO_CACHE")
    if configured:
        return Path(configured)
    # Without a home folder the tilde stays.
    home = Path(os.path.expanduser("~/.cache/qwen2audio_jax"))
    if home.is_absolute() and _can_be_made(home):
        return home
    return _temporary() or home


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is there and can be written, which is tried, as rights alone do not tell."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary() -> Path | None:
    """The user's folder among the temporary files; None where there is none, or another user has made one."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    try:
        folder = Path(tempfile.gettempdir()) / f"qwen2audio_jax-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    # What others can write may hold programs and weights of theirs.
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022
    return folder if own or not hasattr(os, "getuid") else None


def digest_of(text: str) -> str:
    """A short digest of `text` for use in names."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def named(folder: Path, *, label: str, told_by: tuple[str, ...]) -> Path:
    """A path in `folder`: its name contains `label`, and a digest of `told_by`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", label).strip(".-") or "checkpoint"
    return folder / "-".join([name, *map(digest_of, told_by)])


@contextmanager
def made_once(place: Path, *, source: object, doing: str) -> Iterator[None]:
    """Make a checkpoint in the cache, at `place`, under a lock against other processes.

    Raises:
        ValueError: the cache folder cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{place}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{source}: another process is {doing} it; waiting", file=sys.stderr)
            lock.acquire()
        try:
            if not is_checkpoint(place):
                _tidy(place)
                print(f"{source}: {doing} once into {place}", file=sys.stderr)
            yield
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ValueError(
            f"{place.parent}: the cache folder cannot be written ({error.strerror}); point QWEN2AUDIO_CACHE at one "
            "that can"
        ) from None


def _tidy(place: Path) -> None:
    """Remove unfinished entries of earlier states of this source, and report finished ones that are stale."""
    prefix = place.name.rsplit("-", 1)[0] + "-"
    for other in place.parent.iterdir():
        if other == place or not other.name.startswith(prefix) or not other.is_dir():
            continue
        if is_checkpoint(other):
            print(f"{other}: from an earlier state of the same source; remove it if unused", file=sys.stderr)
        elif (other / MARKER).exists():
            with suppress(Timeout), FileLock(f"{other}.lock").acquire(timeout=0):  # Timeout: it is still being written
                shutil.rmtree(other)
