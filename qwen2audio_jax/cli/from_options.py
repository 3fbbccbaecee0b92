"""Loading of processor and model from the options, with cheap checks before weights are loaded."""

import argparse
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import jax

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli.options import DEFAULT_MODEL, DEFAULT_NEW_TOKENS, generation_options, mesh_arguments
from qwen2audio_jax.cli.output import say
from qwen2audio_jax.embedded import example
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.parallel.distributed import detected, initialize
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset
from qwen2audio_jax.parallel.sharding import make_mesh
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import resolve_processor_files

EXAMPLE = "example:"


def clip_source(name: str, *, stdin: bool = False) -> str | BinaryIO:
    """The source of a clip for `feature_extractor.load`.

    `example:NAME` stands for a file of the package, `-` for standard input. What a shell puts in the place of a file
    (a named pipe, /dev/stdin, `<(...)`) is opened here, where the user typed its name: `load_audio` takes no path of
    one.

    Args:
        name: as the user typed it.
        stdin: whether `-` may be read.

    Raises:
        ValueError: there is no such example (the message lists them), no sound on standard input, or it is taken.
    """
    if name.startswith(EXAMPLE):
        return str(example(name.removeprefix(EXAMPLE)))
    if name == "-":
        if not stdin:
            raise ValueError("- (standard input) is read for the messages here: give the path of a sound file")
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("--audio - reads sound from a pipe, and none is there: pipe a file into it")
        return sys.stdin.buffer
    with suppress(OSError, ValueError, RuntimeError):  # the last one where there is no home folder
        path = Path(name).expanduser()
        if stat.S_ISFIFO(path.stat().st_mode):
            return path.open("rb")
    return name


def prepare(options: argparse.Namespace) -> tuple[Qwen2AudioProcessor, dict[str, Any]]:
    """The processor, and the arguments of `generate` and `stream` besides the inputs.

    Raises:
        ValueError: the model has no processor, or a generation option has an invalid value.
    """
    if options.model == DEFAULT_MODEL:
        say(
            "the small embedded demonstration model answers; --model names another, as in --model "
            "Qwen/Qwen2-Audio-7B-Instruct"
        )
    folder = resolve_processor_files(options.model, revision=options.revision)
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    file = folder / "generation_config.json"
    settings = GenerationConfig.from_json_file(file) if file.exists() else GenerationConfig()
    given = generation_options(options)
    limited = settings.max_new_tokens is not None or settings.max_length is not None
    if not limited and not {"max_new_tokens", "max_length"} & set(given):
        given["max_new_tokens"] = DEFAULT_NEW_TOKENS
    settings = settings.updated(**given)
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        if getattr(options, name) is not None and not settings.do_sample:
            say(f"warning: --{name.replace('_', '-')} has no effect: add --do-sample to draw tokens")
    # Always stated, because it determines whether the answer can be streamed.
    given["num_return_sequences"] = settings.num_return_sequences
    return processor, {**given, "seed": options.seed, "tokenizer": processor}


def join(options: argparse.Namespace) -> None:
    """Join the other processes of this command, if there are any; to be called before any other use of JAX.

    Raises:
        ValueError: the options contradict each other, processes are missing, or the command is single-process.
    """
    if hasattr(options, "num_processes"):
        initialize(
            options.coordinator,
            process_id=options.process_id,
            num_processes=options.num_processes,
            timeout=options.peer_timeout,
        )
    elif (found := detected()) is not None:
        raise ValueError(
            f"this is one of {found.num_processes} processes of a cluster, and {options.command} runs in one alone: "
            "start it on a machine of its own, or use generate"
        )


def load_model(options: argparse.Namespace) -> Qwen2AudioForConditionalGeneration:
    """The model on its mesh; after `join`.

    Raises:
        ValueError: the checkpoint, dtype, mesh or adapter cannot be used.
    """
    if options.mesh is None and jax.process_count() > 1:
        count = jax.device_count()
        raise ValueError(
            f"{jax.process_count()} processes share a model by --mesh alone: give one of their {count} devices, such "
            f"as --mesh {count}x1 (a copy on each) or --mesh 1x{count} (one copy for all)"
        )
    chosen = {} if options.mesh is None else mesh_arguments(options.mesh)
    mesh = make_mesh(**chosen) if chosen else None
    arguments = loading_arguments(options, mesh=chosen)
    if sys.stderr.isatty():
        say(f"loading {options.model}")
    return Qwen2AudioForConditionalGeneration.from_pretrained(options.model, mesh=mesh, **arguments)


def loading_arguments(options: argparse.Namespace, *, mesh: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` but for the mesh, whose own arguments may name a preset with a dtype."""
    dtype = options.dtype
    if dtype == "auto" and "preset" in mesh:
        dtype = load_mesh_preset(mesh["preset"]).dtype
    return {
        "dtype": dtype,
        "revision": options.revision,
        "cache_dir": options.cache_dir,
        "adapter": options.adapter,
        "weights_dtype": options.weights,
        "cache_dtype": options.cache,
        "attention": options.attention,
    }
