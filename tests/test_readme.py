"""The README keeps its word: its Python runs as it stands, and its tree of the code is the code's."""

import re
import runpy
import shlex
import sys
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
    install, make, generate = blocks("sh")[0].splitlines()[0].replace("/tmp/tiny", str(tmp_path / "tiny")).split(" && ")
    assert install == "pip install -e ."
    script = shlex.split(make)[1:]
    monkeypatch.setattr(sys, "argv", script)
    runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    capsys.readouterr()
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    assert main(shlex.split(generate)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_python_runs_as_it_stands(converted, capsys):
    names = {"checkpoint": str(converted / "checkpoint"), "path": str(converted / "speech.mp3")}
    printed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the first example leaves its file to the garbage collector
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
            printed.append(capsys.readouterr().out)
    caption, answer, batch, mesh = printed
    assert caption.strip()
    assert answer.strip()
    assert batch.count("tokens, ended by") == 2
    assert mesh == ""
    assert dict(names["model"].mesh.shape) == {"data": 2, "model": 4}


def test_tree_is_the_code():
    """Every module and configuration stands in the tree, and everything in the tree is there."""
    (tree,) = blocks("text")
    shown, folders = [], {}
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth] = folders.get(depth - 1, "") + name if depth else name
        shown.append(folders[depth])
    packages = ("qwen2audio_jax", "convert", "configs", "benchmarks")
    there = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json") and (path.name != "__init__.py" or path.parent.name == "qwen2audio_jax")
    }
    assert {name for name in shown if name.startswith(packages) and not name.endswith("/")} == there
    assert [name for name in shown if not (ROOT / name).exists()] == []
    assert len(shown) == len(set(shown))
