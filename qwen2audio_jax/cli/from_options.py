"""Loading of processor and model from the options, with cheap checks before weights are loaded."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli.options import DEFAULT_MODEL, DEFAULT_NEW_TOKENS, generation_options, mesh_arguments
from qwen2audio_jax.cli.output import say
from qwen2audio_jax.cli.status import status
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.parallel.distributed import detected, initialize
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset
from qwen2audio_jax.parallel.sharding import make_mesh
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.source import check_holds_model, resolve_processor_files


def prepare(options: argparse.Namespace) -> tuple[Qwen2AudioProcessor, dict[str, Any]]:
    """The processor, and the arguments of `generate` and `stream` besides the inputs.

    Raises:
        ValueError: the model has no processor, or a generation option has an invalid value.
    """
    folder = resolve_processor_files(options.model, revision=options.revision)
    check_holds_model(folder)
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    file = folder / "generation_config.json"
    settings = GenerationConfig.from_json_file(file) if file.exists() else GenerationConfig()
    given = generation_options(options)
    limited = settings.max_new_tokens is not None or settings.max_length is not None
    if not limited and not {"max_new_tokens", "max_length"} & set(given):
        given["max_new_tokens"] = DEFAULT_NEW_TOKENS
    settings = settings.updated(**given)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if (value := getattr(options, name)) is not None and not settings.do_sample:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} {value:g} changes nothing: the most probable token is taken; add --do-sample to draw "
                f"tokens, or leave out {option}"
            )
    if options.seed is not None and not settings.do_sample and not getattr(options, "retry_suspect", False):
        say("warning: --seed has no effect: add --do-sample to draw tokens")
    # Always stated, because it determines whether the answer can be streamed.
    given["num_return_sequences"] = settings.num_return_sequences
    return processor, {**given, "seed": options.seed, "tokenizer": processor}


def tell_model(options: argparse.Namespace) -> None:
    """Say that the embedded model answers, where none is named."""
    if options.model == DEFAULT_MODEL and not options.quiet:
        say(
            "the small embedded demonstration model answers; --model names another, as in --model "
            "Qwen/Qwen2-Audio-7B-Instruct"
        )


def join(options: argparse.Namespace) -> None:
    """Join the other processes of this command, if there are any; to be called before any other use of JAX.

    Raises:
        ValueError: the options contradict each other, processes are missing, or the command is single-process.
    """
    if hasattr(options, "num_processes"):
        if options.num_processes is not None or detected() is not None:
            _keep_stdout()
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


def _keep_stdout() -> None:
    """Leave stdout to this program: libraries that connect processes write to it too, and get stderr instead."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None and sys.stdout.fileno() == 1:
        sys.stdout.flush()
        own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        os.dup2(2, 1)
        sys.stdout = own


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
    # A conversion that comes first has a bar of its own on the terminal.
    with status(f"loading {options.model}", quiet=getattr(options, "quiet", False), alone=False):
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
