"""What starts at once: the modules that the package and its command load before there is anything to compute."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import qwen2audio_jax
from qwen2audio_jax.cli.commands import COMMANDS, build_parser
from qwen2audio_jax.convert import commands as convert_commands
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.source import resolve_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"qwen2audio_jax", "convert"}
"""Besides Python's own modules and what an installer puts into every process."""
WITH_CONVERT = ALLOWED | {"tqdm"}

SCRIPT = """
import contextlib, importlib, io, json, sys
before = set(sys.modules)
loaded = {}

def note(name):
    fresh = {module.partition(".")[0] for module in set(sys.modules) - before}
    loaded[name] = sorted(fresh - set(sys.stdlib_module_names))

import qwen2audio_jax
dir(qwen2audio_jax)
note("import")
from qwen2audio_jax.cli.main import main
for line in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(line.split())
    assert said.getvalue(), line
    note(line)
print(json.dumps(loaded))
"""
LINES = (
    "--version",
    "--help",
    *(f"{name} --help" for name in COMMANDS if name != "convert"),
    "genrate",
    "generate --audios",
    "generate --max-new-tokens abc",
    "plan",
    "convert --help",
    "convert verify --help",
    "convert",
)


def test_what_is_loaded():
    """In the order of their weight, so that a line does not hide behind the one before."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *LINES], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = json.loads(run.stdout)
    assert list(loaded) == ["import", *LINES]
    for line, modules in loaded.items():
        allowed = WITH_CONVERT if line.startswith("convert") else ALLOWED
        assert set(modules) <= allowed, line


def test_a_converted_model_loads_without_its_converter(tmp_path):
    """Importing Orbax takes a tenth of a short command."""
    resolve_checkpoint(EMBEDDED, cache_dir=tmp_path)
    script = (
        "import sys; from qwen2audio_jax import Qwen2AudioForConditionalGeneration as Model; "
        f"Model.from_pretrained({EMBEDDED!r}, cache_dir={str(tmp_path)!r}); "
        "print({'orbax', 'jax'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "{'jax'}", run.stderr


def test_public_names():
    assert set(qwen2audio_jax.__all__) <= set(dir(qwen2audio_jax))
    for name in qwen2audio_jax.__all__:
        value = getattr(qwen2audio_jax, name)
        assert getattr(value, "__name__", name) == name or name.startswith("Auto"), "transformers' names are others'"
    with pytest.raises(AttributeError, match="no attribute 'Qwen3'"):
        qwen2audio_jax.Qwen3  # noqa: B018


@pytest.mark.parametrize("room", ["audio", "batch", "convert", "engine", "evaluation", "tasks"])
def test_names_imported_when_used(room):
    package = importlib.import_module(f"qwen2audio_jax.{room}")
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module 'qwen2audio_jax.{room}' has no attribute 'Qwen3'"):
        package.Qwen3  # noqa: B018


def test_examples_of_the_help_are_right():
    """Each command line is taken by the parsers as it stands."""
    lines = [line for command in COMMANDS.values() for line in command.examples]
    lines += build_parser().examples
    assert len(lines) > len(COMMANDS)
    for line in lines:
        words = shlex.split(line.partition(" < ")[0].rpartition("| ")[2])
        assert words[0] == "qwen2audio"
        assert build_parser().parse_args(words[1:]).command == words[1]
    for line in convert_commands.build_parser(None, prog="qwen2audio convert").examples:
        words = shlex.split(line)[2:]
        command = words.pop(0) if words[0] in convert_commands.COMMANDS else None
        convert_commands.build_parser(command, prog="x").parse_args(words)
