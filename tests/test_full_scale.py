"""Samples far beyond full scale: refused with the division that is likely missing, which works."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import sounds

from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.audio.clip import check_clip
from qwen2audio_jax.limits import LIMITS

CLIP = sounds.speech(8000)
CLIP /= np.abs(CLIP).max()


def float_wav(samples, subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("factor", [1 << 15, 32767, 1 << 23, 1 << 31, 3000])
@pytest.mark.parametrize("form", ["float32", "float64", "list", "float wav", "double wav", "at another rate", "a pair"])
def test_integers_as_floats_are_refused(form, factor):
    loud = CLIP * np.float32(factor)
    source, options = {
        "float32": (loud, {}),
        "float64": (loud.astype(np.float64), {}),
        "list": (loud.tolist(), {}),
        "float wav": (float_wav(loud), {}),
        "double wav": (float_wav(loud, "DOUBLE"), {}),
        "at another rate": (loud, {"sampling_rate": 44_100}),
        "a pair": ((16_000, loud), {}),
    }[form]
    divisor = next(1 << bits for bits in (15, 23, 31) if factor <= 1 << bits)
    with pytest.raises(AudioError, match=f"full scale is 1.*divide them by {divisor} ") as error:
        load_audio(source, **options)
    assert error.value.kind == "scale"
    assert np.abs(load_audio(loud / divisor, **({"sampling_rate": 44_100} if options else {}))).max() <= 1.5


def test_eight_bits_are_thought_of():
    with pytest.raises(AudioError, match=r"divide them by 32768 \(or by 128 if they had 8 bits\)"):
        load_audio(CLIP * 127)


def test_what_no_integer_can_be():
    with pytest.raises(AudioError, match="no samples of sound"):
        load_audio(CLIP * np.float32(1e20))


@pytest.mark.parametrize("peak", [0, 1e-6, 1, 1.5, 4, 16])
def test_loud_and_quiet_recordings_are_heard(peak):
    samples = CLIP * np.float32(peak)
    assert np.array_equal(load_audio(samples), samples)
    assert np.array_equal(load_audio(-samples), -samples)


def test_the_negative_peak_and_the_limit_count():
    samples = np.zeros(1000, np.float32)
    samples[7] = -17
    with pytest.raises(AudioError, match=r"up to 17, and full scale is 1 .at most 16"):
        check_clip(samples)
    assert check_clip(samples, limits=replace(LIMITS, peak=20.0))[7] == -17
