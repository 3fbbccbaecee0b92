"""`qwen2audio transcribe`, `translate`, `caption`, `classify`, `ask` and `embed`: many files, one start."""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2audio_jax.cli.clips import clip_source
from qwen2audio_jax.cli.from_options import join, load_model
from qwen2audio_jax.cli.options import DEFAULT_MODEL, hotword_options
from qwen2audio_jax.cli.output import say, write
from qwen2audio_jax.engine.request import Answer, RequestError
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.tasks.checks import Checks
from qwen2audio_jax.tasks.detectors import check_detector
from qwen2audio_jax.tasks.embeddings import FORMATS as EMBEDDING_FORMATS
from qwen2audio_jax.tasks.embeddings import Embeddings, embed, write_embeddings
from qwen2audio_jax.tasks.kind import checkpoint_kind
from qwen2audio_jax.tasks.labels import classify
from qwen2audio_jax.tasks.listener import Tasks
from qwen2audio_jax.tasks.questions import question_request
from qwen2audio_jax.tasks.task import Task, cutting_of, find_task
from qwen2audio_jax.tasks.transcribe import Transcribing, transcribe
from qwen2audio_jax.tasks.transcript import Transcript
from qwen2audio_jax.tasks.windows import Cutting


def run_task(options: argparse.Namespace) -> int:
    """Do the task in the options for each file, in order; 1 if any has no answer.

    Raises:
        ValueError: an input or option cannot be used.
    """
    files = [(name, _source(name)) for name in options.files]
    if options.command in ("transcribe", "translate"):
        return _transcripts(files, options)
    if options.command == "embed":
        return _embeddings(files, options)
    if options.command == "classify":
        return _labels(files, options)
    return _answers(files, options)


def _source(name: str) -> str | bytes:
    """A file, or what a shell puts in the place of one, read: it can be read once."""
    source = clip_source(name, stdin=True)
    if isinstance(source, str):
        return source
    with source:
        content = source.read(LIMITS.file_bytes + 1)
    if len(content) > LIMITS.file_bytes:
        raise ValueError(f"{name} gives more than the {LIMITS.file_bytes} bytes that a pipe may: write it into a file")
    return content


def _loaded(options: argparse.Namespace) -> tuple[Any, Qwen2AudioProcessor]:
    if options.model == DEFAULT_MODEL and not options.quiet:
        say("the small embedded model of spoken digits answers; --model names another")
    processor = Qwen2AudioProcessor.from_pretrained(options.model, revision=options.revision)
    join(options)
    return load_model(options), processor


def _tasks(options: argparse.Namespace) -> Tasks:
    model, processor = _loaded(options)
    size = {name: value for name in ("slots", "positions") if (value := getattr(options, name)) is not None}
    return Tasks(
        model,
        processor,
        kind=options.kind,
        source=options.model,
        allow_truncated=options.allow_truncated,
        track=options.track,
        **size,
    )


def _hearing(options: argparse.Namespace) -> dict[str, Any]:
    return {"allow_truncated": options.allow_truncated, "track": options.track}


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}


# transcribe, translate


def _transcripts(files: list[tuple[str, Any]], options: argparse.Namespace) -> int:
    form, folder = options.output_format, options.output_dir
    if folder is None and len(files) > 1 and form not in ("txt", "json"):
        raise ValueError(f"{len(files)} files as {form} on stdout are no {form}: give --output-dir DIR, or one file")
    targets = {} if folder is None else _targets([name for name, _ in files], Path(folder), form)
    checks = Checks.read(options.checks)
    check_detector(options.detector)
    language = options.language if options.command == "transcribe" else f"{options.source}-{options.target}"
    with _tasks(options) as tasks:
        cutting = Cutting(**cutting_of(tasks.kind))
        if options.window is not None:
            cutting = replace(cutting, seconds=options.window)
        how = Transcribing(
            task=find_task(options.command, kind=tasks.kind, language=language),
            detector=options.detector,
            cutting=cutting,
            gated=not options.no_gate,
            checks=checks,
            retry=options.retry,
            options={**_generation(options), **hotword_options(options)},
            seed=options.seed,
            hearing=_hearing(options),
        )
        _warn_unverified(how.task, options)
        failures, seconds, began = 0, 0.0, time.monotonic()
        for transcript in transcribe(tasks.engine, files, how):
            seconds += transcript.seconds
            failures += transcript.error is not None
            _show(transcript, options, target=targets.get(transcript.name), several=len(files) > 1)
        if options.stats:
            _say_stats(tasks, files=len(files), seconds=time.monotonic() - began, heard=seconds)
    return 1 if failures else 0


def _targets(names: list[str], folder: Path, form: str) -> dict[str, Path]:
    """The file of each name in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    targets: dict[str, Path] = {}
    for name in names:
        stem = Path(name.removeprefix("example:").rstrip("/")).stem or "audio"
        target = folder / f"{stem}.{form}"
        other = next((each for each, path in targets.items() if path == target and each != name), None)
        if other is not None:
            raise ValueError(f"{other} and {name} would both be written to {target}: rename one, or give two folders")
        targets[name] = target
    return targets


def _show(transcript: Transcript, options: argparse.Namespace, *, target: Path | None, several: bool) -> None:
    form = options.output_format
    if transcript.error is not None:
        say(f"{transcript.name}: {transcript.error}")
    doubtful = [segment for segment in transcript.segments if segment.flags]
    if doubtful and not options.quiet:
        first = doubtful[0]
        say(
            f"{transcript.name}: {len(doubtful)} of {len(transcript.segments)} windows are doubtful, first that at "
            f"{first.start:.1f} s ({', '.join(first.flags)}); --output-format json has all, --retry all asks again"
        )
    if target is not None:
        write_whole(target, transcript.format(form).encode())
    elif form == "txt" and several:
        write(f"{transcript.name}: {transcript.text}\n")
    else:
        write(transcript.format(form))


# caption, ask


def _answers(files: list[tuple[str, Any]], options: argparse.Namespace) -> int:
    with _tasks(options) as tasks:
        task = _question(options, kind=tasks.kind)
        _warn_unverified(task, options)
        failures, heard, began = 0, 0.0, time.monotonic()
        for name, outcome in _asked(tasks, files, task, options):
            failures += isinstance(outcome, ValueError)
            if isinstance(outcome, ValueError):
                say(f"{name}: {outcome}")
                continue
            heard += outcome.audio_seconds
            text = task.clean(outcome.text)
            if options.json:
                write(json.dumps({"audio": name, "text": text, "finish_reason": outcome.finish_reason}) + "\n")
            else:
                write(f"{name}: {text}\n" if len(files) > 1 else f"{text}\n")
        if options.stats:
            _say_stats(tasks, files=len(files), seconds=time.monotonic() - began, heard=heard)
    return 1 if failures else 0


def _question(options: argparse.Namespace, *, kind: str) -> Task:
    if options.command == "caption":
        return find_task("caption", kind=kind)
    name = options.task or ("ask" if options.question else "voice_chat")
    return find_task(name, kind=kind, question=options.question)


def _asked(
    tasks: Tasks, files: Iterable[tuple[str, Any]], task: Task, options: argparse.Namespace
) -> Iterator[tuple[str, Answer | ValueError]]:
    """The outcome for each file, in order; as many are under way as the engine has slots."""
    waiting: list[tuple[str, Any]] = []
    for name, source in files:
        try:
            request = question_request(
                source,
                task,
                positions=tasks.engine.positions,
                options=_generation(options),
                hearing=_hearing(options),
            )
            waiting.append((name, tasks.engine.submit(request)))
        except ValueError as error:
            waiting.append((name, error))
        if len(waiting) >= tasks.engine.slots:
            yield _outcome(*waiting.pop(0))
    for name, handle in waiting:
        yield _outcome(name, handle)


def _outcome(name: str, handle: Any) -> tuple[str, Answer | ValueError]:
    if isinstance(handle, ValueError):
        return name, handle
    try:
        return name, handle.result()
    except RequestError as error:
        return name, error


# classify, embed


def _labels(files: list[tuple[str, Any]], options: argparse.Namespace) -> int:
    model, processor = _loaded(options)
    kind = options.kind or checkpoint_kind(options.model, revision=options.revision)
    given = None if options.labels is None else [label.strip() for label in options.labels.split(",") if label.strip()]
    name = options.task or ("choose" if given else "sound_kind" if kind == "embedded" else "emotion")
    task = find_task(name, kind=kind, labels=given)
    _warn_unverified(task, options)
    failures = 0
    for file, source in files:
        try:
            found = classify(model, processor, source, task=task, score=options.score, hearing=_hearing(options))
        except ValueError as error:
            failures += 1
            say(f"{file}: {error}")
            continue
        if options.json:
            write(json.dumps({"audio": file, **found.to_dict()}) + "\n")
        else:
            share = found.probabilities.max()
            write(f"{file}: {found.best} ({share:.3f})\n" if len(files) > 1 else f"{found.best} ({share:.3f})\n")
    return 1 if failures else 0


def _embeddings(files: list[tuple[str, Any]], options: argparse.Namespace) -> int:
    target = Path(options.output)
    form = target.suffix.removeprefix(".")
    if form not in EMBEDDING_FORMATS:
        raise ValueError(f"--output {target}: the name must end with .{' or .'.join(EMBEDDING_FORMATS)}")
    if len(dict(files)) < len(files):
        raise ValueError("a file is given twice: its vectors would have one name")
    model, processor = _loaded(options)
    found: dict[str, Embeddings] = {}
    for name, source in files:
        try:
            found[name] = embed(
                model, processor, source, layer=options.layer, pool=options.pool, hearing=_hearing(options)
            )
        except ValueError as error:
            say(f"{name}: {error}")
    if found:
        write_embeddings(target, found, form=form)
    return 0 if len(found) == len(files) else 1


def _warn_unverified(task: Task, options: argparse.Namespace) -> None:
    if not task.verified and not options.quiet:
        where = "" if task.language is None else f" for {task.language}"
        say(f"the prompt of {task.name}{where} is made by analogy: models of kind {task.kind!r} may not know it")


def _say_stats(tasks: Tasks, *, files: int, seconds: float, heard: float) -> None:
    figures = tasks.engine.stats()
    first = figures["first_token_seconds"]
    found = {
        "files": files,
        "audio_seconds": round(heard, 2),
        "seconds": round(seconds, 2),
        "times_real_time": round(heard / seconds, 2) if seconds else None,
        "first_token_seconds": None if first is None else first["median"],
        "tokens": figures["tokens"],
        "tokens_per_second": figures["tokens_per_second"],
    }
    say(json.dumps(found))
