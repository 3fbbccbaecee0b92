"""`qwen2audio batch`: a manifest of prompts and clips, answered into an output folder."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.quality import Thresholds
from qwen2audio_jax.batch.run import GROUP, run_batch
from qwen2audio_jax.batch.shards import find_host
from qwen2audio_jax.batch.task_answerer import LongAnswerer, TaskAnswerer
from qwen2audio_jax.cli.from_options import join, loading_arguments, prepare, tell_model
from qwen2audio_jax.cli.options import clip_options, generation_options, mesh_arguments
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.tasks.kind import checkpoint_kind
from qwen2audio_jax.tasks.task import find_task

AnyAnswerer = TypeVar("AnyAnswerer", bound=Answerer)
CODES = {"finished": 0, "dry_run": 0, "unfinished": 3, "too_many_errors": 1}
"""Exit codes of a run's states."""


def batch(options: argparse.Namespace) -> int:
    """Run the job, print its summary as JSON, and return the exit code.

    Raises:
        ValueError: an input or option cannot be used.
    """
    _check(options)  # before anything that takes time
    thresholds = Thresholds.read(options.suspect)
    if options.mesh_across_hosts and not options.dry_run:
        return _across_hosts(options, thresholds)
    return _run(options, _answerer(options, _kind(options)), thresholds, shard=options.shard)


def _across_hosts(options: argparse.Namespace, thresholds: Thresholds) -> int:
    """The job in process 0, which the others compute with: one exit code in all of them."""
    # Imported here: it needs jax, and a job on one host does not until its model is loaded.
    import jax

    from qwen2audio_jax.batch.across_hosts import MeshAnswerer

    join(options)
    answerer = _answerer(options, MeshAnswerer)
    if jax.process_index():
        return answerer.follow()
    # The scheduler's variables number processes, and all of these are one.
    code = 2
    try:
        code = _run(options, answerer, thresholds, shard=options.shard or "0/1")
    finally:
        answerer.let_go(code)
    return code


def _check(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options that contradict each other."""
    find_host(options.shard, os.environ)
    if options.task is None and (options.long or options.language or options.kind):
        raise ValueError("--long, --language and --kind say more of a task: give --task, as in --task transcribe")
    if options.task is not None and (options.prompt is not None or options.mesh_across_hosts):
        raise ValueError("--task is given, and neither goes with it: --prompt, --mesh-across-hosts")
    if options.mesh_across_hosts:
        if options.mesh is None:
            raise ValueError("--mesh-across-hosts needs --mesh, over the devices of all hosts, as in --mesh 2x8")
        if options.ray is not None:
            raise ValueError("--mesh-across-hosts and --ray are two ways to use several hosts: give one of them")
    elif options.coordinator or options.process_id is not None or options.num_processes is not None:
        raise ValueError(
            "--coordinator, --process-id and --num-processes are for --mesh-across-hosts; hosts that have a model each "
            "need none of them: give --shard I/N"
        )


def _answerer(options: argparse.Namespace, kind: Callable[..., AnyAnswerer]) -> AnyAnswerer:
    _, arguments = prepare(options)
    arguments = {name: value for name, value in arguments.items() if name not in ("seed", "tokenizer")}
    if arguments.pop("num_return_sequences") != 1:
        raise ValueError("the checkpoint asks for several answers a prompt, and a record has one: use generate")
    mesh = None if options.mesh is None else mesh_arguments(options.mesh)
    return kind(
        options.model,
        system=options.system,
        # A task has settings of its own, in the place of the checkpoint's.
        options=arguments if options.task is None else generation_options(options),
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


def _kind(options: argparse.Namespace) -> Callable[..., Answerer]:
    """What answers: with a task if there is one."""
    if options.task is None:
        return Answerer
    kind = options.kind or checkpoint_kind(options.model, revision=options.revision)
    task = find_task(options.task, kind=kind, language=options.language)
    return partial(LongAnswerer if options.long else TaskAnswerer, task=task)


def _run(options: argparse.Namespace, answerer: Answerer, thresholds: Thresholds, *, shard: str | None) -> int:
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
        shard=shard,
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
        figures["plan"] = _plan(figures, new_tokens=options.max_new_tokens)
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
