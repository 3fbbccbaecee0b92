"""The answerer of an evaluation: a batch job's, which also asks records' own questions and scores their labels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen2audio_jax.batch.answerer import Row
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.batch.task_answerer import TaskAnswerer
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.evaluation import multiple_choice
from qwen2audio_jax.evaluation.expected import Expected
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.tasks.task import Task

NO_LABELS = "none"
"""Instead of a way to score labels: they are not scored."""


class EvaluationAnswerer(TaskAnswerer):
    """A `TaskAnswerer` whose rows also have `scored`: how probable each label or choice is after the prompt."""

    def __init__(
        self,
        model: PathOrUrl = EMBEDDED,
        *,
        task: Task,
        style: str = "plain",
        label_score: str = "raw",
        **settings: Any,
    ):
        """Keep the settings.

        Args:
            model: as for `from_pretrained`.
            task: what is asked; of "ask" the records say the question.
            style: of multiple choice: one of `multiple_choice.STYLES`.
            label_score: how labels are scored: one of `tasks.labels.SCORES`, or "none".
            **settings: of `TaskAnswerer`.

        Raises:
            ValueError: there is no such style or score, or a number is out of range.
        """
        multiple_choice.check_style(style)
        check_label_score(label_score)
        super().__init__(model, task=task, **settings)
        self._style, self._label_score = style, label_score

    @property
    def settings(self) -> dict[str, Any]:
        """As `TaskAnswerer.settings`, with the style and the score of labels."""
        return {**super().settings, "style": self._style, "label_score": self._label_score}

    def __call__(self, records: Sequence[Record]) -> list[Row]:
        """The rows of some records, in their order; errors as for `Answerer`."""
        rows = super().__call__(records)
        if self._label_score != NO_LABELS:
            for record, row in zip(records, rows, strict=True):
                if "error" not in row and (labels := self._labels(record)):
                    row["scored"] = self._score(record, labels)
        return rows

    def _asked(self, record: Record) -> Record:
        expected = Expected.of(record.meta)
        if expected.question is None:
            return super()._asked(record)
        question = expected.question
        if expected.choices:
            question = multiple_choice.ask(question, expected.choices, style=self._style)
        task = replace(self._task, prompt=question)
        return replace(record, prompt=task.text(len(record.clips)))

    def _labels(self, record: Record) -> Mapping[str, str]:
        """What is scored: label or choice -> its text."""
        expected = Expected.of(record.meta)
        if expected.choices:
            style = self._style if expected.question is not None else "plain"
            return multiple_choice.scored_texts(expected.choices, style=style)
        return self._task.labels if expected.label is not None else {}

    def _score(self, record: Record, labels: Mapping[str, str]) -> dict[str, Any]:
        # Imported here: what carries the settings about needs no jax.
        from qwen2audio_jax.tasks.labels import score_labels

        model, processor = self._load()
        request = self._request(self._asked(record))
        found = score_labels(model, processor, request, labels, score=self._label_score, hearing=self.hearing)
        return found.to_dict()


def check_label_score(name: str) -> None:
    """Raise a ValueError for a way to score labels that is none."""
    from qwen2audio_jax.tasks.labels import SCORES

    if name not in (*SCORES, NO_LABELS):
        raise ValueError(f"label_score={name!r} is none of {', '.join((*SCORES, NO_LABELS))}")
