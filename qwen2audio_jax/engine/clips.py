"""Clips by name: paths, URLs and pieces of files, as `load_audio` takes them."""

from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.audio import AudioError
from qwen2audio_jax.audio.opening import is_url
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage.bucket import BucketPath


@dataclass(frozen=True)
class FilePiece:
    """A clip within a larger file, such as a member of a tar: `size` bytes from `offset` on."""

    file: str
    offset: int
    size: int


Clip = str | bytes | FilePiece
"""A path or URL, the sound itself, or a piece of a file."""


def open_clip(clip: Any) -> Any:
    """The clip as `load_audio` takes it: pieces of files and objects in buckets are read here.

    Raises:
        AudioError: the object or the file cannot be read ("missing"), or is too large ("too_large").
    """
    if isinstance(clip, FilePiece):
        return _read_piece(clip)
    if not isinstance(clip, str) or not is_url(clip) or clip[:5].lower() in ("data:", "http:", "https"):
        return clip
    try:
        return b"".join(BucketPath(clip).pieces(most=LIMITS.file_bytes))
    except FileNotFoundError:
        raise AudioError(f"'{clip}' is not in its bucket: check the name", kind="missing") from None
    except ValueError:
        raise AudioError(
            f"'{clip}' cannot be read from its bucket: check the URL, your credentials, and that it has no more than "
            f"{LIMITS.file_bytes} bytes",
            kind="url",
        ) from None
    except OSError:
        raise AudioError(f"'{clip}' did not arrive from its bucket in any attempt", kind="url") from None


def _read_piece(piece: FilePiece) -> bytes:
    if piece.size > LIMITS.file_bytes:
        raise AudioError(
            f"the clip at byte {piece.offset} of '{piece.file}' has {piece.size} bytes, and {LIMITS.file_bytes} are "
            "read at most: split it",
            kind="too_large",
        )
    try:
        with open(piece.file, "rb") as file:
            file.seek(piece.offset)
            content = file.read(piece.size)
    except OSError as error:
        raise AudioError(
            f"'{piece.file}' cannot be opened ({error.strerror}): check the path", kind="missing"
        ) from None
    if len(content) < piece.size:
        raise AudioError(
            f"'{piece.file}' ends within the clip at byte {piece.offset}: copy the file again", kind="truncated"
        )
    return content
