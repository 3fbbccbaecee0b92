"""Whole files whose headers state a placeholder, or nothing, for a length: heard whole. Provably cut ones: refused."""

import io
import struct
from functools import cache

import numpy as np
import pytest
import soundfile
import sounds

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio.load import load_clip

RATE = 16_000
PLACEHOLDERS = (
    *(0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF - 36, 0xFFFFFFFF - 44, 0x7FFFF000, 0xFFFFFF00),
    *(1_000_000_000, 2_000_000_000, 4_000_000_000),
)


@cache
def speech() -> np.ndarray:
    return (sounds.speech(20_000) * 32767).astype("<i2").astype(np.float32) / 32768


def written(kind: str, **options) -> bytearray:
    file = io.BytesIO()
    soundfile.write(file, speech(), RATE, format=kind, **({"subtype": "PCM_16"} | options))
    return bytearray(file.getvalue())


def patched(content: bytearray, at: int, value: int, form: str) -> bytes:
    content = bytearray(content)
    content[at : at + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(content)


def ogg_pages(content: bytes):
    """(start, end) of the pages."""
    at = 0
    while at < len(content):
        segments = content[at + 26]
        end = at + 27 + segments + sum(content[at + 27 : at + 27 + segments])
        yield at, end
        at = end


def with_checksum(page: bytes) -> bytes:
    value = 0
    page = page[:22] + bytes(4) + page[26:]
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return page[:22] + struct.pack("<I", value) + page[26:]


# ---- Placeholders


@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_wav(size):
    content = written("WAV")
    at = content.index(b"data") + 4
    for outer in (0, 36, 0x7FFFFFFF, 0xFFFFFFFF, min(size + 36, 0xFFFFFFFF)):
        assert np.array_equal(load_audio(patched(patched(content, 4, outer, "<I"), at, size, "<I")), speech())


@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_big_endian_wav(size):
    content = bytearray(b"RIFX\0\0\0\0WAVEfmt \0\0\0\x10\0\x01\0\x01" + struct.pack(">IIHH", RATE, 2 * RATE, 2, 16))
    content += b"data" + struct.pack(">I", size) + (speech() * 32768).astype(">i2").tobytes()
    assert np.array_equal(load_audio(bytes(content)), speech())


@pytest.mark.parametrize("size", [0, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1])
def test_rf64_bw64_and_w64(size):
    content = written("RF64")
    data = content.index(b"data") + 4
    for mark in b"RF64", b"BW64":
        long = bytearray(patched(patched(content, content.index(b"ds64") + 16, size, "<Q"), data, 0xFFFFFFFF, "<I"))
        long[:4] = mark
        assert np.array_equal(load_audio(bytes(long)), speech())
    content = written("W64")
    assert np.array_equal(load_audio(patched(content, content.index(b"data") + 16, size, "<Q")), speech())


@pytest.mark.parametrize("size", [0, 8, 0x7FFFFFFF, 0xFFFFFFFF, 2_000_000_000])
@pytest.mark.parametrize("frames", [0, 0x7FFFFFFF, 0xFFFFFFFF, 20_000])
def test_aiff(size, frames):
    content = written("AIFF")
    content = bytearray(patched(content, content.index(b"COMM") + 10, frames, ">I"))
    content = bytearray(patched(content, content.index(b"SSND") + 4, size, ">I"))
    assert np.array_equal(load_audio(patched(content, 4, 0, ">I")), speech())


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF, 2_000_000_000])
def test_au(size):
    assert np.array_equal(load_audio(patched(written("AU"), 8, size, ">I")), speech())


@pytest.mark.parametrize("size", [0, 4, (1 << 64) - 1, (1 << 63) - 1, 0xFFFFFFFF])
def test_caf(size):
    content = written("CAF")
    assert np.array_equal(load_audio(patched(content, content.index(b"data") + 4, size, ">Q")), speech())


@pytest.mark.parametrize("frames", [0, (1 << 36) - 1])
def test_flac(frames):
    content = written("FLAC")
    fields = int.from_bytes(content[18:26], "big")
    content[18:26] = (fields & ~((1 << 36) - 1) | frames).to_bytes(8, "big")
    assert np.array_equal(load_audio(bytes(content)), speech())


@cache
def other_wav(codec: str) -> bytearray:
    return bytearray(sounds.encode_av("wav", codec, speech(), RATE))


@pytest.mark.parametrize("codec", ["adpcm_ms", "adpcm_ima_wav", "adpcm_yamaha", "pcm_mulaw", "libmp3lame", "g722"])
@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_of_other_codings(codec, size):
    content = other_wav(codec)
    at = content.index(b"data") + 4
    whole = load_audio(bytes(content))
    heard = load_audio(patched(content, at, size, "<I"))
    assert len(heard) >= len(whole)
    assert np.array_equal(heard[: len(whole)], whole)


@pytest.mark.parametrize("extra", [0, 36, 44])
def test_wav_whose_size_counts_its_header(extra):
    content = written("WAV")
    size = len(content) - 44
    if extra == 0:
        assert np.array_equal(load_audio(patched(content, 40, size, "<I")), speech())
    else:
        assert np.array_equal(load_audio(patched(content, 40, size + extra, "<I")), speech())


def test_wav_that_is_empty_says_so():
    """0 is a length where the whole file agrees."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(0, np.float32), RATE, format="WAV")
    for content in (file.getvalue(), file.getvalue() + b"LIST\4\0\0\0abcd"):
        content = patched(bytearray(content), 4, len(content) - 8, "<I")
        with pytest.raises(AudioError, match="empty"):
            load_audio(content)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_without_a_last_page_mark(subtype):
    """As voice notes and pieces of recordings are; and with what is no page behind it."""
    content = bytes(written("OGG", subtype=subtype))
    whole = load_audio(content)
    *_, (start, _) = ogg_pages(content)
    page = bytearray(content[start:])
    page[5] &= ~4
    open_end = content[:start] + with_checksum(bytes(page))
    assert abs(len(load_audio(open_end)) - len(whole)) <= 320
    # Cut between two pages: nothing says that there were more.
    heard = load_audio(content[:start])
    assert 0 < len(heard) < len(whole)
    with pytest.raises(AudioError, match=r"truncated: it ends within a page.*allow_truncated=True"):
        load_audio(open_end[:-7])


@pytest.mark.parametrize(
    ("container", "codec"),
    [("matroska", "libopus"), ("webm", "libopus"), ("matroska", "flac"), ("flv", "aac"), ("mpegts", "aac")],
)
def test_live_containers(container, codec):
    """Without a duration, and with sizes that are unknown."""
    samples = sounds.speech(48_000, rate=48_000)
    whole = load_audio(sounds.encode_av(container, codec, samples, 48_000))
    live = sounds.encode_av(container, codec, samples, 48_000, pipe=True)
    assert len(load_audio(live)) == len(whole)
    assert np.abs(load_audio(live) - whole).max() < 1e-4


@pytest.mark.parametrize("seconds", [0.0, 1e9, float("nan"), float("inf"), -5.0, 0.1])
def test_webm_of_a_wrong_duration(seconds):
    """Recorders write none, and scripts that add one are off; only sound that is missing counts."""
    content = sounds.encode("webm", sounds.speech(48_000, rate=48_000), 48_000)
    at = content.index(b"\x44\x89\x88") + 3
    wrong = content[:at] + struct.pack(">d", seconds * 1000) + content[at + 8 :]
    assert np.array_equal(load_audio(wrong), load_audio(content))


@pytest.mark.parametrize("value", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_mp4_of_an_unknown_duration(value):
    content = sounds.encode("m4a", sounds.speech(48_000, rate=48_000), 48_000)
    for box in b"mvhd", b"mdhd":
        content = patched(bytearray(content), content.index(box) + 20, value, ">I")
    assert abs(len(load_audio(content)) - 16_000) <= 200


def test_fragmented_mp4():
    samples = sounds.speech(96_000, rate=48_000)
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "300000"}
    content = sounds.encode_av("mp4", "aac", samples, 48_000, options=options)
    heard = load_audio(content)
    assert 0 <= len(heard) - 32_000 < 500
    with pytest.raises(AudioError, match="truncated"):
        load_audio(content[: len(content) * 2 // 3])


# ---- MP3


@cache
def mp3(*, pipe: bool = False, id3: str = "4", xing: str = "1") -> bytes:
    options = {"write_xing": xing, "id3v2_version": id3}
    return sounds.encode_av("mp3", "libmp3lame", sounds.speech(48_000, rate=24_000), 24_000, pipe=pipe, options=options)


@pytest.mark.parametrize("frames", [0, 1, 5, None])
def test_mp3_whose_header_states_too_few(frames):
    """Xing, Info: written before the sound and never mended, kept from a piece, or without the number."""
    content = bytearray(mp3())
    at = next(content.find(mark) for mark in (b"Xing", b"Info") if mark in content)
    whole = load_audio(bytes(content))
    if frames is None:
        content[at + 7] &= ~1
    else:
        content[at + 8 : at + 12] = frames.to_bytes(4, "big")
    heard = load_audio(bytes(content))
    assert len(whole) <= len(heard) < len(whole) + 2500


def test_mp3_whose_header_counts_itself():
    content = bytearray(mp3())
    at = next(content.find(mark) for mark in (b"Xing", b"Info") if mark in content)
    content[at + 8 : at + 12] = (int.from_bytes(content[at + 8 : at + 12], "big") + 1).to_bytes(4, "big")
    assert len(load_audio(bytes(content))) >= len(load_audio(mp3()))


def test_mp3_whose_header_states_too_many():
    content = bytearray(mp3())
    at = next(content.find(mark) for mark in (b"Xing", b"Info") if mark in content)
    content[at + 8 : at + 12] = (200).to_bytes(4, "big")
    with pytest.raises(AudioError, match=r"states 200 frames and \d\d are there"):
        load_audio(bytes(content))
    assert load_clip(bytes(content), allow_truncated=True).missing is not None


@pytest.mark.parametrize("id3", ["0", "3"])
@pytest.mark.parametrize("pipe", [False, True])
def test_mp3_without_a_header(id3, pipe):
    heard = load_audio(mp3(xing="0", id3=id3, pipe=pipe))
    assert 0 < len(heard) - 32_000 < 2500


@pytest.mark.parametrize("front", [417, 4096, 60_000])
def test_mp3_behind_something_else(front):
    """What taggers and dumps of radio leave in front of the first frame."""
    content = mp3()
    whole = len(load_audio(content))
    tag = b"ID3\x04\0\0\0\0\x08\0" + bytes(1024)
    for junk in (bytes(front), tag + bytes(front), tag + b"\xff" * 40 + bytes(front - 40)):
        assert 0 <= len(load_audio(junk + content)) - whole < 2500
    assert abs(len(load_audio(content[500:])) - whole) < 3000


def test_what_only_looks_like_mp3():
    for content in (bytes(90_000) + mp3(), bytes(1000) + mp3()[:700], b"\xff\xfb\x90\x00" * 3 + bytes(3000)):
        with pytest.raises(AudioError) as caught:
            load_audio(content)
        assert caught.value.kind in ("format", "truncated")


# ---- Cut files


def test_what_is_there_is_flagged(tmp_path):
    content = bytes(written("WAV"))
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    clip = load_clip(tmp_path / "cut.wav", allow_truncated=True)
    assert np.array_equal(clip.samples, speech()[: len(clip.samples)])
    assert clip.missing == f"its header states 40000 bytes of sound and {len(content) // 2 - 44} are there"
    assert load_clip(content, allow_truncated=True).missing is None
    with pytest.warns(UserWarning, match="heard in part: its header states 40000 bytes"):
        load_audio(tmp_path / "cut.wav", allow_truncated=True)


@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "W64", "RF64", "FLAC", "NIST"])
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_cut_files_of_every_kind(kind, part):
    content = bytes(written(kind))
    cut = content[: int(len(content) * part)]
    with pytest.raises(AudioError, match=r"truncated.*allow_truncated=True \(--allow-truncated\)"):
        load_audio(cut)
    clip = load_clip(cut, allow_truncated=True)
    assert clip.missing is not None
    assert abs(len(clip.samples) - part * 20_000) < 4600
    assert np.allclose(clip.samples, speech()[: len(clip.samples)], atol=1e-4)


def test_piece_of_a_flac_file():
    """It keeps the duration of the whole, and begins later."""
    content = bytes(written("FLAC"))
    starts = [at for at in range(len(content) - 4) if content[at] == 0xFF and content[at + 1] in (0xF8, 0xF9)]
    whole = load_audio(content)
    heard = load_audio(content[: starts[0]] + content[starts[1] :])
    assert np.array_equal(heard, whole[-len(heard) :])


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100])
def test_vorbis_whose_packets_state_too_little_is_whole(rate):
    """Of packets between short and long blocks ffmpeg's reader tells too short a time."""
    samples = sounds.speech(12 * rate, rate=rate, seed=6)
    data = sounds.encode("vorbis", samples, rate)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    heard = load_audio(data, sampling_rate=rate) if rate == 16_000 else load_audio(data)
    assert len(heard) == len(expected) * 16_000 // rate
    if rate == 16_000:
        np.testing.assert_array_equal(heard, expected)
