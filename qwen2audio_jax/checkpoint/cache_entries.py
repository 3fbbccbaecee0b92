"""The entries of the cache folder: what each is, how large, and which of them nothing needs any more."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from qwen2audio_jax.checkpoint.conversion_cache import is_usable
from qwen2audio_jax.checkpoint.reader import MANIFEST, MARKER, PARAMS, is_checkpoint, read_manifest

READY, EARLIER, UNFINISHED, UNUSABLE = "ready", "earlier state", "unfinished", "unusable"
NOT_NEEDED = (EARLIER, UNFINISHED, UNUSABLE)


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        name: of its folder in the cache.
        source: what it was made from, as the manifest says; None if it is not finished.
        bytes: on disk, without what it links to.
        state: "ready"; "earlier state" of a source that has a newer entry; "unfinished"; or "unusable": of another
            version, or its parameters are gone.
        weights: the entry whose parameters it links to; None if it has its own.
        used_by: the entries that link to its parameters.
    """

    name: str
    source: str | None
    bytes: int
    state: str
    weights: str | None = None
    used_by: tuple[str, ...] = ()


def list_entries(cache: Path) -> list[Entry]:
    """The entries of a cache folder, by name; folders that are none are left out."""
    places = [place for place in sorted(cache.iterdir()) if _is_entry(place)] if cache.is_dir() else []
    newest: dict[str, Path] = {}
    for place in filter(is_usable, places):
        known = newest.setdefault(_prefix(place), place)
        if (place / MANIFEST).stat().st_mtime_ns > (known / MANIFEST).stat().st_mtime_ns:
            newest[_prefix(place)] = place
    entries = [_entry(place, newest=newest.get(_prefix(place))) for place in places]
    users: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.weights is not None:
            users.setdefault(entry.weights, []).append(entry)
    return [_with_users(entry, users.get(entry.name, [])) for entry in entries]


def remove_entries(cache: Path, names: Iterable[str]) -> int:
    """Remove entries; returns the bytes that they had.

    Raises:
        ValueError: no such entry, one that others link to and that are to stay, or one that is being written. Nothing
            is removed then, but for the last: what came before it is.
    """
    entries, wanted = {entry.name: entry for entry in list_entries(cache)}, list(dict.fromkeys(names))
    for name in wanted:
        if name not in entries:
            raise ValueError(f"{cache}: has no entry {name!r}; qwen2audio models lists them")
        if left := sorted(set(entries[name].used_by) - set(wanted)):
            raise ValueError(f"{name}: its weights are those of {', '.join(left)} as well; remove these with it")
    for name in wanted:
        lock = FileLock(f"{cache / name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{name}: another process is writing it; wait for it to end") from None
        try:
            shutil.rmtree(cache / name)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    return sum(entries[name].bytes for name in wanted)


def not_needed(entries: Iterable[Entry]) -> list[str]:
    """The names of those that can go: unfinished or unusable ones, and earlier states whose weights nothing uses."""
    return [entry.name for entry in entries if entry.state in NOT_NEEDED]


def _is_entry(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and ((place / MANIFEST).is_file() or (place / MARKER).exists())


def _prefix(place: Path) -> str:
    """What the entries of one source have in common: see `conversion_cache.named`."""
    return place.name.rsplit("-", 1)[0]


def _entry(place: Path, *, newest: Path | None) -> Entry:
    size = sum(file.lstat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())
    params = place / PARAMS
    weights = params.readlink().parent.name if params.is_symlink() else None
    source = str(read_manifest(place)["source"].get("source")) if is_checkpoint(place) else None
    if is_usable(place):
        state = READY if place == newest else EARLIER
    else:
        state = UNUSABLE if (place / MANIFEST).is_file() else UNFINISHED
    return Entry(place.name, source, size, state, weights)


def _with_users(entry: Entry, users: list[Entry]) -> Entry:
    """The entry with those that link to it; an earlier state stays as long as one that is ready does."""
    needed = entry.state == EARLIER and any(user.state == READY for user in users)
    return replace(entry, used_by=tuple(user.name for user in users), state=READY if needed else entry.state)
