"""Answerers of tasks: a model and a task in the place of prompts; `LongAnswerer` takes sound of any length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen2audio_jax.batch.answerer import Answerer, Row
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.engine.request import Answer, RequestError
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.tasks.task import Task

_REFUSED = RequestError("a record of long sound has one clip, and neither prompt, messages nor options", kind="record")


class TaskAnswerer(Answerer):
    """An answerer that asks for a task where a record states no prompt, and cleans what is answered."""

    def __init__(
        self, model: PathOrUrl = EMBEDDED, *, task: Task, options: Mapping[str, Any] | None = None, **settings: Any
    ):
        """Keep the settings: `task`, and those of `Answerer`; `options` go before the task's own."""
        super().__init__(model, options={**task.options, **(options or {})}, **settings)
        self._task = task

    @property
    def settings(self) -> dict[str, Any]:
        """As `Answerer.settings`, with the task."""
        task = {"name": self._task.name, "kind": self._task.kind, "prompt": self._task.text()}
        return {**super().settings, "task": task}

    def _outcomes(self, records: Sequence[Record]) -> Iterator[Answer | RequestError]:
        yield from super()._outcomes([self._asked(record) for record in records])

    def _asked(self, record: Record) -> Record:
        if record.prompt is not None or record.messages is not None:
            return record
        return replace(record, prompt=self._task.text(len(record.clips)) or None)

    def _row(self, record: Record, outcome: Answer | RequestError) -> Row:
        row = super()._row(record, outcome)
        if "text" in row and record.prompt is None and record.messages is None:
            row["text"] = self._task.clean(row["text"])
        return row


class LongAnswerer(TaskAnswerer):
    """An answerer that transcribes or translates sound of any length; rows have the segments too.

    With `workers` each sound is decoded in a process of its own.
    """

    def __init__(self, model: PathOrUrl = EMBEDDED, *, task: Task, long: Mapping[str, Any] | None = None, **rest: Any):
        """Keep the settings: those of `TaskAnswerer`, and in `long` those of `Transcribing`: detector, retry, ...

        Raises:
            ValueError: the task is neither transcription nor translation, or a setting cannot be used.
        """
        if task.name not in ("transcribe", "translate"):
            raise ValueError(f"the task {task.name!r} is not one for long sound: those are transcribe and translate")
        super().__init__(model, task=task, **rest)
        self._long = dict(long or {})
        self._how()

    @property
    def settings(self) -> dict[str, Any]:
        """As `TaskAnswerer.settings`, with those of long sound."""
        return {**super().settings, "long": self._long}

    def __call__(self, records: Sequence[Record]) -> list[Row]:
        """The rows of some records, in their order.

        Raises:
            ValueError: the model cannot be loaded.
            RuntimeError: the device fails.
        """
        rows: list[Row] = [_error_row(record, _REFUSED) if _is_refused(record) else {} for record in records]
        good = [index for index, row in enumerate(rows) if not row]
        with self._access.shared():
            for index, row in zip(good, self._heard([records[index] for index in good]), strict=True):
                rows[index] = row
        failed = [index for index in good if _kind(rows[index]) == "device"]
        for index in failed:  # one may be more than the device can take, as in `Answerer`
            with self._access.alone():
                [rows[index]] = self._heard([records[index]])
        if failed and all(_kind(rows[index]) == "device" for index in good):
            raise RuntimeError(f"the model fails on every record: {self._failure}") from self._failure
        return rows

    def _heard(self, records: Sequence[Record]) -> list[Row]:
        from qwen2audio_jax.tasks.transcribe import transcribe

        engine = self._engine()
        rows: list[Row] = []
        try:
            sounds = [(record.id, record.clips[0]) for record in records]
            for record, transcript in zip(records, transcribe(engine, sounds, self._how()), strict=True):
                rows.append(_long_row(record, transcript))
        except RuntimeError:  # the engine has failed meanwhile, or was closed
            rows += [_error_row(record, engine.end()) for record in records[len(rows) :]]
        self._failure = engine.failure or self._failure
        return rows

    def _how(self) -> Any:
        from qwen2audio_jax.tasks.transcribe import Transcribing

        hearing = {name: value for name, value in self._audio.items() if name != "truncation"}
        return Transcribing(
            task=self._task,
            options=self._options,
            seed=self._seed or 0,
            hearing=hearing,
            apart=bool(self._size["workers"]),
            **self._long,
        )


def _is_refused(record: Record) -> bool:
    return len(record.clips) != 1 or record.prompt is not None or record.messages is not None or bool(record.options)


def _kind(row: Row) -> str | None:
    return row["error"]["kind"] if "error" in row else None


def _error_row(record: Record, error: ValueError) -> Row:
    return {"id": record.id, "error": {"kind": getattr(error, "kind", "input"), "message": str(error)}}


def _long_row(record: Record, transcript: Any) -> Row:
    if transcript.error is not None:
        return _error_row(record, transcript.error)
    known = [segment for segment in transcript.segments if segment.mean_log_prob is not None]
    tokens = sum(segment.tokens for segment in known)
    total = sum(segment.mean_log_prob * segment.tokens for segment in known)
    found = transcript.to_dict()
    return {
        "id": record.id,
        "text": transcript.text,
        "finish_reason": "length" if any("cut" in segment.flags for segment in transcript.segments) else "eos",
        "audio_seconds": found["seconds"],
        "tokens": tokens,
        "mean_log_prob": round(total / tokens, 5) if tokens else None,
        "segments": found["segments"],
    }
