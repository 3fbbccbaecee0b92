"""The folder in which conversions and copies of checkpoints are kept: $QWEN2AUDIO_CACHE, else ~/.cache/qwen2audio_jax.

A name in it tells where its content comes from and what that held then: a source that changes gets another.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qwen2audio_jax.checkpoint import MARKER, is_checkpoint


def default_cache_dir() -> Path:
    """The folder that conversions go to."""
    configured = os.environ.get("QWEN2AUDIO_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "qwen2audio_jax"


def digest_of(text: str) -> str:
    """What stands in names for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def named(folder: Path, *, label: str, told_by: tuple[str, ...]) -> Path:
    """A place in `folder`: its name says `label`, and differs where one of `told_by` does."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", label).strip(".-") or "checkpoint"
    return folder / "-".join([name, *map(digest_of, told_by)])


@contextmanager
def made_once(place: Path, *, source: object, doing: str) -> Iterator[None]:
    """Make a checkpoint in the cache, at `place`, while other processes that want to do so wait.

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
    except PermissionError as error:
        raise ValueError(
            f"{place.parent}: the cache folder cannot be written ({error.strerror}); point QWEN2AUDIO_CACHE at one "
            "that can"
        ) from None


def _tidy(place: Path) -> None:
    """Remove what killed processes left of earlier states of this source, and name finished ones that are stale."""
    prefix = place.name.rsplit("-", 1)[0] + "-"
    for other in place.parent.iterdir():
        if other == place or not other.name.startswith(prefix) or not other.is_dir():
            continue
        if is_checkpoint(other):
            print(f"{other}: from an earlier state of the same source; remove it if unused", file=sys.stderr)
        elif (other / MARKER).exists():
            with suppress(Timeout), FileLock(f"{other}.lock").acquire(timeout=0):  # Timeout: it is still being written
                shutil.rmtree(other)
