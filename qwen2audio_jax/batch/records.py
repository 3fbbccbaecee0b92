"""Records of a batch job: one line of JSON each, checked, with the clips in the order of their places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_jax.batch.clips import locate
from qwen2audio_jax.config.strict_json import describe, present
from qwen2audio_jax.engine.clips import Clip
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.conversation import read_conversation
from qwen2audio_jax.processing.json_lines import parse_line

KEYS = ("id", "audio", "prompt", "messages", "options", "meta")


@dataclass(frozen=True)
class Problem:
    """The reason why a record has no answer: `kind` for programs, `message` for people."""

    kind: str
    message: str


@dataclass(frozen=True)
class Record:
    """One record, ready to be answered.

    Attributes:
        id: unique within the job.
        where: "file:line", for messages.
        prompt: text; with audio placeholders in it a raw prompt, else one turn of a chat; None in a conversation.
        messages: of a conversation, its audio items without their sound; None elsewhere.
        clips: the clips, in the order of the audio items or placeholders.
        options: generation options of this record alone.
        meta: plain data that is copied into the result.
        seed: of its draws, from the job and the id.
        problem: set if it cannot be answered.
    """

    id: str
    where: str
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    clips: tuple[Clip, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    meta: Any = None
    seed: int = 0
    problem: Problem | None = None


def line_id(line: bytes) -> str | None:
    """The id that a line states; None if it states none, or none that can be used.

    Raises:
        ValueError: the line is no JSON object.
    """
    value = parse_line(line)
    if not isinstance(value, dict):
        raise ValueError(f"{describe(value)} is no record; write an object with audio, a prompt or messages")
    id = value.get("id")
    return str(id) if type(id) in (str, int) and id != "" else None


def read_record(line: bytes, *, id: str, where: str, root: str, prompt: str | None) -> Record:
    """The record in a line; what is wrong with it is its `problem`, with the line's place.

    Forms: {"id", "audio": path or list, "prompt"} and {"id", "messages"}, in which audio items without a source take
    the clips of `audio` in order; either with `options` and `meta`. A key that is null is not there.

    Args:
        line: JSON.
        id: of the record, from `line_id` or its position.
        where: "file:line".
        root: folder, or URL of one, that relative paths start from.
        prompt: for records that have neither prompt nor messages; None: their clips are the message.
    """
    try:
        return _read(line, id=id, where=where, root=root, default=prompt)
    except ValueError as error:
        return Record(id, where, problem=Problem("record", f"{where}: {error}"))


def _read(line: bytes, *, id: str, where: str, root: str, default: str | None) -> Record:
    value = parse_line(line)
    if not isinstance(value, dict):
        raise ValueError(f"{describe(value)} is no record; write an object with audio, a prompt or messages")
    value = present(value)
    if unknown := [key for key in value if key not in KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}; anything else belongs under 'meta'")
    if "id" in value and (type(value["id"]) not in (str, int) or value["id"] == ""):
        raise ValueError(f"id is {describe(value['id'])}; it must be text or a whole number")
    options = value.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"options is {describe(options)}; it must be an object such as {{'max_new_tokens': 20}}")
    audio = value.get("audio", [])
    sources = audio if isinstance(audio, list) else [audio]
    clips = tuple(locate(source, root=root) for source in sources)
    prompt, messages = value.get("prompt"), None
    if "messages" in value:
        if "prompt" in value:
            raise ValueError("a record has either messages or a prompt")
        messages, clips = _read_messages(value["messages"], clips, root=root)
    else:
        prompt = default if prompt is None else prompt
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt is {describe(prompt)}; it must be text")
        if not prompt and not clips:
            raise ValueError("there is neither audio nor a prompt")
    if len(clips) > LIMITS.clips_per_text:
        raise ValueError(f"{len(clips)} clips; the limit is {LIMITS.clips_per_text}. Split the record")
    return Record(id, where, prompt or None, messages, clips, options, value.get("meta"))


def _read_messages(messages: Any, given: Sequence[Clip], *, root: str) -> tuple[list[dict[str, Any]], tuple[Clip, ...]]:
    """The messages, their audio items without sources, and all clips in order; `given` ones fill what names none."""
    if not isinstance(messages, list):
        raise ValueError(f"messages is {describe(messages)}; it must be a list of messages")
    chat, clips, rest = read_conversation(messages), [], list(given)
    for clip in chat.clips:
        if clip.source is None and not rest:
            raise ValueError(f"{clip.where} names no sound, and 'audio' has no clip for it")
        clips.append(rest.pop(0) if clip.source is None else locate(clip.source, root=root))
    if rest:
        raise ValueError(f"'audio' has {len(rest)} clips more than the messages have audio items without a source")
    plain = [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [item if item["type"] == "text" else {"type": "audio"} for item in message["content"]],
        }
        for message in chat.messages
    ]
    return plain, tuple(clips)
