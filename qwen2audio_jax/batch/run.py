"""A batch job's run on one host: shards -> records -> answers -> parts. No jax here: that is the answerer's."""

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen2audio_jax.batch.inputs import LineFile
from qwen2audio_jax.batch.job import Job
from qwen2audio_jax.batch.manifest import Manifest
from qwen2audio_jax.batch.parts import LISTING_SECONDS, Output, Parts, Row, prove_shared, to_line
from qwen2audio_jax.batch.pipeline import Pipeline
from qwen2audio_jax.batch.progress import OnProgress, Progress
from qwen2audio_jax.batch.quality import Thresholds
from qwen2audio_jax.batch.records import Problem, Record
from qwen2audio_jax.batch.rows import Answers, Rows, error_row
from qwen2audio_jax.batch.shards import Host, Shards, find_host, order_of_work, shard_count
from qwen2audio_jax.batch.signals import draining
from qwen2audio_jax.engine.clips import open_clip
from qwen2audio_jax.storage.bucket import PathOrUrl, is_url

VERSION = 1
"""Version of the parts: a folder of another one is refused."""
GROUP = 64
"""Records that are answered at a time, unless a number is given."""
_SAMPLED = 32


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        state: "finished" (every record of the job has its row), "unfinished" (stopped by a signal, or other hosts'
            shards are missing; the same call goes on), "too_many_errors" or "dry_run".
        figures: counts and rates as plain data.
    """

    state: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A shard to be answered somewhere: `rows(records)` goes into the file `name` of `output`, replacing one if so.

    Its rows with an error, should it be given up, are those of `given_up`.
    """

    rows: Rows | None
    records: Sequence[Record]
    output: PathOrUrl
    name: str
    replace: bool

    def with_rows(self, rows: Rows | None) -> "Task":
        """The same with what answers it, which is sent once, or without."""
        return replace(self, rows=rows)

    def run(self) -> list[Row]:
        """Answer the records and write the part; what there is to count of each row."""
        assert self.rows is not None
        found = self.rows(self.records)
        self.write(found)
        kept = ("error", "audio_seconds", "tokens", "suspect")
        return [{name: row[name] for name in kept if name in row} for row in found]

    def write(self, rows: Sequence[Row]) -> None:
        """Write the part."""
        Output(self.output).write(self.name, b"".join(map(to_line, rows)), replace=self.replace)

    def given_up(self, why: str) -> list[Row]:
        """Write the part with an error for every record: what has been tried so often is not tried on and on."""
        problem = Problem("lost", why)
        rows = [error_row(replace(record, problem=record.problem or problem)) for record in self.records]
        self.write(rows)
        return rows


class Cluster(Protocol):
    """What runs tasks elsewhere."""

    def run(self, tasks: Iterator[Task]) -> Iterator[list[Row]]:
        """Take tasks as there is room, and give what `Task.run` gives of each that is done, in any order."""


@dataclass
class _Open:
    """A shard in the works: its rows by position, how many there are to be, and whether its part is there already."""

    shard: int
    size: int
    rows: dict[int, Row]
    again: bool


def run_batch(
    inputs: Sequence[str | LineFile],
    *,
    output: PathOrUrl,
    answerer: Answers,
    prompt: str | None = None,
    shard: str | None = None,
    group: int = GROUP,
    thresholds: Thresholds | None = None,
    retry_suspect: bool = False,
    retry_errors: bool = False,
    max_errors: int | None = None,
    merge: str | PathLike[str] | None = None,
    peer_timeout: float = 300.0,
    metrics: str | PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    quiet: bool = False,
    dry_run: bool = False,
    cluster: "Cluster | None" = None,
) -> Summary:
    """Answer every record of the inputs, into part files that are each whole or absent; a stopped run goes on.

    The first SIGTERM or SIGINT ends the run after the groups in work, a second one at once (in the main thread).

    Args:
        inputs: see `line_files`.
        output: folder or bucket URL; all hosts of a job give the same.
        answerer: such as `Answerer`.
        prompt: of records that have none.
        shard: "I/N", this host's place among N; None: as the scheduler's variables say, else alone.
        group: records that the answerer gets at a time.
        thresholds: of suspect answers; None: the package's.
        retry_suspect: ask once more, with the options that the thresholds name, where an answer is suspect, and keep
            the less suspect one.
        retry_errors: also answer those records of this host's finished shards again that have an error as their row.
        max_errors: stop when more records of this run than that have no answer.
        merge: a local file for all rows in input order, written when all are there.
        peer_timeout: seconds to wait for a trace of the other hosts; 0: do only this host's shards, unless others have
            left a trace.
        metrics: see `Progress`.
        on_progress: see `Progress`.
        quiet: show no progress.
        dry_run: only count, listen to the lengths of some records, and write nothing.
        cluster: what answers whole shards elsewhere, such as `qwen2audio_jax.ray.Cluster`; this process then only
            hands them out.

    Raises:
        ValueError: inputs that cannot be used, a folder that is another job's or is not shared, a wrong `shard`.
        OSError: the disk or bucket fails.
    """
    if group < 1:
        raise ValueError(f"group={group}: at least one record is answered at a time")
    if merge is not None and is_url(os.fspath(merge)):
        raise ValueError(f"{merge}: rows are merged into a local file; give a path, and copy the file")
    thresholds = Thresholds.read() if thresholds is None else thresholds
    host = find_host(shard, os.environ)
    with Manifest(inputs, prompt=prompt) as manifest:
        shards = Shards(manifest.hashes, count=shard_count(len(manifest)))
        job = Job(
            {
                "version": VERSION,
                "manifest": {"records": len(manifest), "sha256": manifest.sha256},
                "shards": shards.count,
                "prompt": prompt,
                "suspect": {**thresholds.to_dict(), "retried": retry_suspect},
                **answerer.settings,
            }
        )
        place = Output(output)
        parts = Parts(place, fingerprint=job.fingerprint, shards=shards)
        if dry_run:
            job.check(place)
            return Summary("dry_run", _count(manifest, shards, parts, host, hearing=getattr(answerer, "hearing", {})))
        job.claim(place)
        shared = prove_shared(place, host, fingerprint=job.fingerprint, timeout=peer_timeout)
        left = int(shards.sizes().sum() - shards.sizes()[sorted(parts.done())].sum())
        progress = Progress(
            left=left if shared else left // host.count,
            quiet=quiet,
            metrics=None if metrics is None else Path(metrics),
            on_progress=on_progress,
        )
        mine = frozenset(range(host.index, shards.count, host.count)) if retry_errors else frozenset()
        work = _Work(manifest, shards, parts, job, progress, Rows(answerer, thresholds, retry_suspect), mine)
        with draining() as stop:
            order = order_of_work(shards.count, host, fingerprint=job.fingerprint, others=shared)
            if cluster is None:
                state = work.do(order, group=group, stop=stop, max_errors=max_errors)
            else:
                state = work.hand_out(order, cluster, stop=stop, max_errors=max_errors)
        progress.finish()
        missing = shards.count - len(parts.done())
        state = state or ("unfinished" if missing else "finished")
        if merge is not None and state == "finished":
            parts.merge(Path(merge), manifest=manifest)
        figures = {"job": job.fingerprint, "of": len(manifest), "missing_shards": missing, **progress.figures()}
        return Summary(state, figures)


@dataclass(frozen=True)
class _Work:
    """What a run works with."""

    manifest: Manifest
    shards: Shards
    parts: Parts
    job: Job
    progress: Progress
    rows: Rows
    errors_of: frozenset[int]
    """Shards whose errors are tried again."""

    def do(self, order: Iterator[int], *, group: int, stop: threading.Event, max_errors: int | None) -> str | None:
        """Answer the shards in their order; groups reach over the shards' ends. The state, if it ends early."""
        with Pipeline(self.rows, self.rows.answerer) as pipeline:
            for chunk, rows in pipeline.run(self._chunks(order, group=group), stop=stop):
                for (part, position), row in zip(chunk, rows, strict=True):
                    part.rows[position] = row
                self.progress.add(rows)
                if max_errors is not None and self.progress.errors > max_errors:
                    return "too_many_errors"
                for part in {id(part): part for part, _ in chunk}.values():
                    if len(part.rows) == part.size:
                        whole = [part.rows[position] for position in sorted(part.rows)]
                        self.parts.write(part.shard, whole, replace=part.again)
        return "unfinished" if stop.is_set() else None

    def hand_out(
        self, order: Iterator[int], cluster: Cluster, *, stop: threading.Event, max_errors: int | None
    ) -> str | None:
        """Have the shards answered by a cluster."""

        def tasks() -> Iterator[Task]:
            for shard in order:
                if stop.is_set():
                    return
                again = shard in self.parts.done(within=LISTING_SECONDS)
                if again and shard not in self.errors_of:
                    continue
                records = [self._record(position) for position in self.shards.positions(shard).tolist()]
                if records:
                    yield Task(self.rows, records, self.parts.output.place, self.parts.name(shard), again)

        for rows in cluster.run(tasks()):
            self.progress.add(rows)
            if max_errors is not None and self.progress.errors > max_errors:
                return "too_many_errors"
        return "unfinished" if stop.is_set() else None

    def _chunks(self, order: Iterator[int], *, group: int) -> Iterator[tuple[list[tuple[_Open, int]], list[Record]]]:
        """Records in groups, with their places."""
        tasks = self._tasks(order)
        while chunk := list(itertools.islice(tasks, group)):
            yield chunk, [self._record(position) for _, position in chunk]

    def _tasks(self, order: Iterator[int]) -> Iterator[tuple[_Open, int]]:
        for shard in order:
            positions = self.shards.positions(shard).tolist()
            again = shard in self.parts.done(within=LISTING_SECONDS)
            if again and (shard not in self.errors_of or not positions):
                continue
            good = {}
            if again:
                rows = zip(positions, self.parts.read(shard, hashes=self.manifest.hashes), strict=True)
                good = {position: row for position, row in rows if "error" not in row}
            part = _Open(shard, len(positions), good, again)
            yield from ((part, position) for position in positions if position not in good)

    def _record(self, position: int) -> Record:
        record = self.manifest.record(position)
        return replace(record, seed=self.job.seed(record.id))


def _count(
    manifest: Manifest, shards: Shards, parts: Parts, host: Host, *, hearing: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of a dry run; some clips are heard, with the job's own options, so that its errors are seen."""
    from qwen2audio_jax.audio import AudioError
    from qwen2audio_jax.audio.load import load_clip

    done, sizes = parts.done(), shards.sizes()
    left = int(sizes.sum() - sizes[sorted(done)].sum())
    seconds, problems, in_part = [], [], 0
    for position in np.unique(np.linspace(0, len(manifest) - 1, _SAMPLED).astype(int)).tolist():
        record = manifest.record(position)
        try:
            if record.problem is not None:
                raise ValueError(record.problem.message)
            clips = [load_clip(open_clip(clip), **hearing) for clip in record.clips]
            seconds.append(sum(len(clip.samples) for clip in clips) / 16_000)
            in_part += any(clip.missing is not None for clip in clips)
        except ValueError as error:
            kind = error.kind if isinstance(error, AudioError) else "record"
            problems.append({"id": record.id, "kind": kind, "message": str(error)})
    mean = float(np.mean(seconds)) if seconds else None
    return {
        "of": len(manifest),
        "left": left,
        "shards": shards.count,
        "missing_shards": shards.count - len(done),
        "host": f"{host.index}/{host.count}, {host.told_by}",
        "sampled": len(seconds) + len(problems),
        "heard_in_part": in_part,
        "mean_seconds": None if mean is None else round(mean, 2),
        "longest_seconds": None if mean is None else round(max(seconds), 2),
        "audio_hours_left": None if mean is None else round(left * mean / 3600, 3),
        "problems": problems,
    }
