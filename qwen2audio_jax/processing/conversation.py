"""Conversations: messages in any accepted form, checked and normalised for chat templates."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.audio.data_url import decode_base64
from qwen2audio_jax.config.strict_json import describe, present
from qwen2audio_jax.limits import LIMITS, Limits

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
URL = re.compile(r"\s*(data:|https?://)", re.IGNORECASE)
"""What `input_audio.data` holds in DashScope's form of the protocol: base64 in a data: URL, or an address."""
SOURCE_KEYS = ("audio", "audio_url", "url", "path", "input_audio")
INERT_KEYS = ("uuid",)
"""Keys of an item that only its server's cache reads."""
SHOWN_SOURCE = "clip"
"""Placeholder that templates get instead of a clip's source, since they need neither its path nor its bytes."""


@dataclass(frozen=True)
class ClipSource:
    """A clip of a conversation."""

    where: str
    """Its position as a Python index expression: "messages[1]['content'][0]"."""
    source: Any
    """An argument of `load_audio`; None for a placeholder whose audio is passed separately."""


@dataclass(frozen=True)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: for the template: `role`, `content` and any other plain data of the messages. A content is a str, or
            a list of text items {"type": "text", "text"} and audio items {"type": "audio", key: "clip"}.
        clips: the clips in order.
    """

    messages: list[dict[str, Any]]
    clips: list[ClipSource]

    def strings(self) -> Iterator[tuple[str, str]]:
        """Every string of the messages, with the position of its message."""
        for i, message in enumerate(self.messages):
            for text in iter_strings(message):
                yield f"messages[{i}]", text


def is_batch(conversation: Any) -> bool:
    """Return True for a list of conversations; raise a ValueError for anything but a list, or for an empty list."""
    if isinstance(conversation, str | bytes | Mapping) or not isinstance(conversation, Sequence):
        raise ValueError(
            f"a conversation is a list of messages, not {type(conversation).__name__}; write "
            f'[{{"role": "user", "content": "..."}}]'
        )
    if not conversation:
        raise ValueError("the conversation is empty; it needs at least one message")
    return isinstance(conversation[0], Sequence) and not isinstance(conversation[0], str)


def read_conversation(conversation: Any, *, name: str = "messages", limits: Limits = LIMITS) -> Conversation:
    """Check one conversation and separate its clips from its text.

    Args:
        conversation: messages {"role", "content"}; a content is a str or a list of text items {"type": "text", "text"}
            and audio items. An audio item is in the reference's form ({"type": "audio"} with the source under `audio`,
            `audio_url`, `url` or `path`) or in that of chat APIs ({"type": "audio_url", "audio_url": {"url"}} and
            {"type": "input_audio", "input_audio": {"data": base64 or a URL, "format"}}; the sound's own header counts,
            not `format`). A source is a path, an http(s) or data: URL, bytes, a file object or an array. A key that is
            null is not there.
        name: the conversation's name in error messages.
        limits: bounds on messages and clips.

    Raises:
        ValueError: something is missing, unknown or over a limit; the message names its position.
    """
    if is_batch(conversation):
        raise ValueError(f"{name}[0] is a list; a message is a dict with a role and a content")
    if len(conversation) > limits.messages:
        raise ValueError(
            f"{name}: {len(conversation)} messages; the limit is {limits.messages}. Leave out the oldest ones"
        )
    messages, clips = [], []
    for i, message in enumerate(conversation):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {type(message).__name__}; a message is a dict with a role and a content")
        message = present(message)
        result = {key: _plain(value, f"{where}[{key!r}]") for key, value in message.items() if key != "content"}
        role = message.get("role")
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise ValueError(
                f"{where}: the role is {describe(role)}; it must be a word such as system, user or assistant"
            )
        content = message.get("content")
        if isinstance(content, str):
            result["content"] = content
        elif isinstance(content, list | tuple):
            result["content"] = []
            for j, item in enumerate(content):
                shown, clip = _read_item(item, f"{where}['content'][{j}]", limits)
                result["content"].append(shown)
                clips += [clip] if clip else []
        else:
            raise ValueError(
                f"{where}: the content is {'missing' if content is None else type(content).__name__}; it must be a "
                f"str or a list of text and audio items"
            )
        messages.append(result)
    if len(clips) > limits.clips_per_text:
        raise ValueError(f"{name}: {len(clips)} clips; the limit is {limits.clips_per_text}. Split the conversation")
    return Conversation(messages, clips)


def iter_strings(value: Any) -> Iterator[str]:
    """Every string in plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from iter_strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from iter_strings(part)


def map_strings(value: Any, table: dict[int, str]) -> Any:
    """Plain data with `str.translate(table)` applied to every string, keys too."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {key.translate(table): map_strings(part, table) for key, part in value.items()}
    if isinstance(value, list):
        return [map_strings(part, table) for part in value]
    return value


def _read_item(item: Any, where: str, limits: Limits) -> tuple[dict[str, Any], ClipSource | None]:
    """A content item as the template sees it, and its clip if it is an audio item."""
    if not isinstance(item, Mapping):
        raise ValueError(f'{where} is {type(item).__name__}; write text as {{"type": "text", "text": "..."}}')
    given, item = item, {key: value for key, value in present(item).items() if key not in INERT_KEYS}
    kind = item.get("type")
    keys = [key for key in SOURCE_KEYS if key in item]
    if kind not in (None, "text", "audio", "audio_url", "input_audio"):
        raise ValueError(
            f"{where}: the type is {describe(kind)}; an item is of type text or audio (or audio_url or input_audio)"
        )
    if kind == "text" or (kind is None and "text" in item):
        if not isinstance(item.get("text"), str) or keys:
            problem = f"also has {keys[0]!r}" if keys else f"has the text {describe(item.get('text'))}"
            raise ValueError(f"{where}: a text item {problem}; it holds a str under 'text' and no sound")
        _check_keys(item, {"type", "text"}, where)
        return {"type": "text", "text": item["text"]}, None
    if kind is None and not any(key in item for key in ("audio", "audio_url", "input_audio")):
        raise ValueError(
            f"{where} has neither a type nor text nor audio; it has {', '.join(map(repr, given)) or 'no key'}"
        )
    if "text" in item or len(keys) > 1:
        both = "text and sound" if "text" in item else " and ".join(keys)
        raise ValueError(f"{where}: one item holds {both}; write two items")
    _check_keys(item, {"type", *SOURCE_KEYS}, where)
    key = keys[0] if keys else None
    shown = {"type": "audio"} | ({key if key != "input_audio" else "audio_url": SHOWN_SOURCE} if key else {})
    return shown, ClipSource(where, _read_source(key, item[key], where, limits) if key else None)


def _read_source(key: str, value: Any, where: str, limits: Limits) -> Any:
    if key == "input_audio":
        if not isinstance(value, Mapping) or not isinstance(value.get("data"), str | bytes):
            raise ValueError(f'{where}: input_audio must be {{"data": base64 text, "format": "wav"}}')
        _check_keys(present(value), {"data", "format"}, f"{where}['input_audio']")
        data = value["data"]
        if isinstance(data, bytes):  # what b64encode returns, or the sound itself
            if not data.isascii():
                return data
            data = data.decode()
        if URL.match(data):
            return data
        return decode_base64(data, name=f"{where}: input_audio.data", kind="corrupt", limits=limits)
    if isinstance(value, Mapping) and (key != "audio" or "url" in value):
        if not isinstance(value.get("url"), str):
            raise ValueError(f'{where}: {key} is a dict without a url; write {{"url": "..."}} or the source itself')
        _check_keys(present(value), {"url"}, f"{where}[{key!r}]")
        return value["url"]
    return value


def _check_keys(item: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [key for key in item if key not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known here: {', '.join(sorted(known))}")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON-like data, the only kind of data that templates are given."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth < 32 and isinstance(value, list | tuple):
        return [_plain(part, where, depth + 1) for part in value]
    if depth < 32 and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, where, depth + 1) for key, part in value.items()}
    raise ValueError(f"{where} holds {type(value).__name__}; beside its content a message holds plain JSON data only")
