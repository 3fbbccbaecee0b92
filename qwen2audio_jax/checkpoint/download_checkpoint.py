"""Local copies of bucket checkpoints: copied once into the cache folder, and read there.

The manifest is written last, as everywhere, so that an interrupted copy is not a checkpoint; it is resumed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from qwen2audio_jax.checkpoint.conversion_cache import default_cache_dir, made_once, named
from qwen2audio_jax.checkpoint.disk import check_disk
from qwen2audio_jax.checkpoint.hf_folder import SETTINGS
from qwen2audio_jax.checkpoint.ranges import REQUEST_BYTES
from qwen2audio_jax.checkpoint.reader import MANIFEST, MARKER, check_files, is_checkpoint, read_manifest
from qwen2audio_jax.storage.bucket import BucketPath, PathOrUrl, folder_at
from qwen2audio_jax.storage.write_whole import draft_of, write_whole

_THREADS = 4
"""Objects copied at once."""


def local_checkpoint(place: PathOrUrl, *, cache_dir: Path | None = None) -> Path:
    """A checkpoint's local folder: the folder itself, or the copy of one in a bucket, made on first use.

    Args:
        place: a finished checkpoint; a local folder is not checked.
        cache_dir: where copies are kept; default: `default_cache_dir()`.

    Raises:
        ValueError: the URL has no finished checkpoint, or an incomplete one, or its manifest names files outside.
        OSError: reading or writing fails; the same call resumes from there.
    """
    folder = folder_at(place)
    return folder if isinstance(folder, Path) else _copied(folder, cache=cache_dir or default_cache_dir())


def _copied(folder: BucketPath, *, cache: Path) -> Path:
    read_manifest(folder)  # refuses anything but a finished checkpoint
    content = (folder / MANIFEST).read_bytes()
    place = named(cache, label=folder.name, told_by=(str(folder), content.decode()))
    if is_checkpoint(place):
        return place
    with made_once(place, source=folder, doing="copying"):
        if not is_checkpoint(place):
            print(f"{folder}: copying once into {place}", file=sys.stderr)
            _copy(folder, place, content=content)
    return place


def _copy(folder: BucketPath, place: Path, *, content: bytes) -> None:
    listed = read_manifest(folder)["files"]
    for name in listed:
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
            raise ValueError(f"{folder}: its {MANIFEST} names the file {name!r}; only files within it are copied")
    beside = [name for name in ("config.json", *SETTINGS) if (folder / name).is_file()]
    sizes = {**{name: (folder / name).stat().st_size for name in beside}, **listed}
    left = {name: size for name, size in sizes.items() if not _is_there(place / name, size=size)}
    check_disk(place, needed=sum(left.values()))
    place.mkdir(exist_ok=True)
    (place / MARKER).touch()
    check_files(folder, listed=listed)
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(_copy_file, folder / name, place / name, size=size) for name, size in left.items()]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    write_whole(place / MANIFEST, content)
    (place / MARKER).unlink()


def _is_there(path: Path, *, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _copy_file(source: BucketPath, target: Path, *, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(target) as draft, open(draft, "wb") as file:
        for start in range(0, size, REQUEST_BYTES):
            block = bytearray(min(REQUEST_BYTES, size - start))
            source.read_into(memoryview(block), start)
            file.write(block)
