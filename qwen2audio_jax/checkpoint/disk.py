"""Disk space check before writing."""

import shutil
from pathlib import Path


def check_disk(dst: Path, *, needed: int) -> None:
    """Raise a `ValueError` unless `needed` bytes, plus a margin for the file system, are free at `dst`."""
    place = dst.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed += needed // 50 + (1 << 20)  # Orbax's index and file system overhead
    if free < needed:
        raise ValueError(
            f"{dst}: the converted checkpoint needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some, or choose a folder on another disk"
        )
