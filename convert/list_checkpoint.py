"""Contents of a checkpoint as a listing, read from the manifest alone."""

import json
from typing import Any

from qwen2audio_jax.checkpoint.manifest import totals
from qwen2audio_jax.checkpoint.reader import read_manifest
from qwen2audio_jax.storage.bucket import PathOrUrl

_SHOWN = ("format", "version", "tool", "source")


def inspect(path: PathOrUrl) -> dict[str, Any]:
    """The manifest's `format`, `version`, `tool`, `source`, `totals` and `parameters`.

    Raises:
        ValueError: `path` holds no finished checkpoint.
    """
    manifest = read_manifest(path)
    shown = {key: manifest.get(key) for key in _SHOWN}
    return {**shown, "totals": totals(manifest["parameters"]), "parameters": manifest["parameters"]}


def as_json(contents: dict[str, Any]) -> str:
    """The result of `inspect` as JSON."""
    return json.dumps(contents, indent=1)


def as_table(contents: dict[str, Any]) -> str:
    """The result of `inspect` as a table: one parameter per line, and the totals last."""
    rows = [
        (name, "x".join(map(str, each["shape"])), each["dtype"], str(each["bytes"]))
        for name, each in contents["parameters"].items()
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, dtype, size in rows
    ]
    total = contents["totals"]
    lines.append(f"{total['tensors']} tensors, {total['parameters']} parameters, {total['bytes']} bytes")
    return "\n".join(lines)
