"""Walks over the packets of a file, which show whether all of its sound was heard."""

from dataclasses import dataclass, field
from typing import Any, BinaryIO

from qwen2audio_jax.audio.ends import boxes, is_flac_piece, matroska_cut, mpeg_cut, ogg_cut, ogg_start
from qwen2audio_jax.audio.errors import AudioError, corrupt
from qwen2audio_jax.audio.formats import Content
from qwen2audio_jax.limits import Limits

JUMP = 0.1
"""Seconds by which times in a file may be inexact."""

DURATION_SLACK = 0.5
"""Seconds by which the duration of a container of recordings may differ from its sound: clocks and padding differ."""

STATING = {
    **dict.fromkeys(("flac", "tta", "wv", "nistsphere", "aiff", "au"), 0.002),
    **dict.fromkeys(("mp4", "matroska", "flv"), DURATION_SLACK),
    "ogg": JUMP,
}
"""Formats whose duration ffmpeg reads from the header, and does not guess -> seconds by which it may be too long."""

RAW = ("mp3", "aac", "ac3", "eac3", "loas", "mpegts", "mpeg", "ogg")
"""Formats of broadcasts and of pieces put together, in which a block here and there begins too early or too late."""

LOSSLESS = ("flac", "tta", "wv")
"""Formats whose blocks give as many samples as they state."""


@dataclass
class Walk:
    """The packets of a track that have gone by.

    Attributes:
        count: of packets.
        seconds: that they last, in sum.
        start, end: times in seconds of the first one's beginning and the last one's end.
        seam: whether time went back, as where one file was put behind another.
        first, last: the packets themselves.
        unheard: numbers of those that could not be decoded.
    """

    count: int = 0
    seconds: float = 0.0
    start: float | None = None
    end: float = 0.0
    seam: bool = False
    first: Any = None
    last: Any = None
    unheard: list[int] = field(default_factory=list)

    def add(self, packet: Any) -> None:
        """Count a packet."""
        self.count, self.first, self.last = self.count + 1, self.first or packet, packet
        base = float(packet.time_base or 0)
        duration = (packet.duration or 0) * base
        self.seconds += duration
        if packet.pts is not None:
            begin = packet.pts * base
            if self.start is None:
                self.start = self.end = begin
            # Vorbis states too little where long and short blocks meet.
            self.seconds += begin - self.end if 0 < begin - self.end < JUMP else 0.0
            self.seam |= begin < self.end - duration - JUMP
            self.end = begin + duration


def stated_seconds(container: Any, stream: Any, content: Content, *, limits: Limits) -> float | None:
    """The duration that the file itself states; None where it states none, or a placeholder.

    That of a matroska file counts only if it holds nothing but audio: a video may be longer than its audio.
    """
    if content.format not in STATING:
        return None
    if content.format in ("matroska", "flv"):
        seconds = container.duration / 1e6 if container.duration is not None and len(container.streams) == 1 else None
    else:
        seconds = float(stream.duration * stream.time_base) if stream.duration is not None else None
    return seconds if seconds is not None and 0 < seconds <= limits.decoded_seconds else None


def check_heard(file: BinaryIO, content: Content, walk: Walk, *, stated: float | None, heard: float, name: str) -> None:
    """AudioError "corrupt" where sound is lost within a file; what a cut last block loses is no damage."""
    inside = len([number for number in walk.unheard if number < walk.count])
    if inside > (2 + walk.count // 50 if content.format in RAW else 0):
        raise corrupt(name, f"{inside} of its {walk.count} blocks of sound cannot be decoded")
    if content.format == "ogg" and not walk.seam and (stated or 0.0) - walk.seconds > JUMP:
        raise corrupt(name, f"it holds {walk.seconds:.2f} s of sound, and its last page ends at {stated:.2f} s")
    if content.format in LOSSLESS and walk.count:
        start = walk.start or 0.0 if content.format == "flac" and is_flac_piece(file, content) else 0.0
        there = walk.seconds if walk.seam else max(walk.seconds, walk.end - start)
        if walk.count in walk.unheard:
            there -= float((walk.last.duration or 0) * walk.last.time_base)
        if there - heard > STATING[content.format]:
            raise corrupt(name, f"{there - heard:.2f} s of its sound cannot be decoded")


def check_one_file(file: BinaryIO, content: Content, *, name: str) -> None:
    """AudioError "format" for mp4 files put one behind the other: only the first is ever played."""
    count = sum(kind == b"moov" for kind, _ in boxes(file, content))
    if count > 1:
        raise AudioError(
            f"{name} is {count} mp4 files one behind the other, of which only the first would be heard: split them, or "
            "join them with ffmpeg's concat",
            kind="format",
        )


def find_missing(file: BinaryIO, content: Content, walk: Walk, *, stated: float | None, heard: float) -> str | None:
    """What shows that a file is shorter than it says; None where nothing does."""
    end = max(walk.end, heard)
    # The end of an Ogg file counts what is skipped at its beginning, and is compared with its packets.
    short = stated is not None and content.format != "ogg" and end < stated - STATING[content.format]
    if short and not (content.format == "flac" and is_flac_piece(file, content)):
        return f"{end:.2f} s can be decoded of the {stated:.2f} s that its header states"
    alone = walk.last is not None and len(walk.last.stream.container.streams) == 1
    if walk.count == 0:
        return "it holds no sound behind its headers" if content.format == "matroska" else None
    if content.format == "ogg":
        first, last = (walk.first.pos, walk.last.pos) if alone else (None, None)
        cut = ogg_cut(file, content, last=last)
        return cut if cut is not None or first is None else ogg_start(file, first=first)
    if content.format == "mp3":
        return mpeg_cut(file, content, frames=walk.count, last=bytes(walk.last))
    if walk.last.is_corrupt or walk.count in walk.unheard:
        return "its last block of sound is cut"
    if content.format == "matroska" and walk.last.pos is not None and alone:
        return matroska_cut(file, walk.last.pos + walk.last.size)
    return None
