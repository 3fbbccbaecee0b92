"""The folder for conversions and copies of checkpoints: $QWEN2AUDIO_CACHE, else ~/.cache/qwen2audio_jax.

Where there is no home folder, or it cannot be written (containers, functions in a cloud), it is a folder of the user's
own among the temporary files.

The name of an entry encodes its source and the source's state, so a source that changes gets a new entry. One whose
weights were converted before links to the parameters of that entry and has only its settings of its own.
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

from qwen2audio_jax.checkpoint.reader import MARKER, PARAMS, is_checkpoint


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


def is_usable(place: Path) -> bool:
    """Return True for a finished checkpoint whose parameters, which may be those of another entry, are there."""
    return is_checkpoint(place) and (place / PARAMS).exists()


def holds_weights(place: Path) -> bool:
    """Return True for a finished checkpoint with parameters of its own."""
    return is_usable(place) and not (place / PARAMS).is_symlink()


@contextmanager
def made_once(place: Path, *, source: object, doing: str) -> Iterator[None]:
    """Make a checkpoint in the cache, at `place`, under a lock against other processes.

    Args:
        place: of the entry; what cannot be used of it and of earlier states of its source is removed.
        source: named in what is said.
        doing: "converting" or "copying".

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
            if not is_usable(place):
                _tidy(place)
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


def earlier_states(place: Path) -> list[Path]:
    """The other entries of the source of `place`: its earlier states, and what was left of unfinished ones."""
    prefix = place.name.rsplit("-", 1)[0] + "-"
    return [
        other
        for other in sorted(place.parent.iterdir())
        if other != place and other.name.startswith(prefix) and other.is_dir()
    ]


def _tidy(place: Path) -> None:
    """Remove unfinished entries of earlier states of this source, and links to parameters that are gone."""
    for other in [place, *earlier_states(place)]:
        if is_checkpoint(other) and not is_usable(other):
            shutil.rmtree(other)
        elif other != place and (other / MARKER).exists():
            with suppress(Timeout), FileLock(f"{other}.lock").acquire(timeout=0):  # Timeout: it is still being written
                shutil.rmtree(other)
