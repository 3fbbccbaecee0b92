"""The wheel: what it holds, and that it converts a checkpoint from outside the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hf_layout
import pytest

from qwen2audio_jax.checkpoint.reader import is_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that no build folder appears among them."""
    if importlib.util.find_spec("setuptools") is None:  # importing it warns where another test has loaded distutils
        pytest.skip("the wheel is built with setuptools")
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("qwen2audio_jax", "convert", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder outside the checkout that the wheel is installed into."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
    ]
    run = subprocess.run(
        [*command, "--target", str(target), str(wheel)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qwen2audio_jax"}
    for name in (
        "py.typed",
        "convert/__main__.py",
        "convert/to_orbax.py",
        "checkpoint/mapping.py",
        "configs/tiny.json",
        "configs/qwen2-audio-7b.json",
        "configs/mesh-v5e-8.toml",
        *(f"serve/page/{file.name}" for file in (ROOT / "qwen2audio_jax" / "serve" / "page").iterdir()),
    ):
        assert f"qwen2audio_jax/{name}" in names
    assert not any("tests" in name or "__pycache__" in name for name in names)
    packaged = {name for name in names if name.endswith(".py")}
    for package, folder in (("qwen2audio_jax", "qwen2audio_jax"), ("qwen2audio_jax/convert", "convert")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in packaged


def test_the_embedded_model_and_the_examples_are_whole(wheel):
    held = zipfile.ZipFile(wheel)
    names = {name for name in held.namelist() if name.startswith("qwen2audio_jax/embedded/")}
    there = {file for file in (ROOT / "qwen2audio_jax" / "embedded").rglob("*") if file.is_file()}
    there = {file for file in there if "__pycache__" not in file.parts}
    assert {file.name for file in there} >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert {file.relative_to(ROOT).as_posix() for file in there} == names
    for file in there:
        assert held.read(file.relative_to(ROOT).as_posix()) == file.read_bytes()


def run_installed(installed: Path, tmp_path: Path, *command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_installed_converter(installed, tmp_path):
    hf_layout.write_hf_checkpoint(tmp_path / "hf", "tied", naming="old")
    run = run_installed(installed, tmp_path, "-m", "qwen2audio_jax.convert", "hf", "orbax")
    assert run.returncode == 0, run.stderr
    assert is_checkpoint(tmp_path / "orbax")
    run = run_installed(installed, tmp_path, "-m", "qwen2audio_jax.convert", "nothing", "here")
    assert run.returncode == 2
    assert "no such folder, nor a hub id" in run.stderr


def test_installed_model_answers_without_being_named(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    code = """
import sys
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import examples
sys.exit(main(["generate", "--max-new-tokens", "8", "--audio", f"example:{examples()[0].stem}", "What is this?"]))
"""
    run = run_installed(installed, tmp_path, "-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "demonstration model answers" in run.stderr


def test_installed_modules_and_data(installed, tmp_path):
    code = """
import importlib.util, qwen2audio_jax, qwen2audio_jax.convert
from pathlib import Path
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.source import resolve_checkpoint
for name in ("convert", "configs"):
    assert importlib.util.find_spec(name) is None, name
Qwen2AudioConfig.from_name("qwen2-audio-7b-instruct")
print(Path(qwen2audio_jax.__file__).parent, Path(qwen2audio_jax.convert.__file__).parent)
"""
    run = run_installed(installed, tmp_path, "-c", code)
    assert run.returncode == 0, run.stderr
    package, convert = run.stdout.split()
    assert Path(package) == installed / "qwen2audio_jax"
    assert Path(convert) == installed / "qwen2audio_jax" / "convert"
