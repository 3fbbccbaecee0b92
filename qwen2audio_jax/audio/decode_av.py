"""Decoder of m4a, mp4, webm and raw AAC by PyAV, an optional package that bundles ffmpeg's libraries."""

from typing import Any, BinaryIO

import numpy as np

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.containers import check_container
from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.formats import AV_FORMATS, Content
from qwen2audio_jax.audio.headers import corrupt, truncated
from qwen2audio_jax.audio.sound import Seekable, Sound, check_rate, mean
from qwen2audio_jax.limits import Limits

AV_CODECS = (
    *("aac", "alac", "flac", "mp3", "mp3float", "opus", "vorbis"),
    *("pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s32le", "pcm_f32le"),
)
"""Codecs that ffmpeg may open; also passed to ffmpeg, which otherwise opens other streams (video) while probing."""

DURATION_SLACK = 0.5
"""Seconds by which a container's stated duration may differ from its sound: codecs pad both ends."""

CODEC_PADDING = 4096
"""Maximum frames by which a codec's last block extends beyond the audio."""

FULL_SCALE = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0, "flt": 1.0, "dbl": 1.0}
"""ffmpeg's sample formats -> the value that stands for 1.0."""


def decode_av(
    file: BinaryIO, content: Content, *, name: str, limits: Limits, truncation: bool, sampling_rate: int | None
) -> Sound:
    """Decode m4a, mp4, webm or raw AAC."""
    check_container(file, content, name=name)
    try:
        import av
    except ImportError:
        raise AudioError(
            f"{name} is {content.format}, which needs the package av: pip install 'qwen2audio-jax[av]'",
            kind="dependency",
        ) from None
    file.seek(0)
    pieces: list[np.ndarray] = []
    total = 0
    try:
        with av.open(
            Seekable(file),
            mode="r",
            format=AV_FORMATS[content.format],
            container_options={"codec_whitelist": ",".join(AV_CODECS), "protocol_whitelist": ""},
        ) as container:
            stream = only_stream(container, name)
            rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
            check_rate(name, rate, sampling_rate)
            budget = Budget(name=name, rate=rate, channels=channels, limits=limits, truncation=truncation)
            seconds = stated_seconds(container, stream, content)
            if seconds is not None:
                sure = int(max(0.0, seconds - DURATION_SLACK) * rate)
                too_many = sure > min(budget.clip_frames, budget.decoded_frames)
                budget.frames_to_decode(int(seconds * rate) if too_many else sure)
            most = budget.frames_to_decode(None) + CODEC_PADDING
            for frame in container.decode(stream):
                if frame.sample_rate != rate or len(frame.layout.channels) != channels:
                    raise corrupt(name, "its rate or its channels change on the way")
                pieces.append(mean(frame_samples(frame)))
                total += frame.samples
                if total >= most:
                    break
    except av.FFmpegError as error:
        raise corrupt(name, f"its {content.format} content cannot be decoded ({type(error).__name__})") from None
    except UnicodeDecodeError:
        # PyAV reads every text in a file, titles included.
        raise corrupt(name, "a text in it, such as its title, is not UTF-8") from None
    if total >= most:
        budget.check(total, more=True)
    elif seconds is not None and total < (seconds - DURATION_SLACK) * rate:
        raise truncated(name, f"{total / rate:.2f} s can be decoded of the {seconds:.2f} s that its header states")
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if content.format == "mp4" and seconds is not None and 0 < total - round(seconds * rate) <= CODEC_PADDING:
        # An mp4 file states where in its last block the sound ends, and ffmpeg decodes the whole block.
        samples = samples[: round(seconds * rate)]
    return Sound(samples, rate)


def only_stream(container: Any, name: str) -> Any:
    """The one audio track of a container."""
    streams = container.streams.audio
    if len(streams) != 1:
        raise AudioError(
            f"{name} has {len(streams)} audio tracks, not one: extract the one that is meant", kind="format"
        )
    # A codec that is not on the list gets no decoder at all, and so no name of one.
    codec = streams[0].codec_context
    codec_name = codec.name if codec is not None else "unknown"
    if codec_name not in AV_CODECS:
        raise AudioError(
            f"{name} holds audio of codec {codec_name}, which is not decoded. Accepted: {', '.join(AV_CODECS)}. "
            "Convert it first, for example to wav",
            kind="format",
        )
    return streams[0]


def stated_seconds(container: Any, stream: Any, content: Content) -> float | None:
    """The duration stated by the container, None if it states none.

    For raw AAC ffmpeg guesses. The duration of a webm file counts only if it holds nothing but audio: a video may be
    longer than its audio.
    """
    if content.format == "mp4" and stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if content.format == "webm" and container.duration is not None and len(container.streams) == 1:
        return container.duration / 1e6
    return None


def frame_samples(frame: Any) -> np.ndarray:
    """A decoded ffmpeg frame as [channels, n] float32 with 1.0 as full scale."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, len(frame.layout.channels)).T
    scale = FULL_SCALE[frame.format.name.removesuffix("p")]
    offset = scale if frame.format.name.startswith("u8") else 0.0
    return ((array.astype(np.float64) - offset) / scale).astype(np.float32)
