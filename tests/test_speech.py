"""Synthetic speech: questions, reproducibility, and test data disjoint from training data."""

import json
import re
import subprocess
import sys
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qwen2audio_jax.audio.load import load_audio
from qwen2audio_jax.processing.json_lines import read_lines
from qwen2audio_jax.speech import espeak, synthesis, voices
from qwen2audio_jax.speech.__main__ import main
from qwen2audio_jax.speech.dataset import clips_in_both, write_dataset
from qwen2audio_jax.speech.package_clips import EXAMPLES
from qwen2audio_jax.speech.tasks import PAIR, TASKS, counted, example
from qwen2audio_jax.train.records import read_record

try:
    espeak.version()
except ValueError as error:
    MISSING = str(error)
else:
    MISSING = ""
speaking = pytest.mark.skipif(bool(MISSING), reason=MISSING)

EMBEDDED_CLIPS = Path(synthesis.__file__).parent.parent / "embedded" / "examples"


def records_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A few examples of each split with the same seed."""
    if MISSING:
        pytest.skip(MISSING)
    root = tmp_path_factory.mktemp("speech")
    for split in ("train", "test", "unseen"):
        write_dataset(root / split, clips=60, seed=5, split=split)
    return root


def test_the_same_seed_writes_the_same_bytes(folders, tmp_path):
    # Fewer examples and another number of processes: an example depends on neither.
    write_dataset(tmp_path / "again", clips=30, seed=5, split="train", workers=1)
    again = records_of(tmp_path / "again")
    assert again == records_of(folders / "train")[:30]
    for path in (tmp_path / "again").rglob("*.wav"):
        assert path.read_bytes() == (folders / "train" / path.relative_to(tmp_path / "again")).read_bytes()
    write_dataset(tmp_path / "other", clips=30, seed=6, split="train")
    assert not clips_in_both(tmp_path / "other", folders / "train")


def test_splits_share_no_clip_and_unseen_no_voice(folders, capsys):
    variants = {}
    for split in ("train", "test", "unseen"):
        clips = [clip for record in records_of(folders / split) for clip in record["meta"]["clips"]]
        variants[split] = {clip["voice"].partition("+")[2] for clip in clips if "voice" in clip}
    assert not variants["unseen"] & (variants["train"] | variants["test"])
    assert main(["disjoint", str(folders / "train"), str(folders / "test")]) == 0
    assert main(["disjoint", str(folders / "train"), str(folders / "train")]) == 2
    assert "clips are in both" in capsys.readouterr().err


def test_voices_kept_apart():
    assert not set(voices.LOW + voices.HIGH) & set(voices.UNSEEN_LOW + voices.UNSEEN_HIGH)
    assert not set(voices.ACCENTS) & set(voices.UNSEEN_ACCENTS)


def test_records_and_wavs(folders):
    manifest = json.loads((folders / "train" / "manifest.json").read_text())
    records = records_of(folders / "train")
    assert manifest["examples"] == len(records) == 60
    assert manifest["tasks"] == dict(sorted(Counter(record["task"] for record in records).items()))
    for record in records:
        items = [
            item["audio"]
            for message in record.get("messages", [])
            if isinstance(message["content"], list)
            for item in message["content"]
            if item["type"] == "audio"
        ]
        names = record.get("audios", []) + items
        assert len(names) == len(record["meta"]["clips"]) > 0
        for name, clip in zip(names, record["meta"]["clips"], strict=True):
            with wave.open(str(folders / "train" / name)) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
                assert file.getnframes() / 16000 == pytest.approx(clip["seconds"], abs=6e-4)
            if clip["kind"] != "empty":
                peak = 20 * np.log10(np.abs(load_audio(str(folders / "train" / name))).max())
                assert -30.2 < peak <= 0


def test_records_are_read_for_training(folders):
    root = folders / "train"
    for where, line in read_lines(root / "records.jsonl"):
        record = read_record(line, where=where, audio_root=root, preferences=False)
        assert record.clips
        assert all(Path(clip).is_file() for clip in record.clips)


@speaking
def test_answers_fit_the_clips():
    """Answers agree with how the clips were made, over every task."""
    seen = set()
    for index in range(150):
        record, clips = example(np.random.default_rng([3, index]), "train")
        kinds = [clip.meta["kind"] for clip in clips]
        answer = record["response"] if "prompt" in record else record["messages"][-1]["content"]
        task = record["task"]
        if task == "sum":
            a, b, result = map(int, re.fullmatch(r"(\d) plus (\d) is (\d+)\.", answer).groups())
            assert a + b == result
            assert clips[0].meta["text"].endswith(f"{synthesis.WORDS[a]} plus {synthesis.WORDS[b]}")
        elif task == "voice":
            assert clips[0].pitch_hz < synthesis.LOW_HZ if "low" in answer else clips[0].pitch_hz > synthesis.HIGH_HZ
        elif task == "kind":
            assert kinds[0].replace("digits", "speech") in answer
        elif task == "pair":
            question = record["messages"][-2]["content"][-1]["text"]
            which = "second" in answer
            if question in (PAIR["tone"], PAIR["noise"]):
                name = "tone" if question == PAIR["tone"] else "noise"
                assert kinds[which] == name != kinds[not which]
            elif question == PAIR["higher"]:
                assert clips[which].pitch_hz > 1.3 * clips[not which].pitch_hz
            seen.add(question)
        seen.add(task)
    assert seen >= set(TASKS) - {"pair"}
    assert len(seen & set(PAIR.values())) >= 3


def test_counted():
    assert [counted([7] * n) for n in (1, 2, 8)] == [
        "One digit is spoken.",
        "Two digits are spoken.",
        "Eight digits are spoken.",
    ]


def test_shares():
    assert sum(share for share, _ in TASKS.values()) == pytest.approx(1)


@pytest.mark.parametrize("hz", [75.0, 118.0, 202.0, 240.0, 320.0])
def test_fundamental_of_a_pulse_train(hz):
    t = np.arange(16000) / 16000
    pulses = sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 12))
    measured = synthesis.fundamental(pulses.astype(np.float32))
    periods = round(hz / measured)
    assert measured * periods == pytest.approx(hz, rel=0.02)
    assert periods == 1 or hz > synthesis.LOW_HZ


def test_nothing_voiced_has_no_fundamental():
    assert synthesis.fundamental(np.random.default_rng(0).standard_normal(16000).astype(np.float32)) == 0
    assert synthesis.fundamental(np.zeros(100, np.float32)) == 0


@pytest.mark.parametrize(("color", "slope_db"), [(0, 0.0), (1, -3.01), (2, -6.02)])
def test_noise_color(color, slope_db):
    """Power falls by so many dB an octave, and its mean square is 1."""
    values = synthesis.noise(np.random.default_rng(1), 1 << 17, color)
    power = np.abs(np.fft.rfft(values)) ** 2
    hz = np.fft.rfftfreq(len(values), 1 / 16000)
    octaves = [np.mean(power[(hz >= low) & (hz < 2 * low)]) for low in (200, 400, 800, 1600, 3200)]
    assert np.diff(10 * np.log10(octaves)) == pytest.approx(slope_db, abs=0.4)
    assert np.mean(np.square(values)) == pytest.approx(1, rel=1e-3)


@speaking
def test_more_digits_take_longer():
    how = {"voice": "en-US+f2", "rate": 170, "pitch": 50, "range": 50}
    one, four = espeak.speak("seven", **how), espeak.speak("seven seven seven seven", **how)
    assert one.dtype == np.float32
    assert np.abs(one).max() == pytest.approx(1)
    assert 2.5 < len(four) / len(one) < 5
    slow = espeak.speak("seven", **{**how, "rate": 110})
    assert len(slow) > 1.2 * len(one)
    low, high = (synthesis.fundamental(espeak.speak("nine one", **{**how, "pitch": p})) for p in (10, 90))
    assert low < high


@speaking
def test_all_variants_exist():
    every = {*voices.LOW, *voices.HIGH, *voices.UNSEEN_LOW, *voices.UNSEEN_HIGH} - {""}
    assert every <= espeak.variants()


@speaking
def test_unknown_voice():
    with pytest.raises(ValueError, match="no voice 'xx-nowhere\\+f2'"):
        espeak.speak("one", voice="xx-nowhere+f2", rate=170, pitch=50, range=50)


def test_missing_library(monkeypatch):
    monkeypatch.setattr(espeak, "_LIBRARY", "libespeak-ng-that-is-missing.so")
    espeak._engine.cache_clear()
    with pytest.raises(ValueError, match="apt-get install libespeak-ng1"):
        espeak.version()
    espeak._engine.cache_clear()


@speaking
def test_bad_data_options(tmp_path, folders):
    for arguments, said in (
        ({"clips": 0, "seed": 1}, "clips=0"),
        ({"clips": 1, "seed": -1}, "seed=-1"),
        ({"clips": 1, "seed": 1, "split": "dev"}, "split is 'dev'"),
    ):
        with pytest.raises(ValueError, match=said):
            write_dataset(tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match=r"has a records\.jsonl already"):
        write_dataset(folders / "train", clips=1, seed=5)


@speaking
def test_shipped_examples_are_what_the_command_writes(tmp_path):
    # A process of its own: espeak-ng's flutter runs on from call to call.
    command = [sys.executable, "-m", "qwen2audio_jax.speech", "examples", str(tmp_path)]
    subprocess.run(command, check=True, cwd=EMBEDDED_CLIPS.parent.parent.parent, capture_output=True)
    assert {path.stem for path in EMBEDDED_CLIPS.glob("*.wav")} == set(EXAMPLES)
    for name in EXAMPLES:
        # Another release of espeak-ng speaks a little differently; its length is the same to a few per cent.
        written, shipped = ((folder / f"{name}.wav").stat().st_size for folder in (tmp_path, EMBEDDED_CLIPS))
        assert written == pytest.approx(shipped, rel=0.1)
        if espeak.version().startswith("1.51"):
            assert (tmp_path / f"{name}.wav").read_bytes() == (EMBEDDED_CLIPS / f"{name}.wav").read_bytes()


def test_shipped_examples_are_small():
    assert sum(path.stat().st_size for path in EMBEDDED_CLIPS.glob("*.wav")) < 400_000
