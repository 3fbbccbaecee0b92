"""Decoder of everything but plain samples: PyAV, which carries ffmpeg's libraries.

A file is decoded within the limits, whatever its header states, and judged by what came out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from qwen2audio_jax.audio.budget import Budget
from qwen2audio_jax.audio.ends import boxes
from qwen2audio_jax.audio.errors import AudioError, corrupt, truncated
from qwen2audio_jax.audio.formats import DEMUXERS, Content
from qwen2audio_jax.audio.sound import Seekable, Sound, check_rate, mean
from qwen2audio_jax.audio.walk import Walk, check_heard, check_one_file, find_missing, stated_seconds
from qwen2audio_jax.limits import Limits

AV_CODECS = (
    *("aac", "aac_latm", "ac3", "eac3", "alac", "flac", "mp1float", "mp2float", "mp3float", "mp1", "mp2", "mp3"),
    *("opus", "vorbis", "speex", "wmav1", "wmav2", "wmapro", "wmalossless", "wmavoice", "amrnb", "amrwb"),
    *("wavpack", "tta", "gsm", "gsm_ms", "g722", "g723_1", "g729", "truespeech"),
    *(f"adpcm_{name}" for name in ("ima_wav", "ima_qt", "ms", "yamaha", "swf")),
    *(f"adpcm_sbpro_{bits}" for bits in (2, 3, 4)),
    *("pcm_alaw", "pcm_mulaw", "pcm_u8", "pcm_s8", "pcm_s8_planar", "pcm_dvd", "pcm_bluray"),
    *(
        f"pcm_{kind}{order}"
        for kind in ("s16", "s24", "s32", "f32", "f64", "u16", "u24", "u32")
        for order in ("le", "be")
    ),
)
"""Codecs that ffmpeg may open; also passed to ffmpeg, which otherwise opens other streams (video) while probing."""

CODEC_PADDING = 4096
"""Maximum frames by which a codec's last block extends beyond the audio."""

SKIP_MANUAL = 1 << 29
"""ffmpeg's flag that leaves the padding of a stream in it."""

FULL_SCALE = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0, "flt": 1.0, "dbl": 1.0}
"""ffmpeg's sample formats -> the value that stands for 1.0."""


def decode_av(
    file: BinaryIO,
    content: Content,
    *,
    name: str,
    limits: Limits,
    truncation: bool,
    sampling_rate: int | None,
    track: int | None = None,
) -> Sound:
    """Decode a file; the track is the only one, unless the caller chooses.

    Raises:
        AudioError: it cannot be decoded, breaks a limit, or has several tracks to choose from.
    """
    with opened(file, content, name=name) as container:
        stream = choose_track(container, name=name, track=track)
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        codec = codec_name(stream)  # not asked for after decoding: a decoder that failed may be gone, and PyAV crashes
        if codec != "opus":  # which has no rate of its own
            check_rate(name, rate, sampling_rate)
        budget = Budget(name=name, rate=rate, channels=channels, limits=limits, truncation=truncation)
        if content.format == "caf" and codec == "alac":
            # ffmpeg's reader takes padding off that its decoder has left out, and with it the end of the sound.
            stream.codec_context.flags2 |= SKIP_MANUAL
        if codec in ("flac", "wavpack", "tta"):
            # Left alone, these decoders make noise of damage.
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        stated = stated_seconds(container, stream, content, limits=limits)
        most = budget.frames_to_decode(None) + CODEC_PADDING
        walk, pieces, total = Walk(), [], 0
        for packet in container.demux(stream):
            if packet.size:
                walk.add(packet)
            for piece in decoded(packet, walk):
                pieces.append((piece.rate, piece.samples))
                total += round(len(piece.samples) * rate / piece.rate)
            if total >= most:
                break
        samples = joined(pieces, rate)
        if total >= most:
            budget.check(total, more=True, seconds=stated)
            return Sound(samples, rate)
        check_heard(file, content, walk, stated=stated, heard=total / rate, name=name)
        missing = find_missing(file, content, walk, stated=stated, heard=total / rate)
        if content.format == "mp4":
            check_one_file(file, content, name=name)
            if codec in ("aac", "alac") and stated and 0 < total - round(stated * rate) <= CODEC_PADDING:
                # An mp4 file states where in its last block the sound ends, and ffmpeg decodes the whole block.
                samples = samples[: round(stated * rate)]
    return Sound(samples, rate, missing)


def survey(file: BinaryIO, content: Content, *, name: str, limits: Limits) -> Walk | None:
    """The packets of a file's only track, nothing decoded; None where they are not all of one whole, plain stream."""
    with opened(file, content, name=name) as container:
        stream = choose_track(container, name=name, track=None)
        walk, stated = Walk(), stated_seconds(container, stream, content, limits=limits)
        for packet in container.demux(stream):
            if packet.size:
                walk.add(packet)
            if walk.seconds > limits.decoded_seconds:
                return None
        check_heard(file, content, walk, stated=stated, heard=walk.seconds, name=name)
        missing = find_missing(file, content, walk, stated=None, heard=walk.seconds)
        plain = walk.count and not walk.seam and (walk.start or 0.0) < 0.2 and missing is None
        return walk if plain else None


@contextmanager
def opened(file: BinaryIO, content: Content, *, name: str) -> Iterator[Any]:
    """The file as PyAV's container, whose errors become ours: they hold no more than we say."""
    import av

    file.seek(0)
    options = {"codec_whitelist": ",".join(AV_CODECS), "protocol_whitelist": ""}
    # From release 19 on no text in a file is an error.
    texts: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    demuxer = DEMUXERS[content.format]
    try:
        with av.open(Seekable(file), mode="r", format=demuxer, container_options=options, **texts) as container:
            yield container
    except av.FFmpegError as error:
        if content.format == "mp4" and not any(kind == b"moov" for kind, end in boxes(file, content)):
            found = "it has no whole 'moov' box, which is written when a recording is finished"
            raise truncated(name, found, silent=True) from None
        if isinstance(error, av.PatchWelcomeError):
            raise AudioError(
                f"{name} changes its coding on the way, so that only a part would be heard: split it, or write it anew",
                kind="format",
            ) from None
        if isinstance(error, av.EOFError) or type(error).__name__ == "OSError":
            raise truncated(name, "its bytes end before any sound", silent=True) from None
        raise corrupt(name, f"its {content.format} content cannot be decoded ({type(error).__name__})") from None
    except UnicodeDecodeError:
        # PyAV reads every text in a file, titles included.
        raise corrupt(name, "a text in it, such as its title, is not UTF-8") from None


def choose_track(container: Any, *, name: str, track: int | None) -> Any:
    """The audio track that is meant: the only one, or the one with this number, from 0."""
    streams = container.streams.audio
    if track is None and len(streams) != 1:
        found = "; ".join(f"{number}: {describe_track(stream)}" for number, stream in enumerate(streams[:16]))
        raise AudioError(
            f"{name} has {len(streams)} audio tracks, not one{found and f' ({found})'}: "
            f"{'choose one with track=0 (--track 0) or another number' if streams else 'pass a file with sound'}",
            kind="format",
        )
    if track is not None and not 0 <= track < len(streams):
        raise AudioError(
            f"{name} has {len(streams)} audio tracks and no number {track}: choose from 0 to {len(streams) - 1}",
            kind="format",
        )
    stream = streams[track or 0]
    if codec_name(stream) not in AV_CODECS:
        raise AudioError(
            f"{name} holds audio of codec {codec_name(stream)}, which is not decoded: convert it first, for example to "
            "wav",
            kind="format",
        )
    return stream


def codec_name(stream: Any) -> str:
    """A codec that is not on the list gets no decoder at all, and so no name of one."""
    return stream.codec_context.name if stream.codec_context is not None else "unknown"


def describe_track(stream: Any) -> str:
    """A track's codec, language and title."""
    words = [codec_name(stream), *(str(stream.metadata.get(key, ""))[:40] for key in ("language", "title"))]
    return ", ".join(word for word in words if word and word.isprintable())


def decoded(packet: Any, walk: Walk) -> Iterator[Sound]:
    """The sound in a packet; one that cannot be decoded is noted, as players go on behind it."""
    import av

    try:
        frames = packet.decode()
    except av.EOFError:
        return
    except av.InvalidDataError:
        walk.unheard.append(walk.count)
        return
    for frame in frames:
        yield Sound(mean(frame_samples(frame)), frame.sample_rate)


def joined(pieces: list[tuple[int, np.ndarray]], rate: int) -> np.ndarray:
    """The pieces one behind the other, at one rate."""
    runs: list[tuple[int, list[np.ndarray]]] = []
    for own, samples in pieces:
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(samples)
    whole = [(own, np.concatenate(samples)) for own, samples in runs]
    if any(own != rate for own, _ in whole):
        # Imported here: it is rare that a stream changes its rate on the way.
        import soxr

        whole = [(rate, soxr.resample(samples, own, rate, quality="HQ")) for own, samples in whole]
    return np.concatenate([samples for _, samples in whole]) if whole else np.zeros(0, np.float32)


def frame_samples(frame: Any) -> np.ndarray:
    """A decoded ffmpeg frame as [channels, n] float32 with 1.0 as full scale."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, len(frame.layout.channels)).T
    scale = FULL_SCALE[frame.format.name.removesuffix("p")]
    offset = scale if frame.format.name.startswith("u8") else 0.0
    return ((array.astype(np.float64) - offset) / scale).astype(np.float32)
