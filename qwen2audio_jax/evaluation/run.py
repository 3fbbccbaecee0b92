"""An evaluation: a manifest answered by a batch job, its rows scored, and a report written beside them.

A job that was stopped goes on when it is called again, and several hosts may share it, as with any batch job; the
report is made by each host that finds all parts there.
"""

import hashlib
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen2audio_jax._version import __version__
from qwen2audio_jax.batch.parts import Output
from qwen2audio_jax.batch.run import GROUP, run_batch
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.evaluation.answerer import EvaluationAnswerer
from qwen2audio_jax.evaluation.manifest import Manifest, manifest_of, read_manifest
from qwen2audio_jax.evaluation.multiple_choice import STYLES
from qwen2audio_jax.evaluation.picture import draw_confusion
from qwen2audio_jax.evaluation.published import Published, find_published
from qwen2audio_jax.evaluation.report import Report
from qwen2audio_jax.evaluation.responses import response_files
from qwen2audio_jax.evaluation.scores import by_group, require_packages, score
from qwen2audio_jax.source import resolve_processor_files
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.tasks.kind import checkpoint_kind
from qwen2audio_jax.tasks.task import Task, find_task

QUESTION = "{question}"
"""The place of a record's question in the prompt of the task "ask"."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a call.

    Attributes:
        state: as of `batch.run.Summary`: "finished", "unfinished", "too_many_errors" or "dry_run".
        figures: of the job's run, plain data.
        report: what was found; None unless the job is finished.
    """

    state: str
    figures: Mapping[str, Any]
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The records of an evaluation: files, or values.

    Attributes:
        name: of the data, for the report.
        files: manifests, as for `read_manifest`.
        records: values instead, each as a line of a manifest.
        root: folder that relative paths of values start from.
    """

    name: str
    files: Sequence[str] = ()
    records: Iterable[Mapping[str, Any]] = ()
    root: str = "."

    def manifest(self, task: Task, scratch: Path) -> Manifest:
        """The records, checked."""
        if self.files:
            return read_manifest(self.files, task=task, scratch=scratch)
        return manifest_of(self.records, name=self.name, root=self.root, task=task, scratch=scratch)


def evaluate(
    task: str,
    source: Source,
    *,
    output: PathOrUrl,
    model: PathOrUrl = EMBEDDED,
    kind: str | None = None,
    language: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    style: str = "plain",
    label_score: str = "raw",
    published: str | None = None,
    settings: Mapping[str, Any] | None = None,
    running: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate a model on a task.

    Args:
        task: a name of `configs/tasks.toml`.
        source: the records.
        output: folder or bucket URL of the job's parts and the report: `report.json`, `report.md`, `answers.jsonl`,
            `confusion.png` of classifications, and the files of `response_files`.
        model: as for `from_pretrained`.
        kind: of the model; default: by the model.
        language: of the task; default: what the records state, else the task's.
        labels: of a classification, instead of the task's own; see `find_task`.
        style: of multiple choice: one of `multiple_choice.STYLES`.
        label_score: how labels and choices are scored: one of `tasks.labels.SCORES`, or "none".
        published: name of the data set in `configs/published.toml` to compare with.
        settings: other arguments of `EvaluationAnswerer`: options (greedy, unless they say otherwise), slots, workers,
            dtype, ...
        running: other arguments of `run_batch`: shard, max_errors, retry_errors, quiet, ...

    Raises:
        ValueError: the manifest, the model or an argument cannot be used, or a package of the extra `evaluate` is
            missing.
        OSError: the disk or the bucket fails.
    """
    figures = find_published(published) if published is not None else []
    settings, running = dict(settings or {}), dict(running or {})
    settings["options"] = {"do_sample": False, **settings.get("options", {})}
    kind = kind or checkpoint_kind(model, revision=settings.get("revision"))
    with tempfile.TemporaryDirectory(prefix="qwen2audio-evaluate-") as scratch:
        asked = partial(find_task, task, kind=kind, labels=labels, question=QUESTION if task == "ask" else None)
        manifest = source.manifest(asked(), _folder(scratch, "manifest"))
        found = asked(language=_language(language, manifest.language))
        if any(figure.task != task for figure in figures):
            raise ValueError(f"published={published!r} is of the task {figures[0].task!r}, and the task is {task!r}")
        require_packages(found)
        answerer = EvaluationAnswerer(model, task=found, style=style, label_score=label_score, **settings)
        merged = Path(scratch, "answers.jsonl")
        slots = settings.get("slots")
        summary = run_batch(
            manifest.files,
            output=output,
            answerer=answerer,
            merge=merged,
            **{"group": GROUP if slots is None else max(GROUP, 2 * slots), **running},
        )
        place = Output(output)
        if summary.state != "dry_run":
            _note_speed(place, summary.figures)
        if summary.state != "finished":
            return Evaluation(summary.state, summary.figures, None)
        content = merged.read_bytes()
    job = summary.figures["job"]
    stored = _stored_dtype(model, settings.get("revision"))
    made = signature(answerer.settings, model=model, stored=stored, task=found, style=style, job=job)
    rows = [json.loads(line) for line in content.splitlines()]
    speed = _speed(place, job)
    report = _report(
        rows, task=found, style=style, data=source.name, model=model, made=made, rtfx=speed, published=figures
    )
    for name, file in {**_files(report), "answers.jsonl": content, **response_files(rows)}.items():
        place.write(name, file, replace=True)
    return Evaluation(summary.state, summary.figures, report)


def signature(settings: Mapping[str, Any], *, model: PathOrUrl, stored: str, task: Task, style: str, job: str) -> str:
    """How answers were made, in one line: task, hash of the prompt, model by its content, dtype, job, version."""
    text = task.text() + (STYLES[style] if task.name == "ask" else "")
    prompt = hashlib.sha256(text.encode()).hexdigest()[:8]
    made = settings["model"]
    named = task.name if task.language is None else f"{task.name}.{task.language}"
    parts = {
        "task": named,
        "kind": task.kind,
        "prompt": prompt,
        "model": f"{_name(model)}@{made['content']}",
        "adapter": made["adapter"],
        "dtype": stored if made["dtype"] == "auto" else made["dtype"],
        "weights": made["weights_dtype"],
        "job": job,
        "qwen2audio-jax": __version__,
    }
    return "|".join(f"{name}:{value}" for name, value in parts.items() if value not in (None, "auto"))


def _stored_dtype(model: PathOrUrl, revision: str | None) -> str:
    """What a checkpoint's dtype "auto" is."""
    return Qwen2AudioConfig.from_json_file(resolve_processor_files(model, revision=revision) / "config.json").dtype


def _report(
    rows: Sequence[Mapping[str, Any]],
    *,
    task: Task,
    style: str,
    data: str,
    model: PathOrUrl,
    made: str,
    rtfx: float | None,
    published: Sequence[Published],
) -> Report:
    return Report(
        task=task.name if task.language is None else f"{task.name} ({task.language})",
        data=data,
        model=_name(model),
        prompt=task.text(),
        verified=task.verified,
        records=len(rows),
        errors=Counter(row["error"]["kind"] for row in rows if "error" in row),
        audio_seconds=round(sum(row.get("audio_seconds", 0.0) for row in rows), 2),
        rtfx=rtfx,
        scores=score(rows, task=task, style=style, made=made),
        groups=by_group(rows, task=task, style=style),
        published=published,
        made=made,
    )


def _files(report: Report) -> dict[str, bytes]:
    files = {
        "report.json": (json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n").encode(),
        "report.md": report.to_markdown().encode(),
    }
    shown = next((each for each in report.scores if "matrix" in each.details), None)
    if shown is not None:
        files["confusion.png"] = draw_confusion(shown.details, title=f"{report.task}, {shown.name}")
    return files


def _language(given: str | None, stated: str | None) -> str | None:
    if given is not None and stated is not None and given != stated:
        raise ValueError(f"language={given!r}, and the records state {stated!r}: give one of them")
    return given or stated


def _name(model: PathOrUrl) -> str:
    """A checkpoint's name, which tells no folder of this machine: a hub id, or the last part of a path."""
    name = str(model).rstrip("/")
    if model == EMBEDDED:
        return "embedded"
    return name if name.count("/") == 1 and not os.path.exists(name) else name.rpartition("/")[2]


def _note_speed(place: Output, figures: Mapping[str, Any]) -> None:
    """Keep what a run has heard, and how long it took."""
    if figures["records"]:
        name = f"speed-{figures['job']}-{platform.node()}-{os.getpid()}-{time.time_ns()}.json"
        seconds = max(figures["seconds"], 0.01)  # to which they are rounded
        kept = {"records": figures["records"], "audio_seconds": figures["audio_seconds"], "seconds": seconds}
        place.write(name, (json.dumps(kept) + "\n").encode())


def _speed(place: Output, job: str) -> float | None:
    """Seconds of sound for a second, over all runs of the job; None if no run has left a note."""
    kept = [json.loads(place.read(name)) for name in sorted(place.names()) if name.startswith(f"speed-{job}-")]
    seconds = sum(each["seconds"] for each in kept)
    return round(sum(each["audio_seconds"] for each in kept) / seconds, 3) if seconds else None


def _folder(scratch: str, name: str) -> Path:
    folder = Path(scratch, name)
    folder.mkdir()
    return folder
