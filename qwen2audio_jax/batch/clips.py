"""Clips of records: where the sound that a record names is."""

import os
from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.audio.opening import is_url
from qwen2audio_jax.config.strict_json import describe
from qwen2audio_jax.engine.clips import Clip, FilePiece


def locate(source: Any, *, root: str) -> Clip:
    """The clip that a record names.

    Args:
        source: a path, an http(s), data: or bucket URL, or {"file", "offset", "size"} for a piece of a file.
        root: folder or URL of a folder that relative paths start from.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Mapping):
        numbers: list[Any] = [source.get(key) for key in ("offset", "size")]
        if set(source) != {"file", "offset", "size"} or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError('a piece of a file is {"file": path, "offset": bytes, "size": bytes}, and nothing else')
        file = locate(source["file"], root=root)
        if not isinstance(file, str) or is_url(file):
            raise ValueError(f"the clip is a piece of {describe(source['file'])}, which is no local file")
        return FilePiece(file, numbers[0], numbers[1])
    if not isinstance(source, str) or not source or "\0" in source:
        raise ValueError(f"the clip {describe(source)} is neither a path nor a URL")
    if is_url(source):
        return source
    return f"{root}/{source}" if is_url(root) else os.path.join(root, os.path.expanduser(source))
