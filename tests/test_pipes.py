"""Clips that are no files (standard input, named pipes, what a shell puts in their place), and `~`, the home folder."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sounds

from qwen2audio_jax import Qwen2AudioProcessor
from qwen2audio_jax.audio import AudioError, load_audio
from qwen2audio_jax.batch.clips import locate
from qwen2audio_jax.cli.clips import clip_source
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import example
from qwen2audio_jax.storage.bucket import folder_at
from qwen2audio_jax.train.records import read_record

CLIP = example("digits-4719")
ANSWER = "The digits are 4 7 1 9.\n"
QUESTION = "Which digits are spoken?"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, which holds the cache too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    return tmp_path


def pipe_in(monkeypatch, data: bytes, *, terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def refusal(capsys, *arguments) -> str:
    assert main(["generate", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_standard_input_is_the_clip(monkeypatch):
    pipe_in(monkeypatch, CLIP.read_bytes())
    assert np.array_equal(load_audio(clip_source("-", stdin=True)), load_audio(CLIP))


@pytest.mark.slow
def test_clip_from_standard_input(capsys, monkeypatch):
    pipe_in(monkeypatch, CLIP.read_bytes())
    assert main(["generate", "--audio", "-", QUESTION]) == 0
    assert capsys.readouterr().out == ANSWER


def test_named_pipe_and_process_substitution(tmp_path):
    """As a shell gives them: both are pipes with a name."""
    names = [tmp_path / "one", tmp_path / "two"]
    for name in names:
        os.mkfifo(name)
        threading.Thread(target=name.write_bytes, args=(CLIP.read_bytes(),)).start()
    expected = load_audio(CLIP)
    for name in names:
        with clip_source(str(name)) as file:
            assert np.array_equal(load_audio(file), expected)
    script = """
import sys
from qwen2audio_jax.audio import load_audio
from qwen2audio_jax.cli.clips import clip_source
print([len(load_audio(clip_source(name))) for name in sys.argv[1:]])
"""
    done = subprocess.run(
        ["bash", "-c", 'cat "$3" | "$0" -c "$1" /dev/stdin <(cat "$2")', sys.executable, script, CLIP, CLIP],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"[{len(expected)}, {len(expected)}]\n"


def test_standard_input_is_read_once(capsys, monkeypatch):
    pipe_in(monkeypatch, CLIP.read_bytes())
    for arguments in (["--audio", "-", "--audio", "-", "x"], ["--audio", "-", "-"]):
        assert "standard input can be read once" in refusal(capsys, *arguments)
    assert "standard input" in refusal(capsys, "--audio", "-", "-")


def test_nothing_on_standard_input(capsys, monkeypatch):
    pipe_in(monkeypatch, b"", terminal=True)
    assert "pipe a file into it" in refusal(capsys, "--audio", "-", "x")
    monkeypatch.setattr(sys, "stdin", None)
    assert "pipe a file into it" in refusal(capsys, "--audio", "-", "x")
    pipe_in(monkeypatch, b"")
    assert "is empty (0 bytes)" in refusal(capsys, "--audio", "-", "x")
    with pytest.raises(ValueError, match="read for the messages here"):
        clip_source("-")


def test_home_folder(home):
    (home / "speech.wav").write_bytes(CLIP.read_bytes())
    expected = load_audio(CLIP)
    for source in ("~/speech.wav", Path("~/speech.wav"), clip_source("~/speech.wav"), {"path": "~/speech.wav"}):
        assert np.array_equal(load_audio(source), expected)
    with pytest.raises(AudioError, match=r"'~/none\.wav' cannot be opened \(No such file"):
        load_audio("~/none.wav")


def test_home_folder_of_models_and_records(home):
    Qwen2AudioProcessor.from_pretrained().save_pretrained(home / "mine")
    assert Qwen2AudioProcessor.from_pretrained("~/mine").audio_token == "<|AUDIO|>"
    assert folder_at("~/new/answers") == home / "new" / "answers"
    assert locate("~/a.wav", root="/elsewhere") == str(home / "a.wav")
    assert locate("~/a.wav", root="gs://bucket") == "gs://bucket/~/a.wav"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    line = json.dumps({"messages": messages, "audios": ["~/a.wav"]}).encode()
    record = read_record(line, where="a:1", audio_root="/elsewhere", preferences=False)
    assert record.clips == (str(home / "a.wav"),)


def test_file_whose_name_is_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()
    Path("~", "speech.wav").write_bytes(CLIP.read_bytes())
    Path("speech.wav").write_bytes(sounds.encode("wav", sounds.speech(1000), 16_000))
    assert np.array_equal(load_audio("~/speech.wav"), load_audio(CLIP))


def test_paths_of_what_is_no_file(tmp_path):
    with pytest.raises(AudioError, match="is a folder, no regular file: pass a sound file in it"):
        load_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match=r"is a pipe or device, no regular file: pass open\(path, 'rb'\)"):
        load_audio(tmp_path / "pipe")
