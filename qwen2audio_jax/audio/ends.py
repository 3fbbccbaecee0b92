"""Ends of files: what shows that a file stops in the midst of its sound, where no decoder says so."""

from collections.abc import Iterator
from typing import BinaryIO

from qwen2audio_jax.audio.formats import Content
from qwen2audio_jax.audio.mpeg import frame_bytes, stated_frames

OGG_PAGE = 27 + 255 + 255 * 255
"""Bytes of the longest page."""

BLOCKS = (b"\xa3", b"\xa0", b"\x1f\x43\xb6\x75")
"""First bytes of what holds sound in a matroska file: a block, a group, a cluster."""


def boxes(file: BinaryIO, content: Content) -> Iterator[tuple[bytes, int]]:
    """The outermost boxes of an mp4 file, each with its end, which may lie beyond the file."""
    position = content.start
    while position < content.size:
        file.seek(position)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:  # to the end of the file
            size = content.size - position
        if len(head) < 8 or size < 8:
            return
        position += size
        yield head[4:8], position


def is_flac_piece(file: BinaryIO, content: Content) -> bool:
    """Whether a FLAC file is a piece of another, whose duration it may state: its first frame is a later one."""
    position, last = content.start + 4, False
    while not last and position < content.size:
        file.seek(position)
        head = file.read(4)
        last = len(head) < 4 or bool(head[0] & 0x80)
        position += 4 + int.from_bytes(head[1:], "big")
    file.seek(position)
    frame = file.read(5)
    return len(frame) == 5 and frame[4] != 0  # its number


def ogg_start(file: BinaryIO, *, first: int) -> str | None:
    """What shows that the beginning of an Ogg file was not heard: in front of the first page is one that ends later.

    Pages of headers end at 0.
    """
    start = max(first - OGG_PAGE, 0)
    file.seek(start)
    front = file.read(first - start)
    at = front.rfind(b"OggS")
    return (
        "its first page is damaged"
        if at >= 0 and 0 < int.from_bytes(front[at + 6 : at + 14], "little") < 1 << 63
        else None
    )


def ogg_cut(file: BinaryIO, content: Content, *, last: int | None) -> str | None:
    """What shows that an Ogg file ends within a page, or that its end was not heard.

    That the last page is marked as the last of its stream shows nothing: many programs leave the mark out.

    Args:
        file: the file.
        content: its format and place.
        last: where the page of the last packet begins; None where it has several streams.
    """
    start = max(content.start, content.size - OGG_PAGE)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    segments = tail[at + 26] if at + 26 < len(tail) else 255
    sound = sum(tail[at + 27 : at + 27 + segments])
    if at >= 0 and at + 27 + segments + sound > len(tail):
        return "it ends within a page"
    return "its last page is damaged" if at >= 0 and sound and last is not None and start + at > last else None


def matroska_cut(file: BinaryIO, last: int) -> str | None:
    """What shows that a matroska file ends within a block: it begins behind the `last` byte of a whole one."""
    file.seek(last)
    # A block's own header of 4 bytes is not counted in its packet.
    return "it ends within a block" if file.read(12)[4:].startswith(BLOCKS) else None


def mpeg_cut(file: BinaryIO, content: Content, *, frames: int, last: bytes) -> str | None:
    """What shows that an mp3 file is shorter than it says.

    Args:
        file: the file.
        content: its format and place.
        frames: that were found, without the one that states how many there are.
        last: the last of them.
    """
    file.seek(content.start)
    head = file.read(200)
    stated = stated_frames(head)
    partial = len(last) < (frame_bytes(last) or 0)
    # Some encoders count the frame that holds the number.
    if stated is not None:
        short = frames - partial < stated - 1
        return f"its header states {stated} frames and {frames - partial} are there" if short else None
    # What does not begin with a frame is a piece of something longer, which ends as it begins.
    if partial and frame_bytes(head) is not None and not content.inside:
        return "its last frame is cut"
    return None
