"""Truncation checks for files decoded by PyAV: boxes of mp4, elements of webm, frames of raw AAC.

ffmpeg plays a truncated file without an error. So the lengths in these containers are compared with the file's bytes
before anything is decoded.
"""

from typing import BinaryIO

from qwen2audio_jax.audio.formats import Content
from qwen2audio_jax.audio.headers import corrupt, truncated
from qwen2audio_jax.audio.mpeg import adts_cut

SEGMENT, CLUSTER, EBML = 0x18538067, 0x1F43B675, 0x1A45DFA3


def check_container(file: BinaryIO, content: Content, *, name: str) -> None:
    """Check that an mp4, webm or aac file is complete; AudioError "truncated" or "corrupt" if not."""
    {"mp4": check_mp4, "webm": check_webm, "aac": check_adts}[content.format](file, content, name)


def check_mp4(file: BinaryIO, content: Content, name: str) -> None:
    """Walk the outermost boxes: each must end inside the file, and the one that describes the audio must exist."""
    position, kinds = content.start, set()
    while position < content.size:
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            raise truncated(name, "it ends inside the header of a box")
        size, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:  # to the end of the file
            size = content.size - position
        if size < header or not all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in kind):
            raise corrupt(name, f"at byte {position} stands no box of an mp4 file")
        position += size
        kinds.add(kind)
        if position > content.size:
            raise truncated(name, f"its box '{kind.decode('latin-1')}' ends at byte {position} of {content.size}")
    if b"moov" not in kinds:
        raise truncated(name, "it has no 'moov' box, which is written when a recording is finished")


def check_webm(file: BinaryIO, content: Content, name: str) -> None:
    """Walk the elements of a webm file, down to the blocks if a live recording left outer lengths unknown."""
    position, clusters = content.start, 0
    while position < content.size:
        file.seek(position)
        head = file.read(12)
        try:
            kind, used = variable_int(head, keep_marker=True)
            size, more = variable_int(head[used:], keep_marker=False)
        except ValueError:
            if content.size - position < 12:
                raise truncated(name, "it ends inside the header of an element") from None
            raise corrupt(name, f"at byte {position} stands no element of a webm file") from None
        unknown = size == (1 << 7 * more) - 1
        position += used + more
        end = position if unknown else position + size
        if unknown and kind not in (SEGMENT, CLUSTER):
            raise corrupt(name, f"the element at byte {position} states no length")
        if end > content.size:
            raise truncated(name, f"an element of it ends at byte {end} of {content.size}")
        clusters += kind == CLUSTER
        if kind != SEGMENT:
            position = end
    if clusters == 0:
        raise truncated(name, "it holds no sound behind its headers")


def variable_int(data: bytes, *, keep_marker: bool) -> tuple[int, int]:
    """An EBML number and its length in bytes; ValueError if there is none."""
    if not data or data[0] == 0:
        raise ValueError("no number")
    length = 9 - data[0].bit_length()
    if len(data) < length:
        raise ValueError("cut number")
    value = int.from_bytes(data[:length], "big")
    return (value if keep_marker else value & (1 << 7 * length) - 1), length


def check_adts(file: BinaryIO, content: Content, name: str) -> None:
    """Walk the frames of a raw AAC file."""
    cut = adts_cut(file, content)
    if cut is None:
        raise corrupt(name, "between its AAC frames stands something else")
    if cut:
        raise truncated(name, "its last AAC frame is cut")
