"""Audio format detection by content: the accepted formats, and names for rejected ones.

File name suffixes are ignored, because decoders get only the content.
"""

from dataclasses import dataclass
from typing import BinaryIO

from qwen2audio_jax.audio.data_url import looks_like_base64
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.mpeg import find_frames, frame_bytes

DEMUXERS = {
    **{name: name for name in ("wav", "w64", "aiff", "au", "caf", "flac", "ogg", "mp3", "aac", "amr", "asf", "avi")},
    **{name: name for name in ("flv", "mpegts", "mpeg", "ac3", "eac3", "loas", "wv", "tta", "voc", "nistsphere")},
    "mp4": "mov",
    "matroska": "matroska",
}
"""Accepted format -> the demuxer that ffmpeg is asked for, so that no other one is tried."""

ACCEPTED = (
    "wav, flac, mp3, ogg (Vorbis, Opus, Speex, FLAC), m4a/mp4/mov/3gp, webm/mkv, aac, aiff, caf, au, amr, wma, w64, "
    "mp2, ac3, wavpack, tta, voc, NIST SPHERE, and the sound of avi, flv, mpg and ts"
)

STARTS = {
    b"riff\x2e\x91\xcf\x11": "w64",
    b".snd": "au",
    b"caff": "caf",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"#!AMR": "amr",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",
    b"FLV\x01": "flv",
    b"wvpk": "wv",
    b"TTA1": "tta",
    b"Creative Voice File": "voc",
    b"NIST_1A": "nistsphere",
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\x00\x00\x01\xba": "mpeg",
}
"""First bytes of accepted formats."""

BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp")
"""Boxes that an mp4 or QuickTime file may begin with."""

_CONVERT = "Convert it first, for example with `ffmpeg -i INPUT -ar 16000 -ac 1 OUTPUT.wav`"
_UNPACK = "Unpack it, and pass the sound in it"
_NO_SOUND = "Pass a file that holds sound"
REMEDIES = {
    "MATLAB": "Load it with scipy.io.loadmat, and pass the samples as an array",
    "MIDI": "It holds notes and no sound: play it into a wav file first, for example with fluidsynth",
    "SILK": "Convert it first with a decoder of SILK, such as pilk",
    **dict.fromkeys(("a gzip archive", "a zip archive", "a 7z archive"), _UNPACK),
    **dict.fromkeys(("PDF", "a PNG image", "a JPEG image", "a GIF image", "text", "a web page"), _NO_SOUND),
    "a numpy array": "Load it with numpy.load, and pass the array",
    "a Git LFS pointer, not the sound itself": "Fetch the sound with git lfs pull",
    "base64 text": "Pass the bytes of base64.b64decode(it)",
}
"""What to do about content that ffmpeg does not turn into sound."""

OTHERS = {
    b"MATLAB 5.0": "MATLAB",
    b"ajkg": "Shorten",
    b"MAC ": "Monkey's Audio",
    b"MPCK": "Musepack",
    b"MP+": "Musepack",
    b"DSD ": "DSD",
    b"#!SILK": "SILK",
    b"\x02#!SILK": "SILK",
    b"MThd": "MIDI",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF": "PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x93NUMPY": "a numpy array",
    b"version https://git-lfs": "a Git LFS pointer, not the sound itself",
}
"""First bytes -> common name of formats that are not decoded."""

SEARCHED = 1 << 16
"""Bytes in which the first frame of an MP3 is looked for, behind what taggers and radio recordings leave there."""


@dataclass(frozen=True)
class Content:
    """The detected content of a file."""

    format: str
    """A key of DEMUXERS."""
    start: int
    """Offset of the content, after ID3 tags and, in MP3, what else stands before the first frame."""
    size: int
    """Bytes in the file."""
    inside: bool = False
    """Whether the first frame was found behind something else: in a piece of a stream that is within one."""


def sniff(file: BinaryIO, *, size: int, name: str) -> Content:
    """The format of a seekable file from its first bytes; AudioError "format" names one that is not accepted."""
    start = skip_id3(file, size=size, name=name)
    file.seek(start)
    head = file.read(SEARCHED)
    found = recognise(head)
    if found is not None:
        return Content(found, start, size)
    what = describe(head)
    if what is None:
        at = find_frames(head)
        if at is not None:
            return Content("mp3", start + at, size, inside=True)
        what = f"content of no known kind (it starts with {head[:8].hex(' ')})"
    raise AudioError(
        f"{name} holds {what}, which is not decoded. Accepted: {ACCEPTED}. {REMEDIES.get(what, _CONVERT)}",
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
    for mark, name in STARTS.items():
        if head.startswith(mark):
            return name
    kind = head[8:12]
    if head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and kind == b"WAVE":
        return "wav"
    if head[:4] == b"RIFF" and kind in (b"AVI ", b"AVIX"):
        return "avi"
    if head[:4] == b"FORM" and kind in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] in BOXES:
        return "mp4"
    if head[:2] == b"\x0b\x77" and len(head) > 5:
        return "eac3" if head[5] >> 3 > 10 else "ac3"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "mpegts"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    if head[:1] == b"\x56" and head[1:2] and head[1] & 0xE0 == 0xE0:
        return "loas"
    size = frame_bytes(head)
    # Two headers in a row, as one alone may be chance: text in UTF-16 begins like one.
    return "mp3" if size and (size <= len(head) < size + 4 or frame_bytes(head[size:])) else None


def describe(head: bytes) -> str | None:
    """A description of content that is not accepted; None of what is unknown."""
    for mark, words in OTHERS.items():
        if head.startswith(mark):
            return words
    if head[:4] == b"FORM":
        return "an IFF file that is no AIFF"
    if head[:4] == b"RIFF":
        return f"a RIFF file of type {head[8:12].decode('ascii', 'replace')!r}"
    text = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text and all(byte >= 0x20 or byte in b"\t\r\n" for byte in text):
        return "base64 text" if looks_like_base64(head[:512]) else "text"
    return None
