"""Header checks of files decoded by soundfile: stated rate and length, and truncation.

libsndfile plays a truncated file without an error. So the length that a file states is read here first and compared
with the bytes present, without decoding.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.formats import Content
from qwen2audio_jax.audio.mpeg import scan_mp3

WAV_CODECS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}
EXTENSIBLE = 0xFFFE
UNKNOWN_SIZE = 0xFFFFFFFF


@dataclass(frozen=True)
class Stated:
    """The values that a header states; None if it does not."""

    rate: int | None = None
    channels: int | None = None
    frames: int | None = None
    counted: int | None = None
    """For MP3, frames (samples per channel) of the blocks in the file, of which encoders trim some at both ends."""


def truncated(name: str, found: str) -> AudioError:
    """The error for a file that ends before its own header says so."""
    return AudioError(f"{name} is truncated: {found}. Get the whole file, or write it anew", kind="truncated")


def corrupt(name: str, found: str) -> AudioError:
    """The error for a file whose content contradicts itself."""
    return AudioError(f"{name} is damaged: {found}. Get an intact copy, or write it anew", kind="corrupt")


def read_header(file: BinaryIO, content: Content, *, name: str) -> Stated:
    """Read the header of a wav, flac, ogg or mp3 file; AudioError "truncated" if the file is shorter than stated."""
    return {"wav": read_wav, "flac": read_flac, "ogg": read_ogg, "mp3": read_mp3}[content.format](file, content, name)


def read_wav(file: BinaryIO, content: Content, name: str) -> Stated:
    """Walk the chunks of a RIFF or RF64 file up to its data.

    A data size of 0xFFFFFFFF (what a program writes that cannot seek back, such as ffmpeg to a pipe) is refused like
    any other size that is larger than the file: whether such a file is whole cannot be told.
    """
    file.seek(content.start)
    long_sizes = file.read(12)[:4] == b"RF64"
    position, form, data_size_64 = content.start + 12, None, None
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            raise truncated(name, f"its {content.size} bytes end before the chunk that holds the sound")
        kind, size = head[:4], struct.unpack("<I", head[4:])[0]
        position += 8
        if kind == b"data":
            break
        if kind == b"ds64" and long_sizes:
            fields = file.read(16)
            if len(fields) == 16:
                data_size_64 = struct.unpack("<QQ", fields)[1]
        if kind == b"fmt ":
            form = file.read(min(size, 40))
        position += size + size % 2
    if form is None or len(form) < 16:
        raise corrupt(name, "no complete 'fmt ' chunk stands before the sound")
    rate, channels, frame_bytes = wav_frame(form, name)
    if long_sizes and data_size_64 is not None and size == UNKNOWN_SIZE:
        size = data_size_64
    there = content.size - position
    if size > there:
        hint = " (the largest number, left by a program that could not seek back, such as ffmpeg to a pipe)"
        raise truncated(
            name, f"its header states {size} bytes of sound and {there} are there{hint if size == UNKNOWN_SIZE else ''}"
        )
    if size == 0 and there > 0:
        raise corrupt(name, f"its header states no sound and {there} bytes follow; its recording was not finished")
    return Stated(rate, channels, size // frame_bytes)


def wav_frame(form: bytes, name: str) -> tuple[int, int, int]:
    """Rate, channels and bytes a frame from the 'fmt ' chunk of a WAV file."""
    codec, channels, rate, _, frame_bytes, bits = struct.unpack("<HHIIHH", form[:16])
    if codec == EXTENSIBLE and len(form) >= 26:
        codec = struct.unpack("<H", form[24:26])[0]
    if codec not in WAV_CODECS:
        raise AudioError(
            f"{name} is a WAV file with codec 0x{codec:04x}, which is not decoded. Accepted: "
            f"{', '.join(WAV_CODECS.values())}. Convert it to PCM",
            kind="format",
        )
    if channels == 0 or frame_bytes != channels * -(-bits // 8) or frame_bytes == 0:
        raise corrupt(name, f"its header states {channels} channels of {bits} bits in frames of {frame_bytes} bytes")
    return rate, channels, frame_bytes


def read_flac(file: BinaryIO, content: Content, name: str) -> Stated:
    """Read STREAMINFO, and the lengths of the metadata blocks after it; a total of 0 means that none is stated."""
    position, stated = content.start + 4, None
    last = False
    while not last:
        file.seek(position)
        head = file.read(4)
        if len(head) < 4:
            raise truncated(name, f"its {content.size} bytes end inside its metadata")
        last, kind, size = bool(head[0] & 0x80), head[0] & 0x7F, int.from_bytes(head[1:], "big")
        if stated is None:
            if kind != 0 or size < 34:
                raise corrupt(name, "its first metadata block is not STREAMINFO")
            block = file.read(18)
            if len(block) < 18:
                raise truncated(name, f"its {content.size} bytes end inside its metadata")
            fields = int.from_bytes(block[10:18], "big")  # rate 20 bits, channels 3, bits a sample 5, frames 36
            frames = fields & (1 << 36) - 1
            stated = Stated(fields >> 44, (fields >> 41 & 7) + 1, frames or None)
        position += 4 + size
    if position > content.size or (position == content.size and stated and stated.frames):
        raise truncated(name, f"its {content.size} bytes end before the sound")
    assert stated is not None
    return stated


def read_ogg(file: BinaryIO, content: Content, name: str) -> Stated:
    """Check that the file ends with the end-of-stream page of the stream that it starts with.

    The length is in that last page, where libsndfile reads it, as it does rate and channels.
    """
    file.seek(content.start)
    serial = file.read(27)[14:18]
    # A page has at most 27 + 255 + 255 * 255 bytes; what follows the last one is not sound.
    tail_start = max(content.start, content.size - 2 * 65_307)
    file.seek(tail_start)
    tail = file.read()
    at, last = tail.find(b"OggS"), -1
    while at >= 0:
        if page_end(tail, at) <= len(tail):
            last = at
        at = tail.find(b"OggS", at + 1)
    if last < 0 or not tail[last + 5] & 4:
        raise truncated(name, "its last page does not mark the end of the stream")
    if tail[last + 14 : last + 18] != serial:
        raise AudioError(
            f"{name} holds several Ogg streams, of which only one would be heard. Split them, or write them as one",
            kind="format",
        )
    return Stated()


def page_end(tail: bytes, at: int) -> int:
    """The end of the Ogg page that starts at `at`; beyond `tail` if the page is incomplete."""
    segments = tail[at + 26] if at + 26 < len(tail) else 255
    return at + 27 + segments + sum(tail[at + 27 : at + 27 + segments])


def read_mp3(file: BinaryIO, content: Content, name: str) -> Stated:
    """Count the frames of an MP3 file, and compare with the count in its Xing, Info or VBRI header, if it has one.

    Without that header a file cut between two frames is indistinguishable from a complete one.
    """
    scan = scan_mp3(file, content)
    if scan.frames == 0:
        raise truncated(name, f"its {content.size} bytes hold no whole MP3 frame")
    if scan.stated is not None and scan.frames < scan.stated:
        raise truncated(name, f"its header states {scan.stated} MP3 frames and {scan.frames} are there")
    if scan.stated is None and scan.cut:
        raise truncated(name, f"its last MP3 frame, the one after {scan.frames}, is cut")
    return Stated(scan.rate, scan.channels, counted=scan.frames * (1152 if scan.rate >= 32_000 else 576))
