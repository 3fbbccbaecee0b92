"""Windows: sound of any length cut at silence into pieces that the model takes.

No more than a window and what the detector holds back is in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from qwen2audio_jax.audio.clip import SAMPLING_RATE
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.tasks.detectors import DETECTORS, check_detector, is_tone

SHORTEST = SAMPLING_RATE // 20
"""Samples of the shortest region of speech: a click is shorter."""


@dataclass(frozen=True)
class Cutting:
    """How sound is cut.

    Attributes:
        seconds: of the longest window.
        pause: seconds without speech that end a window, however short it is.
        margin: seconds of sound that a window has before its first speech and after its last, where there are some.
        least: seconds of speech below which a window is dropped.
        whole: whether sound that fits into one window is one, silence included.
    """

    seconds: float = LIMITS.clip_seconds
    pause: float = 5.0
    margin: float = 0.2
    least: float = 0.1
    whole: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.seconds <= LIMITS.clip_seconds:
            raise ValueError(f"windows of {self.seconds:g} s: give 1 to {LIMITS.clip_seconds:g}, the longest clip")


@dataclass(frozen=True)
class Window:
    """A piece of sound in which something was detected.

    Attributes:
        start: second of its first speech.
        end: second at which its last speech ends.
        voiced: seconds of speech in it.
        samples: [n] float32 at 16 kHz, margins included.
    """

    start: float
    end: float
    voiced: float
    samples: np.ndarray = field(repr=False)


def cut(blocks: Iterable[np.ndarray], *, detector: str = "energy", cutting: Cutting = Cutting()) -> Iterator[Window]:
    """Cut sound into windows, in order.

    Args:
        blocks: samples at 16 kHz in blocks of any size, as `stream_audio` gives them.
        detector: name of one of `detectors.DETECTORS`.
        cutting: see there.

    Raises:
        ValueError: there is no such detector, or it is not installed.
    """
    check_detector(detector)
    detect, frame = DETECTORS[detector]
    source, first, count = iter(blocks), [], 0
    most = round(cutting.seconds * SAMPLING_RATE)
    if cutting.whole:
        for block in source:
            first.append(block)
            count += len(block)
            if count > most:
                break
    cutter = _Cutter(cutting, frame, detected=detector != "none")
    if cutting.whole and 0 < count <= most:
        found = list(cutter.windows(detect(first)))
        if found:
            voiced = sum(window.voiced for window in found)
            yield Window(found[0].start, found[-1].end, voiced, np.concatenate(first))
        return
    yield from cutter.windows(detect(_chained(first, source)))


def _chained(first: list[np.ndarray], rest: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    while first:
        yield first.pop(0)
    yield from rest


class _Cutter:
    """The state of cutting one sound; positions are samples from its beginning."""

    def __init__(self, cutting: Cutting, frame: int, *, detected: bool):
        self._frame, self._detected = frame, detected
        self._most, self._pause, self._margin, self._least = (
            round(seconds * SAMPLING_RATE)
            for seconds in (cutting.seconds, cutting.pause, cutting.margin, cutting.least)
        )
        self._held = np.zeros(0, np.float32)
        self._begin = 0  # position of the first sample that is held
        self._over = 0  # end of the last window's speech: no later one has a sample before it
        self._regions: list[tuple[int, int]] = []  # of speech, not in a window yet

    def windows(self, decided: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Window]:
        """The windows of samples with the detector's decisions."""
        position = 0
        for samples, speech in decided:
            self._held = np.concatenate([self._held, samples])
            for index in np.flatnonzero(speech):
                start = position + int(index) * self._frame
                yield from self._add(start, min(start + self._frame, position + len(samples)))
            position += len(samples)
            if self._regions and position - self._regions[-1][1] >= self._pause + self._margin:
                yield from self._close()
            self._forget(position)
        if self._regions:
            yield from self._close()

    def _add(self, start: int, end: int) -> Iterator[Window]:
        """Take one more frame of speech; what does not fit with it ends a window."""
        regions = self._regions
        if regions and start == regions[-1][1]:
            regions[-1] = (regions[-1][0], end)
        else:
            self._drop_click()
            if regions and start - regions[-1][1] >= self._pause:
                yield from self._close(before=start)
                regions = self._regions
            regions.append((start, end))
        if end - regions[0][0] + 2 * self._margin > self._most:
            yield from self._split()

    def _drop_click(self) -> None:
        """Forget the last region if it is too short for speech."""
        if self._regions and self._regions[-1][1] - self._regions[-1][0] < SHORTEST:
            self._regions.pop()

    def _split(self) -> Iterator[Window]:
        """Close a window that is full: in its last pause, else where its last third is quietest."""
        regions = self._regions
        pauses = [
            (regions[index + 1][0] - regions[index][1], index)
            for index in range(len(regions) - 1)
            if regions[index][1] - regions[0][0] >= self._most // 3
        ]
        if pauses:
            _, index = max(pauses)
            self._regions, rest = regions[: index + 1], regions[index + 1 :]
            yield from self._close(before=rest[0][0])
            self._regions = rest
            return
        first, end = regions[0][0], regions[-1][1]
        where = self._quietest(first + (end - first) * 2 // 3, end)
        self._regions = [(start, min(stop, where)) for start, stop in regions if start < where]
        rest = [(max(start, where), stop) for start, stop in regions if stop > where]
        yield from self._close(before=where)
        self._regions = rest

    def _quietest(self, start: int, end: int) -> int:
        """The middle of the quietest tenth of a second between two positions."""
        size = SAMPLING_RATE // 10
        part = self._held[start - self._begin : end - self._begin]
        power = np.add.reduceat(np.square(part), np.arange(0, len(part) - size, size // 2))
        return start + int(np.argmin(power[:-1] + power[1:])) * (size // 2) + size // 2

    def _close(self, *, before: int | None = None) -> Iterator[Window]:
        """The window of the regions so far; its margin ends where the next speech begins."""
        self._drop_click()
        regions, self._regions = self._regions, []
        voiced = sum(end - start for start, end in regions)
        if not regions or voiced < self._least:
            return
        start, end = regions[0][0], regions[-1][1]
        low, self._over = max(start - self._margin, self._over), end
        high = end + self._margin if before is None else min(end + self._margin, before)
        samples = self._held[low - self._begin : high - self._begin].copy()
        if len(samples) < LIMITS.min_clip_samples or (self._detected and is_tone(samples)):
            return
        yield Window(start / SAMPLING_RATE, end / SAMPLING_RATE, voiced / SAMPLING_RATE, samples)

    def _forget(self, position: int) -> None:
        """Drop samples that no window will have."""
        first = self._regions[0][0] if self._regions else position
        keep = max(first - self._margin, self._over, self._begin)
        self._held, self._begin = self._held[keep - self._begin :], keep
