"""README and the pages on generation: their code runs as written, and the architecture names every room."""

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


def blocks(language: str, *pages: str) -> list[str]:
    texts = [(ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in pages] or [README]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    hf_layout.write_hf_checkpoint(folder / "hf", "base", seed=6)
    convert(folder / "hf", folder / "checkpoint")
    (folder / "speech.mp3").write_bytes(sounds.encode("mp3", sounds.speech(48_000, rate=24_000), 24_000))
    return folder


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


def test_first_command(tmp_path, capsys, monkeypatch):
    """All of it but the installation."""
    install, generate = blocks("sh")[0].splitlines()[0].split(" && ")
    assert install == "pip install -e ."
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    assert main(shlex.split(generate)[1:]) == 0
    assert capsys.readouterr().out.strip() == "The digits are 4 7 1 9."


def test_commands_of_the_embedded_model(tmp_path, capsys, monkeypatch):
    """Those that answer; `chat` and `doctor` are tested elsewhere."""
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    commands = [shlex.split(line, comments=True)[1:] for line in blocks("sh")[3].splitlines()]
    answers = []
    for command in commands[:2]:
        assert main(command) == 0
        answers.append(capsys.readouterr().out.strip())
    assert answers == ["2 plus 3 is 5.", "The first clip."]


def run(blocks: list[str], names: dict, capsys) -> list[str]:
    """What each block prints; the documented example leaves its file to the garbage collector."""
    printed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for block in blocks:
            exec(compile(block, "page", "exec"), names)
            printed.append(capsys.readouterr().out)
    return printed


def test_python_of_the_readme(capsys, tmp_path, monkeypatch):
    """The first block; the second one is the first of the pages."""
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    assert run(blocks("python")[:1], {}, capsys) == ["The digits are 4 7 1 9.\n"]


def test_python_of_the_pages(converted, capsys):
    names = {"checkpoint": str(converted / "checkpoint"), "path": str(converted / "speech.mp3")}
    pages = blocks("python", "generate", "sessions", "meshes")
    assert pages[0] == blocks("python")[1]
    caption, answer, batch, constrained, session, mesh = run(pages, names, capsys)
    assert constrained == ""
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
