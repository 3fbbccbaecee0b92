"""Tasks: prompts and settings as data, from `configs/tasks.toml`. Nothing here needs jax.

A task has an entry for each kind of model that can do it: "base" models are prompted by the text of their training,
"instruct" ones in a chat, and the "embedded" one by the few sentences that it knows.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from qwen2audio_jax.engine.request import Request

HEARD = "<|audio_bos|><|AUDIO|><|audio_eos|>"
"""The place of a clip in a raw prompt."""
QUESTIONS = ("ask", "sound", "music", "voice_chat")
CLASSES = ("emotion", "vocal_sound", "sound_kind", "voice", "choose")
_TAGS = re.compile(r"<\|[^|<>]*\|>")
_INTRODUCED = r"""^[^'"]{0,100}(?:is|says|said|saying|was|:)[:,]? *"""
_QUOTED = re.compile(_INTRODUCED + r"""(?P<mark>['"])(?P<said>.+)(?P=mark)\.?$""", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is asked, ready for a clip.

    Attributes:
        name: of the task.
        kind: of the model.
        form: "raw" (the prompt follows the clip as it is) or "chat".
        prompt: the text.
        language: of the speech, or "from-to" of a translation; None where the task has none.
        verified: whether the prompt is one that the model is known to have learned; else it is made by analogy.
        options: of generation.
        labels: what is shown -> what is scored, of a classification.
        unquote: whether an answer that quotes what was said is the quotation alone.
    """

    name: str
    kind: str
    form: str
    prompt: str
    language: str | None = None
    verified: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    unquote: bool = False

    def text(self, clips: int = 1) -> str:
        """The whole prompt of a raw task with its clips' places; the question alone of a chat."""
        return HEARD * clips + self.prompt if self.form == "raw" else self.prompt

    def request(
        self,
        *clips: Any,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        id: str = "",
        priority: int = 0,
    ) -> Request:
        """The engine's request for one answer about clips; `options` go before the task's own."""
        return Request(
            prompt=self.text(len(clips)) or None,
            clips=clips,
            options={**self.options, **(options or {})},
            seed=seed,
            id=id,
            priority=priority,
        )

    def clean(self, text: str) -> str:
        """An answer without control tokens, white space around it, and what introduces a quotation."""
        text = _TAGS.sub("", text).strip()
        if self.unquote and (found := _QUOTED.match(text)):
            return found["said"].strip()
        return text


@dataclass(frozen=True)
class Gate:
    """The question by which a model says whether there is speech in a clip.

    Attributes:
        task: the question.
        accept: regular expression of answers that say yes.
        always: whether every window is asked about, or doubtful ones alone.
    """

    task: Task
    accept: str
    always: bool

    def accepts(self, text: str) -> bool:
        """Whether an answer says that there is speech."""
        return re.search(self.accept, text, re.IGNORECASE) is not None


@cache
def _data() -> dict[str, Any]:
    file = resources.files("qwen2audio_jax.configs") / "tasks.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def kinds() -> tuple[str, ...]:
    """The kinds of models."""
    return tuple(_data()["kinds"])


def languages() -> tuple[str, ...]:
    """The languages of transcription."""
    return tuple(_data()["languages"])


def task_names(kind: str | None = None) -> tuple[str, ...]:
    """The tasks of a kind of model, or of all."""
    rows = [row["task"] for row in _data()["tasks"] if kind in (None, row["kind"])]
    return tuple(dict.fromkeys(rows))


def find_task(
    name: str,
    *,
    kind: str,
    language: str | None = None,
    question: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
) -> Task:
    """The task of that name for a kind of model.

    Args:
        name: of `task_names`.
        kind: of `kinds`.
        language: of the speech (default: "en"), or "from-to" of a translation (default: "zh-en").
        question: of the task "ask".
        labels: instead of the task's own; the text of each, or what is shown -> its text.

    Raises:
        ValueError: there is none, or it does not take what is given; the message lists what there is.
    """
    check_kind(kind)
    row = next((row for row in _data()["tasks"] if (row["task"], row["kind"]) == (name, kind)), None)
    if row is None:
        there = ", ".join(task_names(kind))
        raise ValueError(f"models of kind {kind!r} have no task {name!r}; they have {there}")
    language, verified = _language(row, language)
    if labels is not None and not labels:
        raise ValueError("labels is empty: give at least two")
    chosen = row.get("labels", {}) if labels is None else labels
    shown = dict(chosen) if isinstance(chosen, Mapping) else {label: label for label in chosen}
    if name in CLASSES and len(shown) < 2:
        raise ValueError(f"the task {name!r} has {len(shown)} labels: give at least two different ones")
    if name == "ask" and not question:
        raise ValueError("the task 'ask' needs a question; 'voice_chat' has none")
    if name != "ask" and question:
        raise ValueError(f"the task {name!r} has a prompt of its own: leave the question out, or use 'ask'")
    source, _, target = (language or "").partition("-")
    filled = {"language": source, "target": row.get("targets", {}).get(target), "labels": _listed(shown)}
    prompt = question if name == "ask" and question else row["prompt"].format(**filled)
    return Task(
        name=name,
        kind=kind,
        form=row["form"],
        prompt=prompt,
        language=language,
        verified=verified,
        options=row["options"],
        labels=shown,
        unquote=row.get("unquote", False),
    )


def check_kind(kind: str) -> None:
    """Raise a ValueError for a kind that is none."""
    if kind not in kinds():
        raise ValueError(f"there is no kind of model {kind!r}; there are {', '.join(kinds())}")


def cutting_of(kind: str) -> dict[str, Any]:
    """How sound is cut for a kind of model: arguments of `windows.Cutting`."""
    check_kind(kind)
    return dict(_data()["kinds"][kind]["cutting"])


def gate_of(kind: str) -> Gate | None:
    """The question by which a kind of model says whether there is speech; None if it has none."""
    check_kind(kind)
    row = _data()["kinds"][kind].get("gate")
    if row is None:
        return None
    options = {"do_sample": False, "max_new_tokens": 16}
    task = Task(
        name="gate", kind=kind, form=row["form"], prompt=row["prompt"], verified=row["verified"], options=options
    )
    return Gate(task, row["accept"], row["ask"] == "always")


def kind_of(source: object, *, vocabulary: int, stops_at_turn: bool) -> str:
    """The kind of a checkpoint, by its name, else by what it says of itself.

    Args:
        source: its path, URL or hub id.
        vocabulary: its number of tokens; published models have 156032, the embedded one 512.
        stops_at_turn: whether its generation ends at the end of a turn of a chat.
    """
    name = str(source).rstrip("/").rpartition("/")[2].lower()
    if vocabulary < 10_000:
        return "embedded"
    if "instruct" in name:
        return "instruct"
    return "instruct" if stops_at_turn and not name.endswith("qwen2-audio-7b") else "base"


def _language(row: Mapping[str, Any], language: str | None) -> tuple[str | None, bool]:
    """The language of a task, and whether its prompt is verified for it."""
    there = row.get("languages")
    if there is None:
        if language is not None:
            raise ValueError(f"the task {row['task']!r} takes no language: leave it out")
        return None, row["verified"]
    chosen = there[0] if language is None else language
    if chosen not in there:
        raise ValueError(
            f"the task {row['task']!r} of models of kind {row['kind']!r} does not have {chosen!r}; it has "
            f"{', '.join(there)}"
        )
    return chosen, chosen in row["verified"]


def _listed(labels: Mapping[str, str]) -> str:
    """Labels in a sentence: a, b or c."""
    *most, last = labels or [""]
    return f"{', '.join(most)} or {last}" if most else last
