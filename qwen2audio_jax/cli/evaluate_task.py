"""`qwen2audio evaluate TASK`: a manifest, a data set or fresh speech answered by a batch job, scored and reported."""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen2audio_jax.batch.shards import find_host
from qwen2audio_jax.cli.batch import CODES
from qwen2audio_jax.cli.from_options import loading_arguments, tell_model
from qwen2audio_jax.cli.options import clip_options, mesh_arguments
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.evaluation.published import published_of
from qwen2audio_jax.evaluation.report import Report, overview
from qwen2audio_jax.evaluation.run import Evaluation, Source, evaluate
from qwen2audio_jax.speech.manifests import MADE, records_of
from qwen2audio_jax.storage.bucket import is_url


def run_task(options: argparse.Namespace) -> int:
    """Evaluate on a task, or with --fresh and no task on each that fresh data has; the exit codes are those of `batch`.

    Raises:
        ValueError: the data, the model or an option cannot be used.
    """
    _check(options)
    tasks = {options.task: options.output} if options.task else {task: f"{options.output}/{task}" for task in MADE}
    codes = [_shown(_evaluated(options, task, output), options) for task, output in tasks.items()]
    if options.task is None and not any(codes) and not options.dry_run:
        found = [json.loads(Path(output, "report.json").read_bytes()) for output in tasks.values()]
        Path(options.output, "report.md").write_text(overview(found), encoding="utf-8")
    tell_model(options)
    return max(codes)


def _check(options: argparse.Namespace) -> None:
    given = [name for name in ("manifest", "layout", "fresh") if getattr(options, name) is not None]
    if len(given) != 1 or (options.task is None and given != ["fresh"]):
        raise ValueError("name what to evaluate on: --manifest FILE, --layout NAME with --data DIR, or --fresh N")
    if options.output is None:
        raise ValueError("name where the answers and the report go: --output DIR")
    if (options.layout is None) != (options.data is None):
        raise ValueError("--layout NAME says how the data set in --data DIR is laid out: give both")
    if options.fresh is not None and is_url(options.output):
        raise ValueError(f"{options.output}: fresh data is synthesised into a local folder: name one with --output")
    if options.coordinator or options.process_id is not None or options.num_processes is not None:
        raise ValueError("a task is evaluated by hosts that have a model each: give --shard I/N instead of processes")
    find_host(options.shard, os.environ)


def _evaluated(options: argparse.Namespace, task: str, output: str) -> Evaluation:
    mesh = None if options.mesh is None else mesh_arguments(options.mesh)
    limits = {
        name: value for name in ("max_new_tokens", "min_new_tokens") if (value := getattr(options, name)) is not None
    }
    source, compared = _source(options, task)
    return evaluate(
        task,
        source,
        output=output,
        model=options.model,
        kind=options.kind,
        language=options.language,
        labels=options.labels.split(",") if options.labels else None,
        style=options.questions,
        label_score=options.label_score,
        published=options.published or compared,
        settings={
            "options": limits,
            **clip_options(options),
            "slots": options.slots,
            "positions": options.positions,
            "workers": options.workers,
            "mesh": mesh,
            **loading_arguments(options, mesh=mesh or {}),
        },
        running={
            "shard": options.shard,
            "max_errors": options.max_errors,
            "retry_errors": options.retry_errors,
            "peer_timeout": 300.0 if options.peer_timeout is None else options.peer_timeout,
            "quiet": options.quiet,
            "dry_run": options.dry_run,
        },
    )


def _source(options: argparse.Namespace, task: str) -> tuple[Source, str | None]:
    """The records, and the name of the published figures of their data set, if there are any."""
    if options.manifest is not None:
        return Source(name=", ".join(map(os.path.basename, options.manifest)), files=options.manifest), None
    if options.fresh is not None:
        folder = Path(options.output, "data")
        _synthesise(options, folder)
        name = f"{options.fresh} fresh examples (seed {options.seed or 0}, {options.split or 'test'})"
        return Source(name=name, records=records_of(folder, task=task), root=str(folder)), None
    # Imported here: the other commands do not need it.
    from qwen2audio_jax.evaluation.layouts import read_layout

    records = read_layout(options.layout, Path(options.data), split=options.split, language=options.language)
    name = " ".join(filter(None, (options.layout, options.split, options.language)))
    source = Source(name=name, records=_below(options.data, records), root=options.data)
    return source, published_of(options.layout, split=options.split, language=options.language)


def _below(folder: str, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Records whose clips are relative to the data set's folder, which another host may have elsewhere."""
    for record in records:
        yield {**record, "audio": os.path.relpath(record["audio"], folder)}


def _synthesise(options: argparse.Namespace, folder: Path) -> None:
    """Write the data, unless it is there from an earlier call."""
    from qwen2audio_jax.speech.dataset import write_dataset

    wanted = {"seed": options.seed or 0, "split": options.split or "test", "examples": options.fresh}
    if (folder / "manifest.json").is_file():
        there = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if any(there.get(name) != value for name, value in wanted.items()):
            raise ValueError(
                f"{folder} holds other data: go on with its --fresh, --seed and --split, or name another folder"
            )
        return
    write_dataset(folder, clips=options.fresh, seed=wanted["seed"], split=wanted["split"])


def _shown(found: Evaluation, options: argparse.Namespace) -> int:
    if found.report is not None and options.json:
        write(json.dumps(found.report.to_dict(), ensure_ascii=False) + "\n")
    elif found.report is not None:
        write(lines_of(found.report))
    else:
        write(json.dumps({"state": found.state, **found.figures}) + "\n")
    if found.state == "unfinished" and not options.quiet:
        say("unfinished: the same command goes on, and the report is made when all shards are there")
    return CODES[found.state]


def lines_of(report: Report) -> str:
    """The scores as lines, each with its signature below it."""
    lines = [
        f"{report.task} on {report.data}: {report.records} records, {sum(report.errors.values())} without an answer"
    ]
    if report.rtfx is not None:
        lines.append(f"{report.rtfx:g} s of sound a second (RTFx), loading and compiling included")
    for score in report.scores:
        between = "" if score.low is None else f"  ({score.low:.2f} to {score.high:.2f})"
        value = "-" if score.value is None else f"{score.value:.2f}"
        lines += [f"{score.name:24}{value:>8}{between}", f"    {score.signature}"]
    for figure in report.published:
        ours = report.beside(figure)
        shown = "not computed" if ours is None else f"{ours:.2f}"
        lines.append(
            f"{figure.name} {figure.score} {figure.groups}: ours {shown}, published {figure.value:g} ({figure.model})"
        )
    return "\n".join(lines) + "\n"
