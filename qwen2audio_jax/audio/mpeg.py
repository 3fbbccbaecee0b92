"""MPEG audio frames of MP3 and ADTS (raw AAC) files: sequences of frames whose headers state their lengths."""

from dataclasses import dataclass
from typing import BinaryIO

from qwen2audio_jax.audio.formats import Content

# Kilobits a second by index, layer III: MPEG 1, and MPEG 2 and 2.5. Index 0 ("free") states no frame length.
BITRATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
BITRATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
RATES = (44_100, 48_000, 32_000)
RESYNC_BYTES = 65_536
"""How far a frame is looked for behind bytes that belong to none."""


@dataclass(frozen=True)
class Frame:
    """One MP3 frame header."""

    rate: int
    channels: int
    size: int
    info_at: int
    """Where in the frame a Xing or Info header would stand."""


@dataclass(frozen=True)
class Scan:
    """The frames of an MP3 file, the header frame not among them."""

    rate: int
    channels: int
    frames: int
    stated: int | None
    """How many the Xing, Info or VBRI header states; None without one."""
    cut: bool
    """Whether the file ends inside a frame."""


def parse_frame(head: bytes) -> Frame | None:
    """The frame that starts with these 4 bytes, or None where none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3  # version: 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if layer != 1 or version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    hertz = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kilobits = (BITRATES_1 if version == 3 else BITRATES_2)[bitrate]
    size = (144 if version == 3 else 72) * kilobits * 1000 // hertz + (head[2] >> 1 & 1)
    mono = head[3] >> 6 == 3
    side = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[version == 3, mono]
    return Frame(hertz, 1 if mono else 2, size, 4 + side)


def scan_mp3(file: BinaryIO, content: Content) -> Scan:
    """Walk the frames of an MP3 file by their headers."""
    position, frames, stated, cut = content.start, 0, None, False
    first: Frame | None = None
    while position + 4 <= content.size:
        file.seek(position)
        frame = parse_frame(file.read(4))
        if frame is None or (first is not None and frame.rate != first.rate):
            position = next_frame(file, position, first)
            if position < 0:
                break
            continue
        if position + frame.size > content.size:
            cut = True
            break
        if first is None:
            first = frame
            file.seek(position)
            stated = stated_frames(file.read(frame.size), frame)
            frames -= stated is not None
        frames += 1
        position += frame.size
    return Scan(first.rate if first else 0, first.channels if first else 0, max(frames, 0), stated, cut)


def stated_frames(data: bytes, frame: Frame) -> int | None:
    """The number of frames in the Xing, Info or VBRI header that a first frame may hold instead of sound."""
    info = data[frame.info_at :]
    if info[:4] in (b"Xing", b"Info") and len(info) >= 12 and info[7] & 1:
        return int.from_bytes(info[8:12], "big")
    if data[36:40] == b"VBRI" and len(data) >= 54:
        return int.from_bytes(data[50:54], "big")
    return None


def next_frame(file: BinaryIO, position: int, first: Frame | None) -> int:
    """The start of the next frame of the same rate after bytes outside any frame; -1 if there is none."""
    file.seek(position + 1)
    data = file.read(RESYNC_BYTES)
    at = data.find(0xFF)
    while at >= 0:
        frame = parse_frame(data[at : at + 4])
        if frame is not None and (first is None or frame.rate == first.rate):
            after = data[at + frame.size : at + frame.size + 4]
            # Two headers in a row, as one alone may be chance.
            if parse_frame(after) is not None:
                return position + 1 + at
        at = data.find(0xFF, at + 1)
    return -1


def adts_cut(file: BinaryIO, content: Content) -> bool | None:
    """True if an ADTS file ends inside a frame; None if there is other data between its frames."""
    position = content.start
    while position < content.size:
        file.seek(position)
        head = file.read(7)
        if head[:3] == b"TAG" and content.size - position == 128:  # an ID3v1 tag
            return False
        if len(head) < 7:
            return True
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or size < 7:
            return None
        position += size
    return position > content.size
