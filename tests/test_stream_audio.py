"""Streams of samples: the same sound as `load_audio` gives, block by block, and the same errors."""

import io
import itertools

import numpy as np
import pytest
import soundfile

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio.stream import BLOCK, blocks_of, stream_audio

SOUND = (0.3 * np.sin(np.arange(5 * 16_000) / 20) * np.linspace(0.2, 1, 5 * 16_000)).astype(np.float32)


def written(rate: int, form: str, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.stack([SOUND, -0.2 * SOUND], axis=1), rate, format=form, **options)
    return file.getvalue()


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_samples_of_a_clip(form, rate, tmp_path):
    content = written(rate, form)
    path = tmp_path / "sound"
    path.write_bytes(content)
    whole = load_audio(content)
    for source in (content, path, io.BytesIO(content)):
        blocks = list(stream_audio(source))
        assert {len(block) for block in blocks[:-1]} <= {BLOCK}
        streamed = np.concatenate(blocks)
        assert abs(len(streamed) - len(whole)) <= (2 if form in ("WAV", "FLAC") else 4608 * 16_000 / rate)
        both = min(len(streamed), len(whole))
        assert np.abs(streamed[:both] - whole[:both]).max() < 1e-3


def test_arrays():
    assert np.array_equal(np.concatenate(list(stream_audio(SOUND))), SOUND)
    assert sum(map(len, stream_audio(SOUND, sampling_rate=8_000))) == 2 * len(SOUND)


def test_a_file_that_is_shorter_than_it_says_is_heard_until_there(tmp_path):
    content = written(16_000, "WAV")
    cut = content[: len(content) * 3 // 5]
    blocks = []
    with pytest.raises(AudioError, match="truncated") as caught:
        blocks.extend(stream_audio(cut))
    assert caught.value.kind == "truncated"
    blocks = []
    with pytest.warns(UserWarning, match="heard in part"):
        blocks.extend(stream_audio(cut, allow_truncated=True))
    assert sum(map(len, blocks)) == pytest.approx(3 * 16_000, abs=100)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (b"", "empty"),
        (b"no sound at all", "format"),
        ("/nowhere/at.wav", "missing"),
        (np.full(9, np.nan), "not_finite"),
    ],
)
def test_what_is_no_sound_is_an_error(source, kind):
    with pytest.raises(AudioError) as caught:
        next(stream_audio(source))
    assert caught.value.kind == kind


def test_blocks():
    pieces = [np.arange(n, dtype=np.float32) for n in (3, 0, 8, 1, 2)]
    whole = np.concatenate(pieces)
    blocks = list(blocks_of(pieces, 4))
    assert [len(block) for block in blocks] == [4, 4, 4, 2]
    assert np.array_equal(np.concatenate(blocks), whole)
    assert not list(blocks_of([np.zeros(0)], 4))
    endless = blocks_of(itertools.repeat(np.zeros(3)), 4)
    assert len(next(endless)) == 4
