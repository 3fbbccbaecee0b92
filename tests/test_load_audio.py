"""`load_audio`: the same samples from every way in, and a named refusal of what is no sound or too much of it."""

import base64
import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import urllib.parse
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
import sounds

from qwen2audio_jax.audio import AudioError, check_clip, load_audio, opening
from qwen2audio_jax.audio.mpeg import frame_bytes
from qwen2audio_jax.audio.stream import stream_audio
from qwen2audio_jax.limits import LIMITS

ALL_KINDS = [*sounds.SOUNDFILE_KINDS, *sounds.AV_KINDS]


@cache
def sound_file(kind: str, *, rate: int = 48_000, channels: int = 2, seconds: float = 1.7) -> bytes:
    return sounds.encode(kind, sounds.speech(int(seconds * rate), rate=rate, channels=channels), rate)


def refusal(source, *, kind, **options) -> str:
    """The message with which a source is refused."""
    with pytest.raises(AudioError) as caught:
        load_audio(source, **options)
    assert caught.value.kind == kind, caught.value
    return str(caught.value)


# ---- The same samples, whichever way they come


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "rate", "channels"),
    [
        *[("wav", rate, channels) for rate in (8000, 16_000, 22_050, 48_000) for channels in (1, 2, 6)],
        *[("flac", rate, channels) for rate in (16_000, 44_100) for channels in (1, 3)],
        *[("mp3", rate, channels) for rate in (8000, 16_000, 44_100) for channels in (1, 2)],
        *[(kind, 44_100, 2) for kind in ("wav24", "wavfloat", "wavulaw", "wavalaw", "wavex", "rf64", "vorbis")],
        ("opus", 48_000, 2),
        ("opus", 16_000, 1),
    ],
)
# librosa 0.11 imports audioread, and that modules which Python 3.13 no longer has.
@pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated:DeprecationWarning")
def test_equals_librosa_from_path_bytes_and_file(tmp_path, kind, rate, channels):
    path = tmp_path / "sound.raw"  # an ending that says nothing, or something wrong
    path.write_bytes(sound_file(kind, rate=rate, channels=channels))
    expected, _ = librosa.load(path.rename(tmp_path / "sound"), sr=16_000)
    path.write_bytes(sound_file(kind, rate=rate, channels=channels))
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert samples.flags.c_contiguous
    assert np.array_equal(samples, expected)
    assert np.array_equal(load_audio(str(path)), expected)
    assert np.array_equal(load_audio(path.read_bytes()), expected)
    assert np.array_equal(load_audio(bytearray(path.read_bytes())), expected)
    with path.open("rb") as file:
        assert np.array_equal(load_audio(file), expected)
    assert np.array_equal(load_audio(path, sampling_rate=rate), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", sounds.AV_KINDS)
def test_pyav_formats(tmp_path, kind):
    path = tmp_path / "sound.wav"
    path.write_bytes(sound_file(kind))
    samples = load_audio(path)
    assert np.array_equal(load_audio(path.read_bytes()), samples)
    whole = load_audio(sound_file("wav"))
    # Raw AAC cannot state where in its first and last blocks the sound begins and ends; the others can.
    assert len(samples) == len(whole) if kind != "aac" else 0 < len(samples) - len(whole) < 1024
    shift = 341 if kind == "aac" else 0  # 1024 samples of encoder delay, at 16 kHz
    correlation = np.corrcoef(
        samples[shift:][: len(whole) - shift], whole[: len(samples) - shift][: len(whole) - shift]
    )
    assert correlation[0, 1] > 0.98


def test_data_urls():
    content = sound_file("flac", seconds=0.3)
    expected = load_audio(content)
    encoded = base64.b64encode(content).decode()
    for url in (
        f"data:audio/flac;base64,{encoded}",
        f"DATA:;base64,{urllib.parse.quote(encoded)}",
        "data:application/octet-stream," + urllib.parse.quote_from_bytes(content),
    ):
        assert np.array_equal(load_audio(url), expected)
    assert "no comma" in refusal("data:audio/wav;base64", kind="url")
    assert "not valid base64" in refusal("data:audio/wav;base64,UklG*Rg==", kind="url")
    for url in (f"data:;base64,{encoded}", "data:," + urllib.parse.quote_from_bytes(content)):
        refusal(url, kind="too_large", limits=replace(LIMITS, file_bytes=1000))


def test_stream_that_cannot_seek():
    class Pipe(io.RawIOBase):
        def __init__(self, content):
            self.inner = io.BytesIO(content)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.inner.readinto(memoryview(buffer)[:1000])

    content = sound_file("mp3")
    assert np.array_equal(load_audio(Pipe(content)), load_audio(content))
    refusal(Pipe(content), kind="too_large", limits=replace(LIMITS, file_bytes=len(content) - 1))


def test_id3_in_front():
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 72]) + bytes(200)
    for kind in "mp3", "flac":
        assert np.array_equal(load_audio(tag + sound_file(kind)), load_audio(sound_file(kind)))
    assert "ID3 tag states" in refusal(tag[:50], kind="truncated")


def test_import_needs_no_decoder():
    """Importing the package loads no sound library."""
    program = (
        "import sys, qwen2audio_jax.audio; "
        "print(sorted({'librosa', 'soundfile', 'av', 'soxr', 'numba', 'scipy.signal'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hearing_a_file_needs_no_librosa(tmp_path):
    (tmp_path / "sound.wav").write_bytes(sound_file("wav", rate=44_100))
    program = (
        "import sys; from qwen2audio_jax.audio import load_audio, log_mel; "
        f"log_mel(load_audio({str(tmp_path / 'sound.wav')!r})); "
        "print(sorted({'librosa', 'numba', 'scipy.signal', 'soxr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['soxr']"


# ---- Arrays


@pytest.mark.parametrize("convert", [np.float16, np.float32, np.float64, list, jnp.asarray])
def test_arrays(convert):
    samples = sounds.speech(1000).astype(np.float16).astype(np.float32)
    source = samples.tolist() if convert is list else convert(samples)
    loaded = load_audio(source)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, samples)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_array_at_another_rate(rate):
    """As librosa resamples, to the last bit, whatever the length rounds to."""
    for length in (rate, rate + 1, rate // 3, rate // 7 + 2):
        samples = sounds.speech(length, rate=rate)
        expected = librosa.resample(samples, orig_sr=rate, target_sr=16_000, res_type="soxr_hq")
        loaded = load_audio(samples, sampling_rate=rate)
        assert loaded.dtype == expected.dtype == np.float32
        assert np.array_equal(loaded, expected)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    samples = sounds.speech(1000)
    assert np.array_equal(load_audio(torch.from_numpy(samples)), samples)
    assert np.array_equal(load_audio(torch.from_numpy(samples).requires_grad_()), samples)
    assert "no array of samples" in refusal(torch.zeros(1000, device="meta"), kind="shape")


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (np.zeros((2, 1000)), "shape", ["(2, 1000)", "mean"]),
        (np.float32(1), "shape", ["()"]),
        ([np.zeros(3), np.zeros(4)], "shape", ["list"]),
        ({"array": 1}, "shape", ["'array' and no 'sampling_rate'"]),
        (None, "shape", ["()"]),
        (np.zeros(1000, np.int16), "dtype", ["int16", "divide it by 32768"]),
        (np.zeros(1000, np.int32), "dtype", ["divide it by 2147483648"]),
        (np.zeros(1000, np.complex64), "dtype", ["complex64"]),
        (["a", "b"], "dtype", ["<U1"]),
        (np.zeros(0), "empty", ["0 samples"]),
        ([], "empty", ["0 samples"]),
        (np.zeros(320), "too_short", ["320 samples (20 ms", "321"]),
        (np.zeros(480_001), "too_long", ["lasts 30.0000625 s", "the 30 s that", "truncation=True"]),
        (np.zeros(31 * 16_000), "too_long", ["lasts 31 s"]),
        (np.r_[np.zeros(500), np.nan, np.inf, 0], "not_finite", ["2 of its 503", "first at 500"]),
        (np.full(500, 1e300), "not_finite", ["500 of its 500"]),
    ],
)
def test_bad_arrays(source, kind, words):
    message = refusal(source, kind=kind)
    for word in words:
        assert word in message


@pytest.mark.parametrize("rate", [1, 999, 768_001, -16_000, 0])
def test_impossible_rates(rate):
    assert f"{rate} samples a second, outside 1000 to 768000" in refusal(
        np.zeros(1000), kind="rate", sampling_rate=rate
    )


@pytest.mark.parametrize("rate", [16_000.5, True])
def test_rates_that_are_no_whole_number(rate):
    assert "not a whole number" in refusal(np.zeros(1000), kind="rate", sampling_rate=rate)


def test_shortest_and_longest():
    assert len(load_audio(np.zeros(321))) == 321
    assert len(load_audio(np.zeros(480_000))) == 480_000
    longer = sounds.speech(32 * 16_000)
    assert np.array_equal(load_audio(longer, truncation=True), longer[:480_000])
    assert np.array_equal(check_clip(longer, truncation=True), longer[:480_000])
    assert len(load_audio(np.zeros(32 * 16_000), limits=replace(LIMITS, clip_seconds=40.0))) == 32 * 16_000
    with pytest.raises(AudioError, match=r"clip 3 lasts 32 s"):
        check_clip(longer, name="clip 3")
    with pytest.raises(ValueError, match="truncation='do_not_truncate' must be True"):
        load_audio(longer, truncation="do_not_truncate")


# ---- Length of files


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus", "m4a", "webm"])
def test_long_files(kind):
    content = sound_file(kind, channels=1, seconds=3.0)
    two = replace(LIMITS, clip_seconds=2.0)
    message = refusal(content, kind="too_long", limits=two)
    assert "longer than the 2 s" in message
    assert "lasts 3" in message
    kept = load_audio(content, limits=two, truncation=True)
    assert np.array_equal(kept, load_audio(content)[:32_000])


@pytest.mark.parametrize("kind", ["wav", "flac", "opus", "m4a", "webm", "mp3"])
def test_thirty_seconds_exactly(kind):
    noise = np.random.default_rng(0).normal(size=48_000 * 30) * 0.05
    assert len(load_audio(sounds.encode(kind, noise.astype(np.float32), 48_000))) == 480_000


def test_short_file():
    assert "320 samples" in refusal(sounds.encode("wav", sounds.speech(320), 16_000), kind="too_short")
    assert "100 samples" in refusal(sounds.encode("flac", sounds.speech(300, rate=48_000), 48_000), kind="too_short")


def test_empty_files(tmp_path):
    (tmp_path / "empty.wav").touch()
    assert "empty.wav' is empty (0 bytes)" in refusal(tmp_path / "empty.wav", kind="empty")
    assert "(0 samples)" in refusal(sounds.encode("wav", np.zeros(0, np.float32), 16_000), kind="empty")
    refusal(b"", kind="empty")


def test_not_finite_file():
    samples = sounds.speech(1000)
    samples[7] = np.nan
    for rate in 16_000, 44_100:
        assert "NaN or infinity in 1 of" in refusal(sounds.encode("wavfloat", samples, rate), kind="not_finite")


def test_another_rate_than_stated():
    for kind in "wav", "m4a", "opus":
        message = refusal(sound_file(kind), kind="rate", sampling_rate=16_000)
        assert "48000 samples a second by its header and 16000 by sampling_rate=" in message


# ---- Bombs: refused before the work


def wav_header(*, rate=16_000, channels=1, bits=16, data=0, codec=1, frame=None) -> bytes:
    frame = channels * bits // 8 if frame is None else frame
    form = struct.pack("<HHIIHH", codec, channels, rate, rate * frame & 0xFFFFFFFF, frame, bits)
    size = min(36 + data, 0xFFFFFFFF)
    return (
        b"RIFF"
        + struct.pack("<I", size)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", data)
    )


def test_resampling_bomb():
    bomb = wav_header(rate=1, data=32_000) + bytes(32_000)
    assert "states 1 samples a second, outside 1000 to 768000" in refusal(bomb, kind="rate")
    refusal(bomb, kind="rate", truncation=True)
    slow = wav_header(rate=1000, data=60_000) + bytes(60_000)
    endless = replace(LIMITS, clip_seconds=float("inf"))
    assert len(load_audio(slow, limits=endless)) == 480_000
    refusal(slow, kind="too_large", limits=replace(endless, resampled_samples=479_999))


@pytest.mark.parametrize("kind", ["flac", "opus", "mp3", "wav"])
def test_decompression_bombs(kind, monkeypatch):
    """Minutes of silence in a few kilobytes: no decoder is asked for them."""
    bomb = sounds.encode(kind, np.zeros(16_000 * 300, np.float32), 16_000)
    if kind != "mp3":
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    assert "lasts 300" in refusal(bomb, kind="too_long")
    endless = replace(LIMITS, clip_seconds=float("inf"))
    refusal(bomb, kind="too_large", limits=replace(endless, decoded_seconds=200.0))
    refusal(bomb, kind="too_large", limits=replace(endless, decoded_bytes=10_000_000))
    refusal(bomb, kind="too_large", limits=replace(endless, resampled_samples=1_000_000))
    refusal(bomb, kind="too_large", limits=replace(LIMITS, file_bytes=1000))


@pytest.mark.parametrize("kind", ["m4a", "webm"])
def test_decompression_bombs_of_pyav(kind):
    bomb = sounds.encode(kind, np.zeros(48_000 * 40, np.float32), 48_000)
    assert "lasts 40" in refusal(bomb, kind="too_long")
    refusal(bomb, kind="too_large", limits=replace(LIMITS, clip_seconds=100.0, decoded_seconds=20.0))


def test_flac_that_states_no_length():
    """A FLAC file written to a pipe is decoded as far as the limits allow."""
    content = bytearray(sound_file("flac", seconds=3.0))
    whole = load_audio(bytes(content))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert np.array_equal(load_audio(bytes(content)), whole)
    assert "goes on longer than the 2 s" in refusal(
        bytes(content), kind="too_long", limits=replace(LIMITS, clip_seconds=2.0)
    )
    assert len(load_audio(bytes(content), limits=replace(LIMITS, clip_seconds=2.0), truncation=True)) == 32_000


def test_too_many_channels():
    content = wav_header(channels=65, data=130_000) + bytes(130_000)
    assert "65 channels, not 1 to 64" in refusal(content, kind="too_large")


# ---- Truncated files


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_truncated_files(tmp_path, kind):
    """What is cut is refused, unless it is only what stands behind the sound; if asked for, what is there is heard."""
    content = sound_file(kind)
    whole = load_audio(content)
    for part in (0.05, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut{part}"
        path.write_bytes(content[: int(len(content) * part)])
        message = refusal(path, kind="truncated")
        assert f"cut{part}' is truncated: " in message
        assert refusal(path.read_bytes(), kind="truncated").partition(" is ")[2] == message.partition(" is ")[2]
        if "allow_truncated=True" in message:
            with pytest.warns(UserWarning, match="a clip is heard in part: "):
                heard = load_audio(path, allow_truncated=True)
            assert 0.2 * part * len(whole) < len(heard) < len(whole)
            start = heard[: int(0.9 * len(heard)) - 200]  # the resampler and the codec's last block end otherwise
            assert np.corrcoef(start, whole[: len(start)])[0, 1] > 0.99
        else:
            assert refusal(path, kind="truncated", allow_truncated=True) == message
    for cut in (1, 10):
        heard, error = attempt(content[:-cut])
        assert error.kind == "truncated" if error else abs(len(heard) - len(whole)) <= 400, kind


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "vorbis", "m4a", "webm"])
def test_truncated_behind_what_is_heard(kind):
    """What is missing behind the longest clip changes nothing."""
    content = sound_file(kind, seconds=4.0)
    limits = replace(LIMITS, clip_seconds=1.0)
    heard = load_audio(content, truncation=True, limits=limits)
    if kind == "m4a":  # its index stands at the end
        refusal(content[: len(content) * 3 // 4], kind="truncated", truncation=True, limits=limits)
    else:
        cut = content[: len(content) * 3 // 4]
        assert np.allclose(load_audio(cut, truncation=True, limits=limits), heard, atol=1e-4)


def test_wav_headers_that_claim_more():
    sound = bytes(32_000)
    assert "states 64000 bytes of sound and 32000 are there" in refusal(
        wav_header(data=64_000) + sound, kind="truncated"
    )
    refusal((wav_header(data=32_000) + sound)[:50], kind="truncated")
    refusal(wav_header(data=32_000)[:30], kind="truncated")
    assert len(load_audio(wav_header(data=32_000) + sound)) == 16_000
    assert len(load_audio(wav_header(data=32_000) + sound + b"LIST\x04\x00\x00\x00abcd")) == 16_000


def test_rf64_that_claims_more():
    content = bytearray(sound_file("rf64"))
    at = content.index(b"ds64") + 8 + 8
    content[at : at + 8] = struct.pack("<Q", 1 << 22)
    # libsndfile's RF64 files state their length in the data chunk where it fits there.
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff\xff\xff\xff"
    assert f"states {1 << 22} bytes" in refusal(bytes(content), kind="truncated")


def without_header_frame(content: bytes) -> bytes:
    first = content.index(b"\xff", 0)
    size = frame_bytes(content[first:])
    assert size is not None
    bare = content[first + size :]
    assert b"Xing" not in bare[:50]
    assert b"Info" not in bare[:50]
    return bare


def test_mp3_without_a_header_frame():
    """Without a Xing or Info frame the last frame must be whole."""
    samples = sounds.speech(48_000, rate=48_000)
    bare = without_header_frame(sounds.encode_av("mp3", "libmp3lame", samples, 48_000))
    assert abs(len(load_audio(bare)) - 16_000) < 1200
    assert "is cut" in refusal(bare[:-7], kind="truncated")
    assert len(load_audio(bare + b"TAG" + bytes(125))) == len(load_audio(bare))


def test_mp3_of_variable_rate_without_a_header_frame():
    """libsndfile guesses its length from the first frame, and would leave the rest of it out."""
    bare = without_header_frame(sound_file("mp3"))
    assert abs(len(load_audio(bare)) - len(load_audio(sound_file("mp3")))) < 1200


def test_mp4_without_moov():
    content = sound_file("m4a")
    assert "no whole 'moov' box" in refusal(content[: content.index(b"moov") - 4], kind="truncated")


def test_chained_ogg_of_two_codings_is_not_heard_in_part():
    assert "changes its coding on the way" in refusal(
        sound_file("vorbis") + sounds.encode("vorbis", sounds.speech(8000), 16_000), kind="format"
    )


# ---- What is no accepted sound


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"MATLAB 5.0 MAT-file" + bytes(500), "MATLAB"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x93NUMPY" + bytes(100), "numpy array"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b'{"error": "not found"}', "text"),
        (bytes(1000), "no known kind (it starts with 00 00"),
        (b"RIFF\x00\x00\x10\x00WEBP" + bytes(100), "'WEBP'"),
        (b"FORM\x00\x00\x10\x00ILBM" + bytes(100), "an IFF file"),
        (b"\xff\xfd\x80\x00" + bytes(500), "no known kind (it starts with ff fd"),
        ("text in UTF-16".encode("utf-16"), "no known kind (it starts with ff fe"),
    ],
)
def test_other_formats_are_named(tmp_path, content, words):
    path = tmp_path / "sound.wav"  # the ending does not help
    path.write_bytes(content)
    message = refusal(path, kind="format")
    assert words in message
    assert "Accepted: wav" in message


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"MAC " + bytes(100), "ffmpeg -i INPUT"),
        (b"MATLAB 5.0 MAT-file" + bytes(500), "scipy.io.loadmat"),
        (b"PK\x03\x04" + bytes(100), "Unpack it"),
        (b"%PDF-1.4" + bytes(100), "Pass a file that holds sound"),
        (b"a text\n", "Pass a file that holds sound"),
        (b"\x02#!SILK_V3" + bytes(100), "pilk"),
        (b"MThd" + bytes(100), "fluidsynth"),
        (base64.b64encode(bytes(range(250)) * 4), "base64.b64decode"),
    ],
)
def test_the_remedy_is_one_for_the_content(content, remedy):
    assert remedy in refusal(content, kind="format").partition("Accepted: ")[2]


@pytest.mark.parametrize("written", ["MAT4", "MAT5", "PAF", "SVX", "IRCAM", "HTK", "PVF", "SDS"])
def test_other_formats_of_libsndfile(written):
    file = io.BytesIO()
    soundfile.write(file, sounds.speech(1000), 16_000, format=written)
    refusal(file.getvalue(), kind="format")


def test_several_audio_tracks():
    content = sounds.encode_av("mp4", "aac", sounds.speech(48_000, rate=48_000), 48_000, tracks=2)
    assert "2 audio tracks" in refusal(content, kind="format")


def test_codec_in_container_that_is_not_accepted():
    content = sounds.encode_av("flv", "nellymoser", sounds.speech(44_100, rate=44_100), 44_100)
    assert "codec" in refusal(content, kind="format")


def test_missing_files(tmp_path):
    assert "no.wav' cannot be opened (No such file or directory)" in refusal(tmp_path / "no.wav", kind="missing")
    assert "no regular file" in refusal(tmp_path, kind="missing")
    assert "no regular file" in refusal("/dev/zero", kind="missing")
    assert "is no path" in refusal("a\0b", kind="missing")
    assert len(refusal("x" * 100_000, kind="missing")) < 500
    assert "cannot be opened" in refusal("", kind="missing")


class FailingDisk(io.BytesIO):
    """A file of which the first bytes can be read."""

    def __init__(self, content, *, good):
        super().__init__(content)
        self.good = good

    def read(self, size=-1):
        if self.tell() + (size if size is not None and size >= 0 else len(self.getbuffer())) > self.good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)

    def readinto(self, buffer):
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


@pytest.mark.parametrize("good", [0, 20_000])
@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "ogg"])
def test_a_disk_that_fails(tmp_path, monkeypatch, form, good):
    path = tmp_path / f"a.{form}"
    noise = np.random.default_rng(0).normal(size=160_000).astype(np.float32) * 0.1
    soundfile.write(path, noise, 16_000, format=form.upper())
    content = path.read_bytes()
    assert len(content) > good
    monkeypatch.setattr(opening, "open", lambda *_: FailingDisk(content, good=good), raising=False)
    assert f"a.{form}' cannot be read (Input/output error): try again" in refusal(path, kind="missing")
    with pytest.raises(AudioError, match="cannot be read"):
        list(stream_audio(path))


@pytest.mark.parametrize("url", ["ftp://example.com/a.wav", "file:///tmp/a.wav", "s3://bucket/a.wav", "gs://b/a.wav"])
def test_other_schemes(url):
    assert "is not fetched: http, https and data are" in refusal(url, kind="url")


def test_text_file_object():
    assert "binary mode" in refusal(io.StringIO("RIFF"), kind="dtype")


def test_errors_come_back_from_a_worker_process():
    error = pickle.loads(pickle.dumps(AudioError("words", kind="truncated")))
    assert (str(error), error.kind) == ("words", "truncated")


# ---- Damage


def attempt(source):
    """The samples and no error, or no samples and the AudioError; other errors pass through."""
    try:
        return load_audio(source), None
    except AudioError as error:
        return None, error


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_damaged_files_end_in_an_audio_error_or_sound(kind, capfd):
    """Seeded mutations of every format: nothing but an AudioError comes out, and it repeats no library's words."""
    rng = np.random.default_rng(ALL_KINDS.index(kind))
    content = sound_file(kind, rate=48_000, channels=1, seconds=0.3)
    for _ in range(200):
        damaged = bytearray(content)
        # Half the damage goes into the first bytes, where the headers are.
        reach = len(damaged) if rng.random() < 0.5 else min(len(damaged), 200)
        for _ in range(rng.integers(1, 8)):
            damaged[rng.integers(reach)] = rng.integers(256)
        if rng.random() < 0.3:
            at, length = rng.integers(len(damaged)), rng.integers(1, 100)
            damaged[at : at + length] = b"" if rng.random() < 0.5 else rng.bytes(length)
        samples, error = attempt(bytes(damaged))
        if error is not None:
            assert "0x" not in str(error).replace("codec 0x", "")
            assert error.__cause__ is None
            assert error.__suppress_context__ or error.__context__ is None
        else:
            assert samples.ndim == 1
            assert np.isfinite(samples).all()
    assert "Traceback" not in capfd.readouterr().err
