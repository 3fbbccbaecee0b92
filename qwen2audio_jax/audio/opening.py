"""Opening of sound: a path, URL, bytes or file object becomes a file that can be sought in, and what it holds."""

import io
import os
import stat
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

import numpy as np

from qwen2audio_jax.audio.data_url import BLANK, decode_data_url, looks_like_base64
from qwen2audio_jax.audio.errors import AudioError, read_faults
from qwen2audio_jax.audio.formats import Content, sniff
from qwen2audio_jax.limits import Limits


@dataclass(frozen=True)
class Opened:
    """An open sound file.

    Attributes:
        name: for messages.
        file: to be closed by whoever opened it.
        content: its format.
    """

    name: str
    file: BinaryIO
    content: Content


def open_sound(source: Any, *, limits: Limits, allow_private_urls: bool) -> Opened | None:
    """The file of a source; None for samples in memory.

    A path stays where it is; what a URL or a file object (from its current position on) holds is in memory.

    Args:
        source: as for `load_audio`, unwrapped.
        limits: of bytes, and of what a URL may take.
        allow_private_urls: also fetch from addresses that are not public.

    Raises:
        AudioError: it cannot be opened, is too large or empty, or holds no sound.
    """
    if isinstance(source, str) and is_url(source):
        name, file = _open_url(source, limits=limits, allow_private=allow_private_urls)
    elif isinstance(source, str | PathLike):
        name, file = _open_path(source, limits=limits)
    elif isinstance(source, bytes | bytearray | memoryview):
        name, file = f"the sound in {len(source)} bytes", io.BytesIO(source)
        _check_size(name, len(source), limits)
    elif hasattr(source, "read"):
        name, file = _open_stream(source, limits=limits)
    else:
        return None
    try:
        with read_faults(name):
            size = file.seek(0, io.SEEK_END)
            if size == 0:
                raise AudioError(f"{name} is empty (0 bytes): pass a file that holds sound", kind="empty")
            return Opened(name, file, sniff(file, size=size, name=name))
    except BaseException:
        file.close()
        raise


def is_url(source: str) -> bool:
    """Return True if a string is a URL rather than a path, with or without blanks around it."""
    source = source[:64].lstrip(BLANK)
    return "://" in source[:32] or source[:5].lower() == "data:"


def _shorten(text: str, limit: int = 200) -> str:
    """A text for a message, its middle elided if it is long."""
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 4 :]}"


def _open_url(url: str, *, limits: Limits, allow_private: bool) -> tuple[str, BinaryIO]:
    """The content of an http(s) or data: URL, and its name for messages."""
    # Imported here: local files need none of it.
    from qwen2audio_jax.audio.fetch import describe_url, fetch

    url = url.strip(BLANK)
    if url[:5].lower() == "data:":
        return "the sound in a data: URL", io.BytesIO(decode_data_url(url, limits=limits))
    return describe_url(url), io.BytesIO(fetch(url, limits=limits, allow_private=allow_private))


def _open_path(path: str | PathLike[str], *, limits: Limits) -> tuple[str, BinaryIO]:
    """An existing regular file, opened, and its name for messages."""
    name = f"'{_shorten(os.fspath(path))}'"
    try:
        # A file of this very name comes first: names may begin with ~.
        place = path if os.path.lexists(path) else os.path.expanduser(path)
        found = os.stat(place)
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
            # Opening a pipe may wait for ever, so only those who know it is one open it.
            remedy = "a sound file in it" if stat.S_ISDIR(found.st_mode) else "open(path, 'rb') instead of the path"
            raise AudioError(f"{name} is {kind}, no regular file: pass {remedy}", kind="missing")
        _check_size(name, found.st_size, limits)
        return name, open(place, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no path"
        remedy = "check the path"
        if looks_like_base64(os.fsdecode(path)):
            remedy = "if it is base64 of a sound, write 'data:;base64,' in front of it"
        raise AudioError(f"{name} cannot be opened ({reason}): {remedy}", kind="missing") from None


def _open_stream(stream: Any, *, limits: Limits) -> tuple[str, BinaryIO]:
    """The rest of a file object, read up to the limit, and its name for messages."""
    title = getattr(stream, "name", None)
    name = f"'{_shorten(title)}'" if isinstance(title, str) else "the file object"
    pieces, total = [], 0
    if isinstance(stream, io.TextIOBase):
        raise AudioError(f"{name} is open as text: open it in binary mode ('rb')", kind="dtype")
    while True:
        piece = stream.read(1 << 20)
        if hasattr(piece, "__await__"):
            piece.close()
            raise AudioError(f"{name} is read asynchronously: pass its bytes, as in await file.read()", kind="dtype")
        if isinstance(piece, np.ndarray):
            raise AudioError(
                f"{name} is an open {type(stream).__name__} that gives samples, not bytes: pass the file's path, or "
                "load_audio(file.read(), sampling_rate=file.samplerate)",
                kind="dtype",
            )
        if not isinstance(piece, bytes | bytearray):
            raise AudioError(
                f"{name} gives {type(piece).__name__}, not bytes: open it in binary mode ('rb')", kind="dtype"
            )
        if not piece:
            break
        pieces.append(piece)
        total += len(piece)
        _check_size(name, total, limits)
    return name, io.BytesIO(b"".join(pieces))


def _check_size(name: str, size: int, limits: Limits) -> None:
    """AudioError "too_large" for more bytes than a file may have."""
    if size > limits.file_bytes:
        raise AudioError(
            f"{name} has {size} bytes or more, and {limits.file_bytes} are read at most: split it, or compress it",
            kind="too_large",
        )
