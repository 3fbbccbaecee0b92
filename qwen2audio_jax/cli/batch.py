"""`qwen2audio batch`: a manifest of prompts and clips, answered into an output folder."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.quality import Thresholds
from qwen2audio_jax.batch.run import GROUP, run_batch
from qwen2audio_jax.batch.shards import find_host
from qwen2audio_jax.cli.from_options import loading_arguments, prepare, tell_model
from qwen2audio_jax.cli.options import clip_options, mesh_arguments
from qwen2audio_jax.cli.output import say, write

CODES = {"finished": 0, "dry_run": 0, "unfinished": 3, "too_many_errors": 1}
"""Exit codes of a run's states."""


def batch(options: argparse.Namespace) -> int:
    """Run the job, print its summary as JSON, and return the exit code.

    Raises:
        ValueError: an input or option cannot be used.
    """
    find_host(options.shard, os.environ)  # before anything that takes time
    thresholds = Thresholds.read(options.suspect)
    _, arguments = prepare(options)
    arguments = {name: value for name, value in arguments.items() if name not in ("seed", "tokenizer")}
    if arguments.pop("num_return_sequences") != 1:
        raise ValueError("the checkpoint asks for several answers a prompt, and a record has one: use generate")
    mesh = None if options.mesh is None else mesh_arguments(options.mesh)
    answerer = Answerer(
        options.model,
        system=options.system,
        options=arguments,
        seed=options.seed,
        **clip_options(options),
        allow_special=options.allow_special,
        token_ids=options.token_ids,
        slots=options.slots,
        positions=options.positions,
        workers=options.workers,
        mesh=mesh,
        **loading_arguments(options, mesh=mesh or {}),
    )
    cluster = None
    if options.ray is not None and not options.dry_run:
        # Imported here: it takes a second, and few have it.
        from qwen2audio_jax.ray import Cluster

        cluster = Cluster(options.ray or None, actors=options.ray_actors, resources=_resources(options.ray_resources))
    summary = run_batch(
        options.inputs,
        cluster=cluster,
        output=options.output,
        answerer=answerer,
        prompt=options.prompt,
        shard=options.shard,
        group=GROUP if options.slots is None else max(GROUP, 2 * options.slots),
        thresholds=thresholds,
        retry_suspect=options.retry_suspect,
        retry_errors=options.retry_errors,
        max_errors=options.max_errors,
        merge=options.merge,
        peer_timeout=options.peer_timeout,
        metrics=options.metrics,
        quiet=options.quiet,
        dry_run=options.dry_run,
    )
    if summary.state != "dry_run":
        tell_model(options)
    figures = dict(summary.figures)
    if summary.state == "dry_run":
        figures["plan"] = _plan(figures, new_tokens=arguments.get("max_new_tokens"))
    write(json.dumps({"state": summary.state, **figures}, ensure_ascii=not sys.stdout.isatty()) + "\n")
    if options.quiet:
        return CODES[summary.state]
    if summary.state == "unfinished":
        say("unfinished: the same command goes on")
    elif summary.state == "too_many_errors":
        say(f"stopped: more than {options.max_errors} errors; the same command goes on with the rest")
    return CODES[summary.state]


def _plan(figures: Mapping[str, Any], *, new_tokens: int | None) -> str | None:
    """The command that says what is left takes on a machine, whose name is to be put in; None if nothing was heard."""
    if not figures["left"] or not figures["mean_seconds"]:
        return None
    from qwen2audio_jax.plan.request import TEXT_TOKENS, audio_tokens

    tokens = TEXT_TOKENS + audio_tokens(figures["longest_seconds"])
    limit = "" if new_tokens is None else f" --max-new-tokens {new_tokens}"
    return (
        f"qwen2audio plan --topology v5e:2x4 --clips {figures['left']} --mean-seconds {figures['mean_seconds']:g} "
        f"--prompt-tokens {tokens}{limit}"
    )


def _resources(text: str | None) -> dict[str, float]:
    """The resources in TPU=4,GPU=1."""
    found = {}
    for part in filter(None, (text or "").split(",")):
        name, _, number = part.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--ray-resources {part}: write NAME=NUMBER, as in TPU=4") from None
    return found
