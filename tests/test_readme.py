"""README checks: its Python code runs as written, and its file tree matches the code."""

import re
import shlex
import warnings
from pathlib import Path

import hf_layout
import pytest
import sounds

from qwen2audio_jax.cli.main import main
from qwen2audio_jax.convert import convert

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    hf_layout.write_hf_checkpoint(folder / "hf", "base", seed=6)
    convert(folder / "hf", folder / "checkpoint")
    (folder / "speech.mp3").write_bytes(sounds.encode("mp3", sounds.speech(48_000, rate=24_000), 24_000))
    return folder


def test_first_command(tmp_path, capsys, monkeypatch):
    """All of it but the installation."""
    install, generate = blocks("sh")[0].splitlines()[0].split(" && ")
    assert install == "pip install -e ."
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    assert main(shlex.split(generate)[1:]) == 0
    assert capsys.readouterr().out.strip() == "The digits are 4 7 1 9."


def test_commands_of_the_embedded_model(tmp_path, capsys, monkeypatch):
    """Those that answer; `chat` and what takes hours are tested elsewhere."""
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    commands = [shlex.split(line, comments=True)[1:] for line in blocks("sh")[1].splitlines()]
    answers = []
    for command in commands[:2]:
        assert main(command) == 0
        answers.append(capsys.readouterr().out.strip())
    assert answers == ["2 plus 3 is 5.", "The first clip."]


def test_python_runs_as_it_stands(converted, capsys):
    names = {"checkpoint": str(converted / "checkpoint"), "path": str(converted / "speech.mp3")}
    printed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the first example leaves its file to the garbage collector
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
            printed.append(capsys.readouterr().out)
    caption, answer, batch, session, mesh = printed
    assert caption.strip()
    assert answer.strip()
    assert batch.count("tokens, ended by") == 2
    assert len(session.splitlines()) >= 2
    assert int(names["session"].reused.min()) > 40  # of a clip's 50 tokens and what stands before them
    assert mesh == ""
    assert dict(names["model"].mesh.shape) == {"data": 2, "model": 4}


def test_the_architecture_names_every_room():
    """Every folder and module of the package has its line, every line has its folder, and what is named is there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([\w./]+)` \|[^|]*\|([^|]*)\|$", page, flags=re.MULTILINE)
    package = ROOT / "qwen2audio_jax"
    there = {path.name + "/" * path.is_dir() for path in package.iterdir() if path.name != "__pycache__"}
    assert {room for room, _ in lines} == there - {"__init__.py", "__main__.py", "py.typed"}
    for room, places in lines:
        for name in re.findall(r"`(\w+\.py)`", places):
            assert (package / room / name).is_file(), f"{room}{name}"
