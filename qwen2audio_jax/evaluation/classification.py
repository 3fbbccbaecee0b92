"""Scores of classifications: accuracy, macro-F1, a line for each class, and the confusion matrix, by scikit-learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.evaluation.extra import import_extra

OTHER = "(other)"
"""The column of answers that are none of the labels."""


@dataclass(frozen=True)
class Share:
    """The share of right answers.

    Attributes:
        right: how many are.
        of: of so many.
        low: lower end of Wilson's 95 % interval; None of none.
        high: its upper end.
    """

    right: int
    of: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float | None:
        """0..1; None of none."""
        return self.right / self.of if self.of else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"value": self.value, **vars(self)}


def share(right: Sequence[bool]) -> Share:
    """The share of what is right."""
    if not right:
        return Share(0, 0, None, None)
    test = import_extra("scipy.stats").binomtest(sum(right), len(right))
    ends = test.proportion_ci(confidence_level=0.95, method="wilson")
    return Share(sum(right), len(right), float(ends.low), float(ends.high))


@dataclass(frozen=True)
class Classification:
    """The scores of a classification.

    Attributes:
        accuracy: the share of right answers; what is none of the labels is wrong.
        macro_f1: the mean of the F1 of all labels that occur in the data.
        classes: label -> precision, recall, f1, support.
        labels: of the matrix's rows and columns.
        matrix: [row][column] counts: expected, answered; the last column is of answers that are no label.
    """

    accuracy: Share
    macro_f1: float
    classes: dict[str, dict[str, float]]
    labels: tuple[str, ...]
    matrix: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "accuracy": self.accuracy.to_dict(), "labels": list(self.labels)}


def classification(expected: Sequence[str], said: Sequence[str], *, labels: Sequence[str]) -> Classification:
    """The scores of answers, each of which is a label or anything else.

    Args:
        expected: the right labels, at least one.
        said: the answers: see `nearest_label`.
        labels: all there are.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    metrics = import_extra("sklearn.metrics")
    known = [answer if answer in labels else OTHER for answer in said]
    there = [label for label in labels if label in expected]
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        list(expected), known, labels=there, zero_division=0
    )
    rows = zip(there, precision, recall, f1, support, strict=True)
    matrix = metrics.confusion_matrix(list(expected), known, labels=[*labels, OTHER])
    return Classification(
        accuracy=share([one == other for one, other in zip(expected, known, strict=True)]),
        macro_f1=float(f1.mean()),
        classes={
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for label, p, r, f, s in rows
        },
        labels=tuple(labels),
        matrix=matrix[:-1].tolist(),
    )


def exact_label(text: str, spoken: Mapping[str, str]) -> str:
    """The label that an answer is to the letter, as the script of the published figures compares; else `OTHER`.

    Args:
        text: the answer; white space before it does not count.
        spoken: label -> how it is said.
    """
    return next((label for label, words in spoken.items() if text.lstrip() == words), OTHER)


def spoken_label(text: str, spoken: Mapping[str, str]) -> str:
    """The label that an answer is but for case, space around it and a full stop; else `OTHER`. As `exact_label`."""
    said = _plain(text)
    return next((label for label, words in spoken.items() if said in (_plain(label), _plain(words))), OTHER)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
