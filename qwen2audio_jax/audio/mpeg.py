"""Frames of MPEG audio (mp3, mp2): what their headers state, and where the first one is."""

# Kilobits a second by index: layers I, II and III of MPEG 1, then layer I and layers II and III of MPEG 2 and 2.5.
# Index 0 ("free") states no frame length.
BITRATES = {
    (3, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = (44_100, 48_000, 32_000)
CHAIN = 4
"""Frames in a row that make sound of bytes which begin with something else: one header may be chance."""


def frame_bytes(head: bytes) -> int | None:
    """The length of the frame that starts with these 4 bytes; None where none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    # Version: 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5.
    version, layer, bitrate, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    newer = version != 3
    hertz = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = BITRATES[2 if newer else 3, min(layer, 2) if newer else layer][bitrate] * 1000
    padding = head[2] >> 1 & 1
    if layer == 1:
        return (12 * bits // hertz + padding) * 4
    return (72 if newer and layer == 3 else 144) * bits // hertz + padding


def find_frames(data: bytes) -> int | None:
    """The start of the first frames in a row of the same kind; None if there are none."""
    at = data.find(0xFF)
    while at >= 0:
        position, count = at, 0
        while count < CHAIN and (size := frame_bytes(data[position : position + 4])) is not None:
            if data[position + 1] != data[at + 1] or (data[position + 2] ^ data[at + 2]) & 0x0C:
                break
            position, count = position + size, count + 1
        if count == CHAIN:
            return at
        at = data.find(0xFF, at + 1)
    return None


def stated_frames(head: bytes) -> int | None:
    """The number of frames that the Xing, Info or VBRI header in a first frame states; None without one."""
    for mark in (b"Xing", b"Info"):
        at = head.find(mark, 4, 4 + 36)
        if at >= 0 and len(head) >= at + 12 and head[at + 7] & 1:
            return int.from_bytes(head[at + 8 : at + 12], "big") or None
    if head[36:40] == b"VBRI" and len(head) >= 54:
        return int.from_bytes(head[50:54], "big") or None
    return None
