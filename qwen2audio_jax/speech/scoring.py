"""Scoring of answers: digit error rate of transcriptions, and accuracy of every other task."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen2audio_jax.speech.tasks import PAIR, TASKS

ANALYSIS = ("count", "voice", "kind")
"""The tasks of the score `analysis`."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        task: one of `TASKS`, or a kind of comparison: "pair: tone".
        expected: the right answer.
        said: the model's answer.
    """

    task: str
    expected: str
    said: str

    @property
    def right(self) -> bool:
        """True if the answers are the same text, ignoring surrounding white space."""
        return self.said.strip() == self.expected.strip()


@dataclass(frozen=True)
class Scores:
    """The scores of one evaluation; shares are 0..1 (an error rate can be more), None without questions.

    Attributes:
        examples: number of questions.
        digit_error_rate: of raw transcriptions: substituted, missing and added digits over spoken digits.
        strings_right: share of raw transcriptions that are entirely correct.
        chat_digit_error_rate: `digit_error_rate` of transcriptions in a conversation.
        sums: share of spoken sums answered correctly, operands and result.
        analysis: share of questions about one clip (`ANALYSIS`) answered correctly.
        pairs: share of correct comparisons of two clips.
        overall: share of correct answers, transcriptions included.
        accuracy: task -> share of correct answers.
        counts: task -> number of questions.
    """

    examples: int
    digit_error_rate: float | None
    strings_right: float | None
    chat_digit_error_rate: float | None
    sums: float | None
    analysis: float | None
    pairs: float | None
    overall: float | None
    accuracy: dict[str, float]
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON values."""
        return asdict(self)


def score(answers: Sequence[Answer]) -> Scores:
    """Compute the scores of answers."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        right[answer.task].append(answer.right)

    def share(*tasks: str) -> float | None:
        values = [value for task in tasks for value in right.get(task, ())]
        return sum(values) / len(values) if values else None

    return Scores(
        examples=len(answers),
        digit_error_rate=digit_error_rate([a for a in answers if a.task == "transcribe"]),
        strings_right=share("transcribe"),
        chat_digit_error_rate=digit_error_rate([a for a in answers if a.task == "say"]),
        sums=share("sum"),
        analysis=share(*ANALYSIS),
        pairs=share(*(pair_task(name) for name in PAIR)),
        overall=share(*right),
        accuracy={task: sum(values) / len(values) for task, values in sorted(right.items())},
        counts=dict(sorted(Counter(answer.task for answer in answers).items())),
    )


def digit_error_rate(answers: Sequence[Answer]) -> float | None:
    """Edit distance over digits, all transcriptions together; None if no digit was spoken.

    Text other than digits is ignored.
    """
    pairs = [(re.findall(r"[0-9]", a.expected), re.findall(r"[0-9]", a.said)) for a in answers]
    spoken = sum(len(expected) for expected, _ in pairs)
    return sum(edit_distance(*pair) for pair in pairs) / spoken if spoken else None


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def pair_task(name: str) -> str:
    """The task's name of one kind of comparison, a key of `PAIR`."""
    return f"pair: {name}"


def task_of(record: dict[str, Any]) -> str:
    """The name under which a record is counted.

    Raises:
        ValueError: the record has no known task.
    """
    task = record.get("task")
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; evaluation knows {', '.join(TASKS)}")
    if task != "pair":
        return task
    question = record["messages"][-2]["content"][-1]["text"]
    names = [name for name, text in PAIR.items() if text == question]
    if not names:
        raise ValueError(f"the comparison {question!r} is not known; known are {', '.join(PAIR.values())}")
    return pair_task(names[0])
