"""The processor and the model that the options name; whatever is cheap is checked before weights load."""

import argparse
import sys
from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli.options import generation_options, mesh_sizes
from qwen2audio_jax.cli.output import say
from qwen2audio_jax.generation_config import GenerationConfig
from qwen2audio_jax.processor import Qwen2AudioProcessor
from qwen2audio_jax.sharding import make_mesh
from qwen2audio_jax.source import resolve_processor_files


def load_processor(options: argparse.Namespace) -> Qwen2AudioProcessor:
    """The processor; the generation options are checked too.

    Raises:
        ValueError: no model is named or it has no processor, or a generation option has a value it cannot have.
    """
    if options.model is None:
        raise ValueError(
            "no model is named: add --model and a converted checkpoint, a Hugging Face folder or a hub id, as in "
            "--model Qwen/Qwen2-Audio-7B-Instruct"
        )
    folder = resolve_processor_files(options.model, revision=options.revision)
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    settings = folder / "generation_config.json"
    defaults = GenerationConfig.from_json_file(settings) if settings.exists() else GenerationConfig()
    _warn_without_sampling(options, sampling=defaults.updated(**generation_options(options)).do_sample)
    return processor


def load_model(options: argparse.Namespace) -> Qwen2AudioForConditionalGeneration:
    """The model on its mesh.

    Raises:
        ValueError: the checkpoint, dtype or mesh cannot be used.
    """
    mesh = None if options.mesh is None else make_mesh(**mesh_sizes(options.mesh))
    if sys.stderr.isatty():
        say(f"loading {options.model}")
    return Qwen2AudioForConditionalGeneration.from_pretrained(
        options.model, dtype=options.dtype, mesh=mesh, revision=options.revision, cache_dir=options.cache_dir
    )


def decoding_arguments(options: argparse.Namespace, *, processor: Qwen2AudioProcessor) -> dict[str, Any]:
    """What `generate` and `stream` take beside the inputs."""
    return {"tokenizer": processor, "seed": options.seed, **generation_options(options)}


def _warn_without_sampling(options: argparse.Namespace, *, sampling: bool) -> None:
    names = ("temperature", "top_k", "top_p", "seed")
    given = ["--" + name.replace("_", "-") for name in names if getattr(options, name) is not None]
    if given and not sampling:
        say(f"warning: {', '.join(given)} without effect: add --do-sample to draw tokens")
