"""Formats that phones, browsers and recorders write: heard as the same samples in WAV are; and which track."""

import io
import shutil
import subprocess
from functools import cache

import av
import numpy as np
import pytest
import soundfile
import sounds

from qwen2audio_jax.audio import AudioError, load_audio

# ffmpeg's container and codec, and the rate.
LOSSLESS = [
    *[(name, codec, 44_100) for name in ("aiff", "au") for codec in ("pcm_s16be", "pcm_s24be", "pcm_f32be", "pcm_s8")],
    *[("caf", codec, 44_100) for codec in ("pcm_s16le", "pcm_s24be", "pcm_f32le", "alac")],
    *[("wav", codec, 48_000) for codec in ("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le")],
    *[("mov", codec, 48_000) for codec in ("pcm_s16be", "pcm_s16le", "alac")],
    ("w64", "pcm_s16le", 16_000),
    ("w64", "pcm_f32le", 44_100),
    ("ogg", "flac", 48_000),
    ("mp4", "flac", 48_000),
    ("matroska", "flac", 48_000),
    ("matroska", "pcm_s16le", 48_000),
    ("avi", "pcm_s16le", 48_000),
    ("wv", "wavpack", 48_000),
    ("tta", "tta", 48_000),
]
LOSSY = [
    *[("wav", f"adpcm_{name}", 16_000) for name in ("ms", "ima_wav", "yamaha")],
    *[(name, f"pcm_{codec}", 8_000) for name in ("wav", "aiff", "au", "caf") for codec in ("alaw", "mulaw")],
    ("caf", "adpcm_ima_qt", 44_100),
    ("wav", "g722", 16_000),
    ("wav", "libmp3lame", 44_100),
    ("amr", "libopencore_amrnb", 8_000),
    ("3gp", "libopencore_amrnb", 8_000),
    ("asf", "wmav1", 44_100),
    ("asf", "wmav2", 44_100),
    *[("mov", codec, 44_100) for codec in ("aac", "libmp3lame")],
    *[("mp4", codec, 48_000) for codec in ("libopus", "ac3")],
    *[("matroska", codec, 48_000) for codec in ("libopus", "aac", "ac3")],
    *[(name, "aac", 48_000) for name in ("flv", "mpegts", "latm", "avi")],
    *[(name, "mp2", 48_000) for name in ("mp2", "mpegts", "vob")],
    ("ac3", "ac3", 48_000),
    ("eac3", "eac3", 48_000),
]


@cache
def speech(rate: int) -> np.ndarray:
    return sounds.speech(int(1.3 * rate), rate=rate)


def encode(container: str, codec: str, rate: int, **options) -> bytes:
    if codec == "libopencore_amrnb" and codec not in av.codecs_available:
        pytest.skip("PyAV writes no AMR from release 19 on")
    return sounds.encode_av(container, codec, speech(rate), rate, **options)


def likeness(heard: np.ndarray, expected: np.ndarray, *, shifts: int) -> float:
    """The correlation of two clips, one of which begins up to `shifts` samples later than the other."""
    size = len(heard) + len(expected)
    product = np.fft.irfft(np.fft.rfft(heard, size) * np.fft.rfft(expected, size).conj(), size)
    shift = int(np.argmax(np.roll(product, shifts)[: 2 * shifts])) - shifts
    a, b = heard[max(shift, 0) :], expected[max(-shift, 0) :]
    length = min(len(a), len(b))
    return float(np.corrcoef(a[:length], b[:length])[0, 1])


@pytest.mark.parametrize(("container", "codec", "rate"), LOSSLESS)
def test_lossless(tmp_path, container, codec, rate):
    """Every sample, in files and in what is written to a pipe; the name says nothing."""
    expected = load_audio(speech(rate), sampling_rate=rate)
    eight_bits = codec in ("pcm_s8", "pcm_u8", "wavpack", "tta")  # the last two where nothing else is asked for
    coarse = 2 / 128 if eight_bits else 1e-4
    content = encode(container, codec, rate)
    heard = load_audio(content)
    assert len(heard) == len(expected)
    assert np.abs(heard - expected).max() < coarse
    (tmp_path / "sound.bin").write_bytes(content)
    assert np.array_equal(load_audio(tmp_path / "sound.bin"), heard)
    if (container, codec) not in {("caf", "alac")} and container not in ("mov", "mp4"):  # which cannot be piped
        assert np.array_equal(load_audio(encode(container, codec, rate, pipe=True)), heard)


@pytest.mark.parametrize(("container", "codec", "rate"), LOSSY)
def test_lossy(container, codec, rate):
    """The whole sound, with no more around it than the codec's own blocks."""
    expected = load_audio(speech(rate), sampling_rate=rate)
    heard = load_audio(encode(container, codec, rate))
    # ffmpeg takes a block off the front of WMA, as another encoder's delay; ADPCM fills its last one.
    assert -0.05 * 16_000 < len(heard) - len(expected) < (0.12 if "adpcm" in codec else 0.06) * 16_000
    assert likeness(heard, expected, shifts=800) > (0.8 if "amr" in codec else 0.96)


def test_amr_written_by_hand():
    """Fifty frames of 20 ms; each begins with its kind."""
    content = b"#!AMR\n" + (b"\x04" + bytes(12)) * 50
    assert len(load_audio(content)) == 16_000
    wide = b"#!AMR-WB\n" + (b"\x04" + bytes(17)) * 50
    assert len(load_audio(wide)) == 16_000


@pytest.mark.parametrize(
    ("written", "subtype"),
    [
        *[
            ("AIFF", subtype)
            for subtype in ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW")
        ],
        *[("AU", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")],
        *[
            ("CAF", subtype)
            for subtype in ("PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAC_16")
        ],
        *[
            ("W64", subtype)
            for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")
        ],
        *[("WAV", subtype) for subtype in ("PCM_U8", "PCM_32", "DOUBLE", "IMA_ADPCM", "MS_ADPCM", "GSM610")],
        *[("WAVEX", "PCM_24"), ("RF64", "FLOAT"), ("NIST", "PCM_16"), ("VOC", "PCM_16"), ("OGG", "VORBIS")],
    ],
)
def test_as_libsndfile_reads_them(written, subtype):
    """What is plain samples, bit for bit; two channels."""
    file = io.BytesIO()
    rate = 8000 if subtype == "GSM610" else 16_000
    samples = speech(rate) if rate == 8000 else sounds.speech(20_000, channels=2)
    soundfile.write(file, samples, rate, format=written, subtype=subtype)
    read, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32", always_2d=True)
    expected = load_audio(read.mean(1), sampling_rate=rate)
    heard = load_audio(file.getvalue())
    assert abs(len(heard) - len(expected)) <= (640 if subtype == "GSM610" else 0)
    length = min(len(heard), len(expected))
    if subtype in ("GSM610", "IMA_ADPCM", "MS_ADPCM"):
        assert np.corrcoef(heard[:length], expected[:length])[0, 1] > 0.995
    else:
        assert np.abs(heard[:length] - expected[:length]).max() <= (0 if rate == 8000 else 1e-7)


def test_big_endian_wav():
    """RIFX, written by hand: no library here writes it."""
    samples = (speech(16_000) * 32767).astype(">i2")
    form = b"\x00\x01\x00\x01" + (16_000).to_bytes(4, "big") + (32_000).to_bytes(4, "big") + b"\x00\x02\x00\x10"
    data = samples.tobytes()
    size = (36 + len(data)).to_bytes(4, "big")
    file = b"RIFX" + size + b"WAVEfmt " + b"\0\0\0\x10" + form + b"data" + len(data).to_bytes(4, "big") + data
    assert np.array_equal(load_audio(file), samples.astype(np.float32) / 32768)


def test_titles_in_any_encoding():
    """ID3 and RIFF tags are often not UTF-8."""
    content = encode("ipod", "aac", 48_000)
    assert b"Lavf" in content
    assert np.array_equal(load_audio(content.replace(b"Lavf", b"\xe9\xff\xfe\xe9")), load_audio(content))


# ---- Tracks


def two_tracks() -> bytes:
    return sounds.encode_av("mp4", "aac", speech(48_000), 48_000, tracks=2)


def test_choosing_a_track():
    content = two_tracks()
    with pytest.raises(AudioError, match=r"2 audio tracks, not one \(0: aac.*1: aac.*track=0 \(--track 0\)") as caught:
        load_audio(content)
    assert caught.value.kind == "format"
    first, second = (load_audio(content, track=number) for number in (0, 1))
    assert np.array_equal(first, second)
    assert abs(len(first) - 1.3 * 16_000) < 2
    with pytest.raises(AudioError, match="2 audio tracks and no number 2: choose from 0 to 1"):
        load_audio(content, track=2)


@pytest.mark.parametrize("kind", ["wav", "mp3", "vorbis", "flac", "m4a"])
def test_the_only_track(kind):
    content = sounds.encode(kind, speech(48_000), 48_000)
    assert np.abs(load_audio(content, track=0) - load_audio(content)).max() < 1e-5
    with pytest.raises(AudioError, match="1 audio track"):
        load_audio(content, track=1)


@pytest.mark.parametrize("track", [-1, 1.5, "0", True])
def test_tracks_that_are_no_numbers(track):
    with pytest.raises(AudioError, match="is no track: a whole number from 0"):
        load_audio(two_tracks(), track=track)


def test_sound_of_a_video(tmp_path):
    """The picture is left alone, whatever codec it has."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    soundfile.write(tmp_path / "a.wav", speech(48_000), 48_000)
    for name in ("film.mp4", "film.mkv", "film.avi", "film.ts"):
        made = ["-f", "lavfi", "-i", "testsrc=d=2:s=64x64:r=5", "-i", tmp_path / "a.wav", tmp_path / name]
        subprocess.run(["ffmpeg", "-v", "error", *map(str, made)], check=True)
        heard = load_audio(tmp_path / name)
        assert likeness(heard, load_audio(speech(48_000), sampling_rate=48_000), shifts=700) > 0.96


def test_video_without_sound(tmp_path):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    made = ["-f", "lavfi", "-i", "testsrc=d=1:s=64x64:r=5", str(tmp_path / "film.mp4")]
    subprocess.run(["ffmpeg", "-v", "error", *made], check=True)
    with pytest.raises(AudioError, match="0 audio tracks, not one: pass a file with sound"):
        load_audio(tmp_path / "film.mp4")
