"""Answers to figures: the digit error rate of transcriptions and the share of right answers of every other task."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen2audio_jax.speech.tasks import PAIR, TASKS

ANALYSIS = ("count", "voice", "kind")
"""The tasks that make up the figure `analysis`."""


@dataclass(frozen=True)
class Answer:
    """What a model said.

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
        """Whether the answers are the same text, white space around them aside."""
        return self.said.strip() == self.expected.strip()


@dataclass(frozen=True)
class Scores:
    """The figures of one evaluation; shares are 0..1 (an error rate can be more), None where nothing was asked.

    Attributes:
        examples: number of questions.
        digit_error_rate: of raw transcriptions: digits wrong, missing and added, over digits spoken.
        strings_right: share of raw transcriptions that are right from end to end.
        chat_digit_error_rate: `digit_error_rate` of the transcriptions asked for in a conversation.
        sums: share of spoken sums that are answered right, operands and result.
        analysis: share of the questions about one clip (`ANALYSIS`) that are answered right.
        pairs: share of right comparisons of two clips.
        overall: share of right answers, transcriptions included.
        accuracy: task -> share of right answers.
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
        """The figures for JSON."""
        return asdict(self)


def score(answers: Sequence[Answer]) -> Scores:
    """Count right answers and wrong digits."""
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
    """Edit distance over digits, all transcriptions together; None where no digit was spoken.

    What a model writes beside digits does not count here.
    """
    pairs = [(re.findall(r"[0-9]", a.expected), re.findall(r"[0-9]", a.said)) for a in answers]
    spoken = sum(len(expected) for expected, _ in pairs)
    return sum(edit_distance(*pair) for pair in pairs) / spoken if spoken else None


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that make `b` of `a` (Levenshtein)."""
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
        ValueError: the record has no task that is known.
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
