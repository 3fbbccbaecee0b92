"""Training records: JSONL lines, checked, with their conversation or prompt, answers and clip files."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from qwen2audio_jax.config.strict_json import describe, without_nulls
from qwen2audio_jax.config.unknown_keys import could_matter
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.conversation import Conversation, read_conversation
from qwen2audio_jax.processing.json_lines import parse_line
from qwen2audio_jax.train.other_forms import as_record

MARKER = "<audio>"
"""Placeholder for the next of a record's `audios` in a content that is a string."""
_MARKED = re.compile(r"(?<!\\)<audio>")
_LITERAL = "\\" + MARKER

INERT = ("id", "task", "meta", "digits")
"""Keys that training ignores: an id for messages, and data for evaluations."""
CHAT_KEYS, RAW_KEYS, PAIR_KEYS = ("messages",), ("prompt", "response"), ("chosen", "rejected")
KEYS = (*CHAT_KEYS, *RAW_KEYS, *PAIR_KEYS, "audios", *INERT)
SAYING = re.compile(
    r"answer|aud|caption|chosen|clip|completion|content|conversation|file|history|image|input|instruction|label|loss"
    r"|message|output|path|prompt|query|question|reject|response|reward|role|sentence|sound|system|target|text|tool"
    r"|transcri|turn|video|wav|weight"
)
"""Words of keys that say something of what is heard, asked or learnt."""


@dataclass(frozen=True)
class Record:
    """One line, checked.

    Attributes:
        id: its own id, else file and line.
        where: "file:line", the prefix of messages about it.
        chat: the conversation, without the answers of a pair; None in the raw form.
        prompt: the raw form's, with its control tokens written out; None in the chat form.
        answers: the raw form's response, or a pair's chosen and rejected ones; none if `chat` holds the answers.
        clips: paths of the clips, in order.
        unlearnt: indices of the chat's answers that are not in the loss.
    """

    id: str
    where: str
    chat: Conversation | None
    prompt: str | None
    answers: tuple[str, ...]
    clips: tuple[str, ...]
    unlearnt: frozenset[int] = frozenset()


def read_record(line: bytes, *, where: str, audio_root: str | PathLike[str], preferences: bool) -> Record:
    r"""Read one line of a JSONL file as a record.

    The forms, each with `audios` if it has clips:
    - `messages` of role and content, ending with the assistant's. A content is a string, in which every `<audio>`
      stands for the next clip (where there is none in any message, the clips go before the first user message's text),
      or a list of text and audio items (see `read_conversation`); an audio item without a source takes the next clip.
      In a string `\<audio>` is the word itself, and so is `<audio>` in the assistant's messages, which hold no clips.
    - `prompt` and `response`: text for a base model, with its control tokens written out.
    - for preferences `messages` that end with the user's, or `prompt`, and `chosen` and `rejected` answers.
    - what ms-swift, LLaMA-Factory and TRL read: see `other_forms`.

    Users' and assistants' messages may come in any order. A message's `loss` (or `weight`) of false or 0 keeps an
    answer of the assistant's out of the loss.

    Args:
        line: JSON.
        where: "file:line".
        audio_root: base folder of relative paths.
        preferences: whether pairs are expected, or single answers.

    Raises:
        ValueError: the record is invalid; the message begins with `where`.
    """
    try:
        return _read(line, where=where, audio_root=audio_root, preferences=preferences)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read(line: bytes, *, where: str, audio_root: str | PathLike[str], preferences: bool) -> Record:
    value = parse_line(line)
    if not isinstance(value, dict):
        raise ValueError(f"{describe(value)} is no record; write an object with messages or a prompt")
    value = as_record(without_nulls(value))
    if unknown := [key for key, said in value.items() if _matters(key, said)]:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}; anything else belongs under 'meta'")
    if ("messages" in value) == ("prompt" in value):
        raise ValueError("a record has either messages or a prompt")
    _check_answers(value, preferences=preferences)
    audios = _paths(value.get("audios", []), root=audio_root)
    answers = tuple(_text(value, key) for key in (PAIR_KEYS if preferences else RAW_KEYS[1:]) if key in value)
    if preferences and answers[0] == answers[1]:
        raise ValueError("chosen and rejected are the same text; leave the record out")
    if "prompt" in value:
        chat, prompt, clips, unlearnt = None, _text(value, "prompt"), audios, frozenset[int]()
    else:
        messages, unlearnt = _without_losses(value["messages"])
        chat, prompt = _read_chat(messages, audios, preferences=preferences), None
        clips = _paths([clip.source for clip in chat.clips], root=audio_root)
    if len(clips) > LIMITS.clips_per_text:
        raise ValueError(f"{len(clips)} clips; the limit is {LIMITS.clips_per_text}. Split the record")
    id = value.get("id", where)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"id is {describe(id)}; it must be text or a whole number")
    return Record(str(id), where, chat, prompt, answers, clips, unlearnt)


def _matters(key: str, said: Any) -> bool:
    """Whether a key that is not read could be meant to be; what a table notes of a record besides could not."""
    return key not in KEYS and could_matter(key, said, known=KEYS, words=SAYING)


def _check_answers(value: Mapping[str, Any], *, preferences: bool) -> None:
    pair = [key for key in PAIR_KEYS if key in value]
    if preferences and (len(pair) < 2 or "response" in value):
        raise ValueError("learning from preferences needs chosen and rejected, and no response")
    if pair and not preferences:
        raise ValueError(f'{pair[0]!r} belongs to preferences; set objective.kind = "dpo", or write the answer alone')
    if "prompt" in value and not preferences and "response" not in value:
        raise ValueError("the prompt has no response; add one")
    if "messages" in value and "response" in value:
        raise ValueError("response belongs to prompt; the last of the messages is the answer")


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value[key]
    # A transcript of silence is empty, and an immediate end of the response is a valid target.
    if not isinstance(text, str) or not (text or key == "response"):
        raise ValueError(f"{key} is {describe(text)}; it must be text{', and not empty' * (key != 'response')}")
    return text


def _paths(sources: Any, *, root: str | PathLike[str]) -> tuple[str, ...]:
    """The absolute paths of the clips."""
    if not isinstance(sources, list):
        raise ValueError(f"audios is {describe(sources)}; it must be a list of paths")
    for source in sources:
        if not isinstance(source, str) or not source or "\0" in source:
            raise ValueError(f"the clip {describe(source)} is no path; training reads clips from files")
        if "://" in source[:32] or source[:5].lower() == "data:":
            raise ValueError(f"the clip {describe(source)} is an address; download it and give its path")
    return tuple(os.path.join(root, os.path.expanduser(source)) for source in sources)


def _without_losses(messages: Any) -> tuple[Any, frozenset[int]]:
    """The messages without their `loss` and `weight`, and the indices of the answers that these keep out."""
    out, kept = set(), []
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        for key in ("loss", "weight") if isinstance(message, dict) else ():
            if key not in message:
                continue
            value = message[key]
            if value not in (0, 1):
                raise ValueError(f"messages[{i}]: {key} is {describe(value)}; it must be true or false, or 1 or 0")
            if not value and message.get("role") == "assistant":
                out.add(i)
            message = {name: part for name, part in message.items() if name != key}
        kept.append(message)
    answers = {i for i, message in enumerate(kept) if isinstance(message, dict) and message.get("role") == "assistant"}
    if out and out == answers:
        raise ValueError("no answer is in the loss, so that there is nothing to learn; leave the record out")
    return (kept if isinstance(messages, list) else messages), frozenset(out)


def _read_chat(messages: Any, audios: Sequence[str], *, preferences: bool) -> Conversation:
    _check_roles(messages, preferences=preferences)
    if not any(map(_places, messages)):
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        content = messages[first]["content"]
        items = [{"type": "text", "text": _literal(content)}] if isinstance(content, str) else content
        if audios and isinstance(items, list):
            front = [{"type": "audio", "audio": path} for path in audios]
            messages = [*messages]
            messages[first] = {**messages[first], "content": [*front, *items]}
            audios = ()
    chat = read_conversation(_fill(messages, audios))
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            _check_answer(message["content"], where=f"messages[{i}]")
    return chat


def _places(message: Mapping[str, Any]) -> int:
    """The number of clips that a message takes from `audios` or names itself."""
    content = message["content"]
    if isinstance(content, str):
        return 0 if message["role"] == "assistant" else len(_MARKED.findall(content))
    items = content if isinstance(content, list) else []
    texts = sum(not isinstance(item, Mapping) or item.get("type") == "text" or "text" in item for item in items)
    return len(items) - texts


def _fill(messages: Sequence[Mapping[str, Any]], audios: Sequence[str]) -> list[dict[str, Any]]:
    """The messages with their placeholders filled with the clips."""
    filled, taken = [], 0

    def take() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "audio", "audio": audios[taken - 1] if taken <= len(audios) else None}

    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            first, *rest = [content] if message["role"] == "assistant" else _MARKED.split(content)
            items = [{"type": "text", "text": first}] if first else []
            for text in rest:
                items += [take(), {"type": "text", "text": text}] if text else [take()]
            content = [{**item, "text": _literal(item["text"])} if "text" in item else item for item in items]
            content = content if rest else _literal(first)
        elif isinstance(content, list):
            content = [take() if item == {"type": "audio"} else item for item in content]
        filled.append({**message, "content": content})
    if taken != len(audios):
        raise ValueError(
            f"{taken} places that wait for a clip ({MARKER}, or audio items without a path), but {len(audios)} audios; "
            f"the word itself is written {json.dumps(_LITERAL)} in JSON, or in a content that is a list of text items"
        )
    return filled


def _literal(text: str) -> str:
    return text.replace(_LITERAL, MARKER)


def _check_roles(messages: Any, *, preferences: bool) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {describe(messages)}; it must be a list of messages, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] is {describe(message)}; a message has a role and a content")
        if extra := set(message) - {"role", "content"}:
            raise ValueError(f"messages[{i}] has the unknown key {sorted(extra)[0]!r}; it has a role and a content")
        if missing := {"role", "content"} - set(message):
            raise ValueError(f"messages[{i}] has no {sorted(missing)[0]}")
        role = message["role"]
        if role not in ("user", "assistant") and not (i == 0 and role == "system"):
            raise ValueError(
                f"messages[{i}] has the role {describe(role)}; behind a system message there are user and assistant"
            )
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the messages hold none of the user, so that there is nothing to answer")
    last = messages[-1]["role"]
    if preferences and last != "user":
        raise ValueError(
            f"the messages end with {describe(last)}; before chosen and rejected they must end with the user's"
        )
    if not preferences and last != "assistant":
        raise ValueError(
            f"the messages end with {describe(last)}; without the assistant's answer there is nothing to learn"
        )


def _check_answer(content: Any, *, where: str) -> None:
    if isinstance(content, str):
        texts, clips = [content], 0
    else:
        texts = [item["text"] for item in content if item["type"] == "text"]
        clips = len(content) - len(texts)
    if clips:
        raise ValueError(f"{where} is an answer with a clip; clips belong into the messages of the user")
    if not any(texts):
        raise ValueError(f"{where} is an empty answer; leave the record out, or write what is to be learnt")
