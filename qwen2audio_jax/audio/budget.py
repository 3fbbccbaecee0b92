"""Decoding budget: bounds on decoded and resampled audio, checked from the header before decoding."""

import math
from dataclasses import dataclass

from qwen2audio_jax.audio.clip import SAMPLING_RATE, too_long
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.limits import Limits

MARGIN_SECONDS = 1
"""Seconds decoded beyond a cut, so that the resampler's filter has the samples after it."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of one sound, in frames (one sample of every channel) at its own rate."""

    name: str
    rate: int
    channels: int
    limits: Limits
    truncation: bool

    def __post_init__(self):
        limits = self.limits
        if not limits.min_sampling_rate <= self.rate <= limits.max_sampling_rate:
            raise AudioError(
                f"{self.name} states {self.rate} samples a second, outside {limits.min_sampling_rate} to "
                f"{limits.max_sampling_rate}: resample it first, or where that is not its true rate write that "
                "into it, as with `sox -r 16000 INPUT OUTPUT.wav`",
                kind="rate",
            )
        if not 1 <= self.channels <= limits.max_channels:
            raise AudioError(
                f"{self.name} has {self.channels} channels, not 1 to {limits.max_channels}: mix it down first",
                kind="too_large",
            )

    @property
    def clip_frames(self) -> float:
        """Frames of the longest clip that the model takes."""
        # floor, as the resampler rounds the number of samples up; infinite if clips have no limit.
        frames = self.limits.clip_seconds * self.rate
        return math.floor(frames) if math.isfinite(frames) else frames

    @property
    def decoded_frames(self) -> int:
        """Frames after which decoding always stops."""
        limits = self.limits
        return math.floor(
            min(
                limits.decoded_seconds * self.rate,
                limits.decoded_bytes / (4 * self.channels),
                limits.resampled_samples * self.rate / SAMPLING_RATE,
            )
        )

    def frames_to_decode(self, stated: int | None) -> int:
        """Frames to request from the decoder, for the number that the header states (None: not stated).

        If none is stated it is one more than allowed, and `check` is to be called with the decoded number.
        """
        if self.truncation:
            kept = self.clip_frames + MARGIN_SECONDS * self.rate
            if stated is None:
                return int(min(kept, self.decoded_frames + 1))
            self.check(wanted := int(min(kept, stated)))
            return wanted
        if stated is None:
            return int(min(self.clip_frames, self.decoded_frames)) + 1
        self.check(stated)
        return stated

    def check(self, frames: int, *, more: bool = False, seconds: float | None = None) -> None:
        """Raise AudioError if a number of frames exceeds a limit.

        Args:
            frames: the number.
            more: whether an unknown number follows.
            seconds: how long it all is by its own word, for the message.
        """
        if frames > self.clip_frames and not self.truncation:
            known = seconds if more and (seconds or 0) * self.rate > frames else None if more else frames / self.rate
            raise too_long(self.name, known, self.limits)
        if frames > self.decoded_frames:
            limits = self.limits
            raise AudioError(
                f"{self.name} decodes to {'at least ' if more else ''}{frames} frames of {self.channels} channels at "
                f"{self.rate} Hz, more than the {self.decoded_frames} that {limits.decoded_seconds:g} s, "
                f"{limits.decoded_bytes} bytes and {limits.resampled_samples} samples at 16 kHz allow: split it",
                kind="too_large",
            )
