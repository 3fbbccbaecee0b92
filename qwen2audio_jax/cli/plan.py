"""`qwen2audio plan`: memory and speed estimates for a machine that need not exist yet."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from qwen2audio_jax.cli.options import mesh_arguments
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.config import Qwen2AudioConfig


def read_config(source: str) -> Qwen2AudioConfig:
    """A configuration by its name in the package, or from a config.json or its folder.

    Raises:
        ValueError: there is no such file or name, or the configuration is not supported.
    """
    path = Path(source)
    if path.is_dir():
        return Qwen2AudioConfig.from_pretrained(path)
    return Qwen2AudioConfig.from_json_file(path) if path.exists() else Qwen2AudioConfig.from_name(source)


def plan(options: argparse.Namespace) -> int:
    """Make and print a plan, for TPUs in a separate process; returns the exit code.

    Args:
        options: the parsed options, with the words of the command line, for that process, as `arguments`.

    Raises:
        ValueError: a requested name does not exist; or, in that process, there is no compiler.
    """
    # Imported here: the other commands do not need it.
    from qwen2audio_jax.plan.compiling import GIB
    from qwen2audio_jax.plan.inference import plan_inference
    from qwen2audio_jax.plan.job import make_job
    from qwen2audio_jax.plan.report import report
    from qwen2audio_jax.plan.request import clip_seconds, make_request
    from qwen2audio_jax.plan.table import inference_table, training_table
    from qwen2audio_jax.plan.topology import ENVIRONMENT, parse_topology, preset_sizes
    from qwen2audio_jax.plan.training import plan_training, training_settings

    config, topology = read_config(options.config), parse_topology(options.topology)
    sizes = {} if options.mesh is None else mesh_arguments(options.mesh)
    if "preset" in sizes:
        sizes = preset_sizes(topology, sizes["preset"])
    request = make_request(
        config,
        topology=topology,
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        weights=options.weights,
        cache=options.cache or "auto",
        mode="sample" if options.do_sample else "greedy",
        **sizes,
    )
    if (options.clips is None) != (options.mean_seconds is None):
        raise ValueError("--clips and --mean-seconds go together: how many clips, and how long they are")
    if options.train is not None and (options.no_search or options.do_sample):
        raise ValueError("--no-search and --do-sample are for generating; leave them out with --train")
    job = None
    if options.clips is not None:
        if options.train is not None:
            raise ValueError("--clips is for generating; leave it out with --train")
        job = make_job(options.clips, options.mean_seconds, longest=clip_seconds(request))
    if options.memory_gib is not None and not 0 < options.memory_gib < math.inf:
        raise ValueError(f"--memory-gib {options.memory_gib:g}: above 0")
    memory = None if options.memory_gib is None else int(options.memory_gib * GIB)
    settings = None
    if options.train is not None:
        over = {name: size for name, size in sizes.items() if name != "num_slices"}
        settings = training_settings(options.train, request, mesh=over)
    if topology.chip.kind == "tpu" and any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "qwen2audio_jax", *options.arguments]
        return subprocess.run(command, env={**os.environ, **ENVIRONMENT}).returncode
    told = (lambda text: None) if options.quiet else say
    if settings is not None:
        result = plan_training(request, settings, name=options.config, memory=memory, say=told)
        table = training_table
    else:
        result = report(
            plan_inference(request, search=not options.no_search, memory=memory, say=told), name=options.config, job=job
        )
        table = inference_table
    write(json.dumps(result) + "\n" if options.json else table(result))
    return 0
