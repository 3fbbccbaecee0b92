"""`qwen2audio models`: the conversions and copies in the cache folder, their sizes, and their removal."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from qwen2audio_jax.checkpoint.cache_entries import list_entries, not_needed, remove_entries
from qwen2audio_jax.checkpoint.conversion_cache import default_cache_dir
from qwen2audio_jax.cli.output import say, write


def models(options: argparse.Namespace) -> int:
    """List the entries, or remove those that are named, or those that nothing needs.

    Raises:
        ValueError: an entry cannot be removed.
    """
    cache = default_cache_dir() if options.cache_dir is None else Path(options.cache_dir)
    if options.remove or options.clean:
        names = [*options.remove, *(not_needed(list_entries(cache)) if options.clean else [])]
        freed = remove_entries(cache, names)
        if options.quiet and not options.json:
            return 0
        if not options.json:
            say("".join(f"removed {name}\n" for name in names) + f"{size(freed)} freed")
            return 0
    entries = list_entries(cache)
    if options.json:
        write(json.dumps({"cache": str(cache), "models": [asdict(entry) for entry in entries]}) + "\n")
        return 0
    for entry in entries:
        beside = f", weights of {entry.weights}" if entry.weights else ""
        write(f"{entry.name}\n    {size(entry.bytes)}, {entry.state}{beside}; from {entry.source or 'unknown'}\n")
    total = size(sum(entry.bytes for entry in entries))
    write(f"{cache}: {len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {total}\n")
    if unused := not_needed(entries):
        write(f"{len(unused)} of them nothing needs: qwen2audio models --clean removes these\n")
    return 0


def size(count: int) -> str:
    """Bytes for people to read, in powers of 1000."""
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
