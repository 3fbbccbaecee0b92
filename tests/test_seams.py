"""No sound lost at heads, tails and seams: each codec against ffmpeg, and files put one behind the other."""

import io
import shutil
import struct
import subprocess
from functools import cache

import numpy as np
import pytest
import soundfile
import sounds
from test_formats import likeness
from test_whole_files import ogg_pages, with_checksum

from qwen2audio_jax.audio import AudioError, load_audio

RATE = 48_000
KINDS = {
    **{kind: (None, None) for kind in ("wav", "wav24", "wavulaw", "rf64", "flac", "vorbis", "opus", "mp3")},
    **{kind: (None, None) for kind in ("m4a", "m4aalac", "webm", "aac")},
    "aiff": ("aiff", "pcm_s16be"),
    "au": ("au", "pcm_s16be"),
    "caf": ("caf", "pcm_s16le"),
    "w64": ("w64", "pcm_s16le"),
    "matroska": ("matroska", "libopus"),
    "mka": ("matroska", "aac"),
    "oggflac": ("ogg", "flac"),
    "mp2": ("mp2", "mp2"),
    "ac3": ("ac3", "ac3"),
    "wma": ("asf", "wmav2"),
    "adpcm": ("wav", "adpcm_ima_wav"),
    "mp3 in wav": ("wav", "libmp3lame"),
    "ts": ("mpegts", "aac"),
    "avi": ("avi", "libmp3lame"),
    "wavpack": ("wv", "wavpack"),
    "tta": ("tta", "tta"),
}
QUICK = ("mp3", "vorbis", "opus", "m4a", "webm", "aac", "wma", "adpcm")
"""Kinds whose priming and padding differ; the others are as long as their samples."""
JOINED = (
    "wav",
    "wavulaw",
    "rf64",
    "flac",
    "vorbis",
    "opus",
    "mp3",
    "aac",
    "aiff",
    "au",
    "caf",
    "w64",
    "oggflac",
    "mp2",
)
JOINED += ("ac3", "webm", "matroska")


@cache
def encoded(kind: str, *, seed: int = 0, seconds: float = 1.1) -> bytes:
    samples = sounds.speech(int(seconds * RATE), rate=RATE, seed=seed)
    container, codec = KINDS[kind]
    if container is None:
        return sounds.encode(kind, samples, RATE)
    return sounds.encode_av(container, codec, samples, RATE)


def edges(kind: str) -> np.ndarray:
    """A sound with a loud click near each of its ends."""
    samples = np.zeros(int(0.9 * RATE), np.float32)
    noise = np.random.default_rng(1).normal(size=960).astype(np.float32) * 0.3
    samples[:960], samples[-960:] = noise, noise
    container, codec = KINDS[kind]
    content = (
        sounds.encode(kind, samples, RATE) if container is None else sounds.encode_av(container, codec, samples, RATE)
    )
    return load_audio(content)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_as_long_as_ffmpeg_plays_it(tmp_path, kind):
    (tmp_path / "sound").write_bytes(encoded(kind))
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "sound"), "-f", "f32le", "-ac", "1", "-ar", "16000", "-"]
    played = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4")
    heard = load_audio(encoded(kind))
    # ffmpeg plays the padding of AAC, which these files say is no sound; older releases what is in front of it too.
    assert -400 * (kind in ("m4a", "m4aalac", "mka")) - 2 <= len(heard) - len(played) <= 2
    assert likeness(heard, played, shifts=400) > 0.98


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"wma"}))
def test_heads_and_tails(kind):
    """Both clicks are there: the first 20 ms and the last."""
    heard = edges(kind)
    assert np.abs(heard[:2400]).max() > 0.2
    assert np.abs(heard[-4000:]).max() > 0.2
    loud = np.flatnonzero(np.abs(heard) > 0.1)
    assert abs((loud[-1] - loud[0]) - 0.9 * 16_000) < 200  # a codec's block rings before a click


@pytest.mark.parametrize("kind", JOINED)
def test_files_put_one_behind_the_other(kind):
    """Both are heard whole: as long as both, and the second one is what it is alone."""
    first, second = encoded(kind), encoded(kind, seed=1, seconds=0.8)
    both, alone, rest = load_audio(first + second), load_audio(first), load_audio(second)
    # What an encoder adds at both ends is heard where it is not taken off: 69 ms of silence in mp3.
    assert -40 <= len(both) - len(alone) - len(rest) < 1200
    assert likeness(both[-len(rest) :], rest, shifts=600) > 0.98
    assert likeness(both[: len(alone)], alone, shifts=600) > 0.98


@pytest.mark.parametrize("kind", ["wav", "mp3", "vorbis", "flac"])
def test_many_pieces(kind):
    """As speech servers send them."""
    pieces = [encoded(kind, seed=seed, seconds=0.3) for seed in range(6)]
    whole = load_audio(b"".join(pieces))
    assert abs(len(whole) - sum(len(load_audio(piece)) for piece in pieces)) < 5 * 1200
    for number, piece in enumerate(pieces):
        alone = load_audio(piece)
        start = round(number / 6 * len(whole))
        near = whole[max(start - 2000, 0) : start + len(alone) + 2000]
        assert likeness(near, alone, shifts=4000) > 0.8


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("serials", [(1, 2), (7, 7)])
def test_chained_ogg(subtype, serials):
    parts = []
    for serial, seed in zip(serials, (0, 1), strict=True):
        file = io.BytesIO()
        soundfile.write(file, sounds.speech(20_000, seed=seed), 16_000, format="OGG", subtype=subtype)
        content = file.getvalue()
        pages = [bytearray(content[start:end]) for start, end in ogg_pages(content)]
        for page in pages:
            page[14:18] = struct.pack("<I", serial)
        parts.append(b"".join(with_checksum(bytes(page)) for page in pages))
    heard = load_audio(b"".join(parts))
    assert abs(len(heard) - 40_000) < 400
    assert likeness(heard[:20_000], sounds.speech(20_000, seed=0), shifts=300) > 0.9
    assert likeness(heard[20_000:], sounds.speech(20_000, seed=1), shifts=300) > 0.9


def test_wav_files_of_different_rates():
    parts = [(16_000, 16_000), (24_000, 48_000), (8_000, 8_000)]
    content = b"".join(sounds.encode("wav", sounds.speech(count, rate=rate), rate) for count, rate in parts)
    heard = load_audio(content)
    assert len(heard) == 16_000 + 8_000 + 16_000
    assert (
        likeness(heard[16_000:24_000], load_audio(sounds.speech(24_000, rate=48_000), sampling_rate=48_000), shifts=9)
        > 0.99
    )


def test_wav_files_with_chunks_behind_the_sound():
    """Titles and markers stand there; what is no chunk is left alone."""
    chunk = b"LIST\x0c\0\0\0INFOICMT\0\0\0\0"
    whole = load_audio(encoded("wav"))
    assert np.array_equal(load_audio(encoded("wav") + chunk + b"\xff" * 99), whole)
    assert len(load_audio(encoded("wav") + chunk + chunk + encoded("wav") + chunk)) == 2 * len(whole)


def test_wav_files_of_which_the_last_is_cut():
    content = encoded("wav") + encoded("wav", seed=1)[:-2000]
    with pytest.raises(AudioError, match="truncated: its header states"):
        load_audio(content)


def test_several_files_count_together():
    with pytest.raises(AudioError, match=r"lasts 33 s, which is longer than the 30 s") as caught:
        load_audio(encoded("wav") * 30)
    assert caught.value.kind == "too_long"
    assert len(load_audio(encoded("wav") * 30, truncation=True)) == 480_000


def test_mp4_files_one_behind_the_other_are_refused():
    """Only the first is ever played."""
    with pytest.raises(AudioError, match=r"2 mp4 files one behind the other.*concat"):
        load_audio(encoded("m4a") * 2)


# ---- Damage loses no sound without a word


@pytest.mark.parametrize("kind", ["flac", "oggflac", "wavpack", "tta", "vorbis", "opus", "m4a"])
def test_damage_in_the_middle(kind):
    content = bytearray(encoded(kind))
    at = len(content) // 2
    content[at : at + 40] = bytes(40)
    with pytest.raises(AudioError) as caught:
        load_audio(bytes(content))
    assert caught.value.kind in ("corrupt", "truncated")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_ogg_page_that_is_lost(subtype, which):
    """A page that fails its checksum is left out by every decoder, without a word."""
    file = io.BytesIO()
    soundfile.write(file, sounds.speech(8 * 16_000), 16_000, format="OGG", subtype=subtype)
    content = bytearray(file.getvalue())
    pages = [
        page for page in ogg_pages(bytes(content)) if int.from_bytes(content[page[0] + 6 : page[0] + 14], "little")
    ]
    start, end = pages[which]
    content[(start + end) // 2] ^= 1
    with pytest.raises(AudioError) as caught:
        load_audio(bytes(content))
    assert caught.value.kind in ("corrupt", "truncated")
