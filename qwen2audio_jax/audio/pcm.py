"""Headers of files that hold plain samples in chunks: wav (RIFF, RIFX, RF64, BW64), w64, aiff, caf and au.

A decoder hides the length that such a header states, and plays a cut file as if it were whole. But what stands there
may be no length: a program that writes to a pipe cannot know it, and leaves a placeholder.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from qwen2audio_jax.audio.errors import AudioError, corrupt, truncated
from qwen2audio_jax.audio.formats import Content, recognise

PLACEHOLDER = 1_000_000_000
"""Bytes of sound from which on a size is taken for no length: 0x7FFFFFFF, 0xFFFFFFFF, 2000000000 and others are in use.

A file of this size is longer than any clip, whatever its rate."""

CHUNKS = 1000
"""Most chunks in front of the sound."""

GUID = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family of files writes its chunks: a name, a size, and what follows."""

    start: int
    """Of the first chunk."""
    order: str
    """Of bytes in numbers, as `struct` writes it."""
    name_bytes: int = 4
    size: str = "I"
    """Format of a chunk's size."""
    whole: bool = False
    """Whether a chunk's size counts its header."""
    align: int = 2
    form: bytes = b"fmt "
    data: bytes = b"data"
    extra: int = 0
    """Bytes of a data chunk in front of the sound."""


FAMILIES = {
    b"RIFF": Family(start=12, order="<"),
    b"RF64": Family(start=12, order="<"),
    b"BW64": Family(start=12, order="<"),
    b"RIFX": Family(start=12, order=">"),
    b"riff": Family(
        start=40, order="<", name_bytes=16, size="Q", whole=True, align=8, form=b"fmt " + GUID, data=b"data" + GUID
    ),
    b"FORM": Family(start=12, order=">", form=b"COMM", data=b"SSND", extra=8),
    b"caff": Family(start=8, order=">", size="Q", align=1, form=b"desc", extra=4),
}

WAV_CODECS = {1: "PCM", 3: "FLOAT", 6: "ALAW", 7: "ULAW"}
AU_CODECS = {1: ("ULAW", 1), 2: ("PCM", 1), 3: ("PCM", 2), 4: ("PCM", 3), 5: ("PCM", 4), 6: ("FLOAT", 4)}
AU_CODECS |= {7: ("FLOAT", 8), 27: ("ALAW", 1)}
AIFC_CODECS = {b"NONE": "PCM", b"twos": "PCM", b"sowt": "PCM", b"fl32": "FLOAT", b"fl64": "FLOAT"}
AIFC_CODECS |= {b"alaw": "ALAW", b"ulaw": "ULAW"}


@dataclass(frozen=True, kw_only=True)
class Pcm:
    """The sound of such a file.

    Attributes:
        subtype: libsndfile's name of the samples' coding; None for a coding that is not plain (ADPCM, for example).
        order: of the bytes of a sample, "<" or ">".
        rate, channels: of the samples; 0 where `subtype` is None.
        frame_bytes: of one sample of every channel.
        start: where the sound begins.
        there: bytes of sound that the file holds.
        stated: bytes of sound that its header states; None where it states a placeholder.
        end: where what belongs to the file ends, and another one may begin.
    """

    subtype: str | None
    order: str
    rate: int
    channels: int
    frame_bytes: int
    start: int
    there: int
    stated: int | None
    end: int


@dataclass(frozen=True)
class Samples:
    """What a format chunk says of the samples."""

    codec: str | None
    order: str
    rate: int
    channels: int
    width: int
    """Bytes of a sample."""


def read_pcm(file: BinaryIO, content: Content, *, name: str) -> Pcm:
    """Read the header of a file of samples.

    Raises:
        AudioError: it ends before the sound ("truncated"), or contradicts itself ("corrupt").
    """
    file.seek(content.start)
    head = file.read(40)
    if content.format == "au":
        return _read_au(head, content, name)
    family, position = FAMILIES[head[:4]], content.start + FAMILIES[head[:4]].start
    samples, large = None, None
    for _ in range(CHUNKS):
        file.seek(position)
        step = family.name_bytes + struct.calcsize("=" + family.size)
        chunk = file.read(step)
        if len(chunk) < step:
            raise truncated(name, f"its {content.size} bytes end before the chunk that holds the sound", silent=True)
        kind = chunk[: family.name_bytes]
        size = struct.unpack(family.order + family.size, chunk[family.name_bytes :])[0]
        size -= step if family.whole and size >= step else 0
        position += step
        if kind == family.data:
            break
        if kind == b"ds64":
            large = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
        elif kind == family.form:
            samples = _read_samples(head, file.read(min(size, 64)), family.order)
        position += size + -size % family.align
    else:
        raise corrupt(name, f"the sound is not among its first {CHUNKS} chunks")
    size = large if large is not None and size == 0xFFFFFFFF else size
    position, size = position + family.extra, max(size - family.extra, 0)
    end = skip_chunks(file, position + size + -size % family.align, content, family=family)
    return _found(samples, position, size, content, end=end)


def skip_chunks(file: BinaryIO, position: int, content: Content, *, family: Family) -> int:
    """Where the chunks that begin here end: at the end of the file, at another file, or at what is no chunk."""
    step = family.name_bytes + struct.calcsize("=" + family.size)
    while position < content.size:
        file.seek(position)
        head = file.read(512)
        name = head[:4]
        if len(head) < step or recognise(head) or not (name.isascii() and name.decode().isprintable()):
            return position
        size = struct.unpack(family.order + family.size, head[family.name_bytes : step])[0]
        position += max(size, step) if family.whole else step + size + -size % family.align
    return position


def _found(samples: Samples | None, start: int, size: int, content: Content, *, end: int) -> Pcm:
    """The header's result; `end` is where what belongs to the file ends."""
    there = max(content.size - start, 0)
    # Some programs count the header's bytes as sound, which gives the file's own size or 8 less.
    placeholder = size >= PLACEHOLDER or size in (content.size, content.size - 8) or (size == 0 and end != content.size)
    stated = None if placeholder and size != there else size
    if samples is None or samples.codec is None or samples.channels < 1 or samples.rate < 1:
        plain, samples = None, samples or Samples(None, "<", 0, 0, 0)
    else:
        plain = _subtype(samples)
    return Pcm(
        subtype=plain,
        order=samples.order,
        rate=samples.rate,
        channels=samples.channels,
        frame_bytes=samples.channels * samples.width,
        start=start,
        there=there if stated is None else min(there, stated),
        stated=stated,
        end=end,
    )


def _subtype(samples: Samples) -> str | None:
    """The name that libsndfile has; None for widths that do not exist."""
    if samples.codec == "PCM":
        signed = samples.order == ">"
        return {1: "PCM_S8" if signed else "PCM_U8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}.get(samples.width)
    if samples.codec == "FLOAT":
        return {4: "FLOAT", 8: "DOUBLE"}.get(samples.width)
    return samples.codec if samples.width == 1 else None


def _read_samples(head: bytes, form: bytes, order: str) -> Samples | None:
    """The format chunk of a file that begins with `head`."""
    if head[:4] == b"FORM":
        return _read_comm(form)
    return _read_desc(form) if head[:4] == b"caff" else _read_fmt(form, order)


def _read_fmt(form: bytes, order: str) -> Samples | None:
    if len(form) < 16:
        return None
    codec, channels, rate, _, frame_bytes, bits = struct.unpack(order + "HHIIHH", form[:16])
    if codec == 0xFFFE and len(form) >= 26:
        codec = struct.unpack(order + "H", form[24:26])[0]
    width = -(-bits // 8)
    plain = frame_bytes == channels * width
    # Samples of one byte are unsigned here, in the order of bytes that stands for it.
    return Samples(WAV_CODECS.get(codec) if plain else None, order if width > 1 else "<", rate, channels, width)


def _read_comm(form: bytes) -> Samples | None:
    if len(form) < 18:
        return None
    channels, _, bits, exponent, mantissa = struct.unpack(">HIHHQ", form[:18])
    codec = form[18:22] if len(form) >= 22 else b"NONE"
    order = "<" if codec == b"sowt" and bits > 8 else ">"
    width = 1 if codec in (b"alaw", b"ulaw") else -(-bits // 8)
    # The rate is a float of 80 bits; more than 2^31 is none.
    rate = mantissa >> 16446 - exponent if 16383 <= exponent < 16383 + 31 else 0
    return Samples(AIFC_CODECS.get(codec.replace(b"FL", b"fl")), order, rate, channels, width)


def _read_desc(form: bytes) -> Samples | None:
    if len(form) < 32:
        return None
    rate, codec, flags, packet, frames, channels, bits = struct.unpack(">d4sIIIII", form[:32])
    name = {b"lpcm": "FLOAT" if flags & 1 else "PCM", b"alaw": "ALAW", b"ulaw": "ULAW"}.get(codec)
    width = -(-bits // 8)
    plain = frames == 1 and packet == channels * width and 0 < rate < 1 << 31 and rate % 1 == 0
    order = "<" if flags & 2 and width > 1 else ">"
    return Samples(name if plain else None, order, int(rate) if plain else 0, channels, width)


def _read_au(head: bytes, content: Content, name: str) -> Pcm:
    if len(head) < 24:
        raise truncated(name, f"its {content.size} bytes end within its header", silent=True)
    offset, size, codec, rate, channels = struct.unpack(">IIIII", head[4:24])
    if offset < 24:
        raise AudioError(f"{name} is damaged: its sound begins at byte {offset}, within its header", kind="corrupt")
    plain, width = AU_CODECS.get(codec, (None, 0))
    samples = Samples(plain, ">", rate, channels, width)
    return _found(samples, content.start + offset, size, content, end=content.start + offset + size)
