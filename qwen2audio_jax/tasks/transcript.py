"""Transcripts: windows with their text and times, and how they are written."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_UNSPACED = ("zh", "yue", "ja")
"""Languages written without spaces."""


@dataclass(frozen=True)
class Segment:
    """The text of a window.

    Attributes:
        start, end: seconds from the beginning of the sound.
        text: what was said; "" where the model says that there is no speech.
        mean_log_prob: of its tokens; None where there are none.
        tokens: how many there are.
        flags: of `checks.FLAGS`; empty where nothing is doubtful.
        tries: how often the model was asked for it.
    """

    start: float
    end: float
    text: str
    mean_log_prob: float | None = None
    tokens: int = 0
    flags: tuple[str, ...] = ()
    tries: int = 1


@dataclass(frozen=True)
class Transcript:
    """What is said in a sound, or its translation.

    Attributes:
        name: of the sound.
        task: "transcribe" or "translate".
        language: of the speech, or "from-to".
        seconds: that the sound lasts.
        segments: in order; one for each window in which voice was detected.
        error: why there is no more of it; None where it is whole.
    """

    name: str
    task: str
    language: str
    seconds: float
    segments: tuple[Segment, ...] = ()
    error: ValueError | None = field(default=None, compare=False)

    @property
    def spoken(self) -> tuple[Segment, ...]:
        """The segments that have a text."""
        return tuple(segment for segment in self.segments if segment.text)

    @property
    def text(self) -> str:
        """All text."""
        written = self.language.rpartition("-")[2]
        return ("" if written in _UNSPACED else " ").join(segment.text for segment in self.spoken)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "audio": self.name,
            "task": self.task,
            "language": self.language,
            "seconds": round(self.seconds, 2),
            "text": self.text,
            "segments": [_segment(segment) for segment in self.segments],
            **({} if self.error is None else {"error": str(self.error)}),
        }

    def format(self, form: str) -> str:
        """The transcript as a file's content, with a line break at its end where it is not empty.

        Args:
            form: one of `FORMATS`.

        Raises:
            ValueError: it is none of these.
        """
        if form not in FORMATS:
            raise ValueError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
        return FORMATS[form](self)


def _segment(segment: Segment) -> dict[str, Any]:
    mean = segment.mean_log_prob
    return {
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "mean_log_prob": round(mean, 5) if mean is not None and math.isfinite(mean) else None,
        "tokens": segment.tokens,
        "flags": list(segment.flags),
        "tries": segment.tries,
    }


def _txt(transcript: Transcript) -> str:
    return transcript.text + "\n" if transcript.text else ""


def _json(transcript: Transcript) -> str:
    return json.dumps(transcript.to_dict(), ensure_ascii=False) + "\n"


def _srt(transcript: Transcript) -> str:
    blocks = [
        f"{number}\n{clock(segment.start, ',')} --> {clock(segment.end, ',')}\n{_cue(segment)}\n"
        for number, segment in enumerate(transcript.spoken, 1)
    ]
    return "\n".join(blocks)


def _vtt(transcript: Transcript) -> str:
    blocks = [
        # Text is no markup.
        f"{clock(segment.start, '.')} --> {clock(segment.end, '.')}\n{_escaped(_cue(segment))}\n"
        for segment in transcript.spoken
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _tsv(transcript: Transcript) -> str:
    lines = ["start\tend\ttext"]
    for segment in transcript.spoken:
        text = " ".join(segment.text.split())
        lines.append(f"{round(segment.start * 1000)}\t{round(segment.end * 1000)}\t{text}")
    return "\n".join(lines) + "\n"


def _cue(segment: Segment) -> str:
    """A segment's text without empty lines, which would end it, and without an arrow, which would begin another."""
    lines = [line.strip() for line in segment.text.splitlines()]
    return "\n".join(line for line in lines if line).replace("-->", "->")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def clock(seconds: float, point: str) -> str:
    """A time as subtitles write it: 01:02:03,456."""
    thousandths = round(seconds * 1000)
    return (
        f"{thousandths // 3_600_000:02d}:{thousandths // 60_000 % 60:02d}:{thousandths // 1000 % 60:02d}{point}"
        f"{thousandths % 1000:03d}"
    )


FORMATS: dict[str, Callable[[Transcript], str]] = {"txt": _txt, "json": _json, "srt": _srt, "vtt": _vtt, "tsv": _tsv}
"""Name, which is also the file's ending -> what writes it."""
