"""Checks of a command line that need neither JAX nor the model, so that what is wrong is said at once."""

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2audio_jax.cli.commands import COMMANDS
from qwen2audio_jax.cli.options import generation_options, hotword_options, mesh_arguments
from qwen2audio_jax.command_line import nearest

_TOGETHER = ("num_return_sequences", "min_new_tokens")
"""Options whose value can only be judged beside others, some of which are the checkpoint's."""


def check(options: argparse.Namespace) -> None:
    """Check the mesh, the options of generation, each by itself, the prompt and the files.

    Raises:
        ValueError: one of them cannot be right with any model.
    """
    if getattr(options, "mesh", None) is not None:
        mesh_arguments(options.mesh)
    if options.command == "generate":
        _check_prompt(options)
        for name in options.audio:
            _check_file(name)
    if hasattr(options, "stop"):
        _check_generation({name: value for name, value in generation_options(options).items() if name not in _TOGETHER})
    elif hasattr(options, "hotwords"):
        _check_generation(hotword_options(options))


def _check_generation(given: Mapping[str, Any]) -> None:
    if given:
        # Imported here: it takes numpy, a fifth of a second.
        from qwen2audio_jax.generation.generation_config import GenerationConfig

        for name, value in given.items():
            GenerationConfig().updated(**{name: value})


def _check_prompt(options: argparse.Namespace) -> None:
    if options.audio.count("-") + (options.prompt == "-") > 1:
        raise ValueError("standard input can be read once: give - for the prompt or for one --audio, files else")
    if options.raw and options.system is not None:
        raise ValueError("--system is for the chat template, which --raw leaves out: give one of them")
    if options.prompt:
        return
    if options.prompt is not None and (options.audio or options.each):
        raise ValueError(
            'there is no prompt in "": write what is asked, or leave it out where the clips are the message'
        )
    if options.raw or not (options.audio or options.each):
        raise ValueError(
            "there is no prompt" + (": write one" if options.raw else ": give a text, --audio FILE, or both")
        )


def _check_file(name: str) -> None:
    """Raise ValueError if a clip's name is that of a file which is not there, or of a folder."""
    if name == "-" or "://" in name[:32] or name[:5].lower() == "data:" or name.startswith("example:"):
        return
    try:
        path = Path(name).expanduser()
        folder, there = path.is_dir(), path.exists()
        beside = [str(path.with_name(other)) for other in os.listdir(path.parent)] if path.parent.is_dir() else []
    except (OSError, ValueError, RuntimeError):  # loading it says more
        return
    if folder:
        pattern = shlex.quote(name.rstrip("/")) + "/*"
        raise ValueError(f"{name} is a folder: name a sound file, or ask about each with --each {pattern}")
    if not there:
        hint = nearest(str(path), beside)
        raise ValueError(f"{name!r} cannot be opened (No such file or directory): check the path{hint}")


def instead_of_command(words: Sequence[str]) -> str | None:
    """What to type where a file stands in the place of the command; None where none does."""
    if not words or words[0].startswith("-") or words[0] in COMMANDS:
        return None
    name = words[0]
    if not (Path(name).suffix or "://" in name or name.startswith("example:") or os.path.exists(name)):
        return None
    file = shlex.quote(name)
    lines = [f'qwen2audio generate --audio {file} "What is said?"']
    if "transcribe" in COMMANDS:
        lines.insert(0, f"qwen2audio transcribe {file}")
    return f"{name} stands where a command is expected; type {' or '.join(lines)}"


def keep_libtpu_quiet() -> None:
    """Leave libtpu alone where it is installed and no TPU is there: it would print up to 30 lines about that.

    Nothing is changed where there may be another accelerator, or JAX_PLATFORMS says what is meant.
    """
    if "JAX_PLATFORMS" in os.environ or sys.platform != "linux":
        return
    if any(name.startswith(("TPU_", "MEGASCALE_", "CLOUD_TPU_")) for name in os.environ):
        return
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins") is not None:
        return
    if not _may_have_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


def _may_have_tpu() -> bool:
    """Whether a chip is on the bus, or a device file is there as TPUs have them, where a container hides the bus."""
    if any(any(Path(folder).glob(pattern)) for folder, pattern in (("/dev", "accel*"), ("/dev/vfio", "[0-9]*"))):
        return True
    return any(_is_tpu(path) for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


def _is_tpu(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == "0x1ae0"
    except OSError:
        return False
