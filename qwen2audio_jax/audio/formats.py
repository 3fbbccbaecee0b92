"""Audio format detection by content: the accepted formats, and names for rejected ones.

File name suffixes are ignored, because decoders get only the content.
"""

from dataclasses import dataclass
from typing import BinaryIO

from qwen2audio_jax.audio.errors import AudioError

SOUNDFILE_FORMATS = {"wav": ("WAV", "WAVEX", "RF64"), "flac": ("FLAC",), "ogg": ("OGG",), "mp3": ("MP3", "MPEG")}
"""Formats that soundfile decodes -> the names it has for them."""

AV_FORMATS = {"mp4": "mp4", "webm": "matroska", "aac": "aac"}
"""Formats that PyAV decodes -> the requested demuxer, so that no other one is tried."""

ACCEPTED = "wav, flac, mp3, ogg (Vorbis or Opus), m4a/mp4, aac (ADTS), webm"

OTHERS = {
    b"caff": "CAF",
    b".snd": "Sun AU",
    b"riff\x2e\x91\xcf\x11": "Sony Wave64",
    b"MATLAB 5.0": "MATLAB",
    b"NIST_1A": "NIST SPHERE",
    b"ajkg": "Shorten",
    b"wvpk": "WavPack",
    b"MAC ": "Monkey's Audio",
    b"MPCK": "Musepack",
    b"MP+": "Musepack",
    b"DSD ": "DSD",
    b"TTA1": "True Audio",
    b"#!AMR": "AMR",
    b"#!SILK": "SILK",
    b"\x02#!SILK": "SILK",
    b"Creative Voice File": "Creative VOC",
    b"MThd": "MIDI",
    b"\x30\x26\xb2\x75": "ASF/WMA",
    b"FLV": "FLV",
    b"RIFX": "big-endian WAV (RIFX)",
    b"BW64": "BW64",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF": "PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x93NUMPY": "a numpy array (load it with numpy.load and pass the array)",
    b"version https://git-lfs": "a Git LFS pointer, not the sound itself (fetch it with git lfs pull)",
}
"""First bytes -> common name of formats that are not decoded."""


@dataclass(frozen=True)
class Content:
    """The detected content of a file."""

    format: str
    """A key of SOUNDFILE_FORMATS or AV_FORMATS."""
    start: int
    """Offset of the audio data, after an ID3 tag."""
    size: int
    """Bytes in the file."""


def sniff(file: BinaryIO, *, size: int, name: str) -> Content:
    """The format of a seekable file from its first bytes; AudioError "format" names one that is not accepted."""
    start = skip_id3(file, size=size, name=name)
    file.seek(start)
    head = file.read(512)
    found = recognise(head)
    if found is not None:
        return Content(found, start, size)
    raise AudioError(
        f"{name} holds {describe(head)}, which is not decoded. Accepted: {ACCEPTED}. "
        "Convert it first, for example with `ffmpeg -i INPUT -ar 16000 -ac 1 OUTPUT.wav`",
        kind="format",
    )


def skip_id3(file: BinaryIO, *, size: int, name: str) -> int:
    """The offset after the ID3v2 tags at the start of a file; 0 if there are none."""
    start = 0
    while True:
        file.seek(start)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) >= 0x80:
            return start
        footer = 10 if head[5] & 0x10 else 0
        start += 10 + footer + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        if start >= size:
            raise AudioError(
                f"{name} is truncated: its ID3 tag states {start} bytes and the file has {size}. Get the whole file",
                kind="truncated",
            )


def recognise(head: bytes) -> str | None:
    """The accepted format that starts with these bytes, or None."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS" and ogg_codec(head) in ("Vorbis", "Opus"):
        return "ogg"
    if head[4:8] == b"ftyp":
        return "mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        layer = head[1] >> 1 & 3
        if layer == 0 and head[1] & 0xF0 == 0xF0:
            return "aac"
        if layer == 1 and head[1] >> 3 & 3 != 1 and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3:
            return "mp3"
    return None


def ogg_codec(head: bytes) -> str:
    """The codec that the first packet of an Ogg file names."""
    packet = head[27 + head[26] :] if len(head) > 26 else b""
    names = {
        b"\x01vorbis": "Vorbis",
        b"OpusHead": "Opus",
        b"Speex": "Speex",
        b"\x7fFLAC": "FLAC",
        b"\x80theora": "Theora",
    }
    return next((name for mark, name in names.items() if packet.startswith(mark)), "an unknown codec")


def describe(head: bytes) -> str:
    """A description of content that is not accepted."""
    for mark, words in OTHERS.items():
        if head.startswith(mark):
            return words
    if head[:4] == b"OggS":
        return f"{ogg_codec(head)} in Ogg"
    if head[:4] == b"FORM":
        return "AIFF" if head[8:12] in (b"AIFF", b"AIFC") else "an IFF file"
    if head[:4] == b"RIFF":
        return f"a RIFF file of type {head[8:12].decode('ascii', 'replace')!r}"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "MPEG audio of layer I or II, or damaged MP3"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text and all(byte >= 0x20 or byte in b"\t\r\n" for byte in text):
        return "text"
    return f"content of no known kind (it starts with {head[:8].hex(' ')})"
