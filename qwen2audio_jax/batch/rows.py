"""Rows of a job: what an answerer says of records, judged, with errors for those that cannot be answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qwen2audio_jax.batch.quality import Thresholds
from qwen2audio_jax.batch.records import Record

Row = dict[str, Any]


class Answers(Protocol):
    """What answers records: a callable without memory, which two threads may call at a time.

    A row is {"id", "text", "finish_reason", "audio_seconds", "tokens", "mean_log_prob", ...} or {"id", "error":
    {"kind", "message"}}, in the order of the records, and depends on its record and `settings` alone.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain data, whatever changes an answer: it goes into the job's fingerprint."""

    def __call__(self, records: Sequence[Record]) -> list[Row]:
        """The rows of some records."""


@dataclass(frozen=True)
class Rows:
    """A callable `records -> rows`, as picklable as its answerer.

    Attributes:
        answerer: asked for records without a problem.
        thresholds: of suspect answers.
        retry: whether to ask once more, with the options that the thresholds name, where an answer is suspect, and keep
            the less suspect one.
    """

    answerer: Answers
    thresholds: Thresholds
    retry: bool = False

    def __call__(self, records: Sequence[Record]) -> list[Row]:
        """The rows of a group."""
        rows: list[Row] = [error_row(record) for record in records]
        good = [index for index, record in enumerate(records) if record.problem is None]
        for index, row in zip(good, self._judged([records[index] for index in good]), strict=True):
            rows[index] = row
        again = [index for index in good if self.retry and rows[index].get("suspect")]
        options = self.thresholds.retry
        second = self._judged(
            [replace(records[index], options={**records[index].options, **options}) for index in again]
        )
        for index, row in zip(again, second, strict=True):
            if "error" not in row and len(row["suspect"]) < len(rows[index]["suspect"]):
                rows[index] = {**row, "retried": True}
        return rows

    def _judged(self, records: Sequence[Record]) -> list[Row]:
        if not records:
            return []
        rows = []
        for record, row in zip(records, self.answerer(records), strict=True):
            if "error" in row:
                row = {**row, "where": record.where}
            else:
                row = {
                    **row,
                    **self.thresholds.judge(
                        row["text"],
                        audio_seconds=row.get("audio_seconds", 0.0),
                        finish_reason=row.get("finish_reason", ""),
                    ),
                }
            rows.append(_named(record, row))
        return rows


def error_row(record: Record) -> Row:
    """The row of a record that has a problem."""
    problem = record.problem
    error = {} if problem is None else {"error": {"kind": problem.kind, "message": problem.message}}
    return _named(record, {**error, "where": record.where})


def _named(record: Record, row: Row) -> Row:
    """The row with its id first and the record's `meta` last."""
    meta = {} if record.meta is None else {"meta": record.meta}
    return {"id": record.id, **{name: value for name, value in row.items() if name != "id"}, **meta}
