"""What a record of an evaluation expects, read and checked.

Keys beyond those of a batch record (`batch.records`):

- `reference`: text, or a list of texts of which each is right; of transcribe, translate, caption, sound, music,
  voice_chat, and of ask without choices.
- `label`: one of the task's labels, whatever its case; of emotion, vocal_sound, sound_kind, voice, choose.
- `question`: what is asked; of ask, unless the record has a `prompt` or `messages`, which are used as they are.
- `choices`: 2 to 26 different texts, without letters before them, and `answer`: the right one; of ask, which they make
  multiple choice.
- `language`: as the task has it ("en"; "en-de" of a translation); all records state the same one, or none.
- `groups`: {name: text}, by which scores are given apart as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.batch.records import KEYS
from qwen2audio_jax.config.strict_json import describe
from qwen2audio_jax.tasks.task import CLASSES, Task

EXPECTED = ("reference", "label", "question", "choices", "answer", "language", "groups")
"""The keys that a record has beyond those of a batch job."""
MOST_CHOICES = 26
"""Choices of a question: as many as there are letters."""


@dataclass(frozen=True)
class Expected:
    """What one record expects.

    Attributes:
        references: texts of which each is right; none in a classification or a choice.
        label: the right label, as the task spells it.
        question: what is asked, where the record says it and no prompt.
        choices: of a question.
        answer: the right one of them.
        groups: name -> text.
    """

    references: tuple[str, ...] = ()
    label: str | None = None
    question: str | None = None
    choices: tuple[str, ...] = ()
    answer: str | None = None
    groups: Mapping[str, str] | None = None

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "Expected":
        """What stands in the `meta` of a record or row of the job: see `batch_line`."""
        found = meta["expected"]
        lists = {name: tuple(found[name]) for name in ("references", "choices") if name in found}
        return cls(**{**found, **lists})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is not there."""
        return {name: value for name, value in vars(self).items() if value}


def own_meta(row: Mapping[str, Any]) -> Any:
    """The `meta` that a row's record stated; None if it stated none."""
    return row["meta"].get("meta")


def read_expected(value: Any, *, task: Task) -> Expected:
    """What a record expects of a task.

    Raises:
        ValueError: it says so in no usable way; what is missing, or what is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{describe(value)} is no record; write an object with audio and what is expected")
    if unknown := [key for key in value if key not in (*KEYS, *EXPECTED)]:
        raise ValueError(
            f"unknown key {unknown[0]!r}; known are {', '.join((*KEYS, *EXPECTED))}; anything else belongs under 'meta'"
        )
    groups = _groups(value.get("groups"))
    if "language" in value and not (isinstance(value["language"], str) and value["language"]):
        raise ValueError(f"language is {describe(value['language'])}; write a code such as 'en', or 'en-de'")
    if task.name in CLASSES:
        _refuse(value, task, "reference", "question", "choices", "answer")
        return Expected(label=_label(value, task), groups=groups)
    question = _question(value, task)
    if "choices" in value or "answer" in value:
        if task.name != "ask":
            raise ValueError(f"choices and answer belong to the task 'ask', and the task is {task.name!r}")
        _refuse(value, task, "reference", "label")
        choices = _choices(value)
        return Expected(question=question, choices=choices, answer=_answer(value, choices), groups=groups)
    _refuse(value, task, "label")
    return Expected(references=_references(value, task), question=question, groups=groups)


def _refuse(value: Mapping[str, Any], task: Task, *names: str) -> None:
    for name in names:
        if name in value:
            raise ValueError(
                f"{name} is nothing that is expected of {task.name!r} here; leave it out (docs/evaluation.md)"
            )


def _label(value: Mapping[str, Any], task: Task) -> str:
    if "label" not in value:
        raise ValueError(f"there is no label; write the right one of {', '.join(task.labels)}")
    spelled = {label.casefold(): label for label in task.labels}
    label = value["label"]
    if not isinstance(label, str) or label.strip().casefold() not in spelled:
        raise ValueError(f"label is {describe(label)}, and the task {task.name!r} has {', '.join(task.labels)}")
    return spelled[label.strip().casefold()]


def _question(value: Mapping[str, Any], task: Task) -> str | None:
    asked = value.get("question")
    if asked is not None and task.name != "ask":
        raise ValueError(f"a question belongs to the task 'ask', and the task is {task.name!r}")
    if asked is not None and not (isinstance(asked, str) and asked.strip()):
        raise ValueError(f"question is {describe(asked)}; it must be text")
    if asked is not None and ("prompt" in value or "messages" in value):
        raise ValueError("a record has either a question, or a prompt or messages, which are used as they are")
    if task.name == "ask" and asked is None and "prompt" not in value and "messages" not in value:
        raise ValueError("there is no question; write what is asked")
    return asked


def _references(value: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    if "reference" not in value:
        more = ", or choices and answer" if task.name == "ask" else ""
        raise ValueError(f"there is no reference; write the text that is expected, or a list of such texts{more}")
    given = value["reference"]
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"reference is {describe(given)}; it must be text, or a list of texts")
    return tuple(texts)


def _choices(value: Mapping[str, Any]) -> tuple[str, ...]:
    given = value.get("choices")
    choices = [each for each in given if isinstance(each, str) and each.strip()] if isinstance(given, list) else []
    if choices != given or not 2 <= len(set(choices)) == len(choices) <= MOST_CHOICES:
        raise ValueError(f"choices is {describe(given)}; write a list of 2 to {MOST_CHOICES} different texts")
    return tuple(choices)


def _answer(value: Mapping[str, Any], choices: tuple[str, ...]) -> str:
    if value.get("answer") not in choices:
        raise ValueError(f"answer is {describe(value.get('answer'))}; it must be one of the choices, written in full")
    return value["answer"]


def _groups(groups: Any) -> dict[str, str] | None:
    if groups is None:
        return None
    if not isinstance(groups, dict) or not all(isinstance(name, str) for name in groups.values()):
        raise ValueError(f"groups is {describe(groups)}; write an object of texts such as {{'domain': 'music'}}")
    return groups
