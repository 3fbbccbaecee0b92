"""Whether a disk has room for what is about to be written: seen before, not after half of it."""

import shutil
from pathlib import Path


def check_disk(dst: Path, *, needed: int) -> None:
    """Raise a `ValueError` unless `needed` bytes, and a little for the file system, are free where `dst` will be."""
    place = dst.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed += needed // 50 + (1 << 20)  # Orbax's index and the file system's own
    if free < needed:
        raise ValueError(
            f"{dst}: the converted checkpoint needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some, or choose a folder on another disk"
        )
