"""Requests for chats in OpenAI's protocol, checked and turned into requests of the engine."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.config.strict_json import describe, present
from qwen2audio_jax.engine.request import Request
from qwen2audio_jax.generation.hotwords import check_hotwords
from qwen2audio_jax.processing.conversation import INERT_KEYS
from qwen2audio_jax.serve.asked_task import asked_task, request_of
from qwen2audio_jax.serve.constraints import constraint
from qwen2audio_jax.serve.errors import ApiError, bad
from qwen2audio_jax.tasks.task import Task

MOST_ANSWERS = 16
"""Answers to one request (`n`)."""
MOST_STOPS = 16
NEW_TOKENS = 256
"""Of an answer whose request states no limit; a task has its own."""
MOST_DEPTH = 32
"""Objects and lists of a body within each other."""
MOST_VALUES = 100_000
"""Commas, brackets and braces of a body: far more than any conversation has that fits a model."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Parameters that are taken at values that change nothing."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Parameters that say nothing about the answer."""
ECHOES = ("refusal", "audio", "function_call", "tool_calls", "annotations")
"""Keys of answers, empty in ours, that clients send back in later turns."""
INSTEAD = {
    "frequency_penalty": "use repetition_penalty",
    "presence_penalty": "use repetition_penalty",
    "top_logprobs": "logprobs gives those of the answer's own tokens",
}


@dataclass(frozen=True)
class Chat:
    """A request for chat completions.

    Attributes:
        requests: one for each answer.
        stream: whether pieces are sent as they come.
        usage: whether the stream ends with the numbers of tokens.
        logprobs: whether tokens come with their log-probabilities.
        stops: strings that end the text and are left out of it.
        task: what is asked about the sound, where the request names one.
    """

    requests: list[Request]
    stream: bool
    usage: bool
    logprobs: bool
    stops: tuple[str, ...]
    task: Task | None = None


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        ApiError: there is none, or one that is made to cost time and memory.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise bad(f"the body's JSON has more than {MOST_VALUES} values")
    try:
        value = json.loads(body)
    except RecursionError:
        raise bad(f"the body's JSON is nested more than {MOST_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise bad(f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # not UTF-8, or a number of thousands of digits
        raise bad("the body is no JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise bad(f"the body is {describe(value)}; it must be an object")
    _check_depth(value)
    return value


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise bad(f"the body's JSON is nested more than {MOST_DEPTH} deep")


def read_chat(body: Mapping[str, Any], *, model: str, kind: str) -> Chat:
    """Check the body of /v1/chat/completions; `kind` is the model's, as tasks have it.

    Raises:
        ApiError: a value that cannot be used, or an unknown name.
    """
    found = _Fields(body)
    check_model(found.take("model", str, None), model=model)
    messages = [_message(message, index) for index, message in enumerate(found.take("messages", list, None) or [])]
    if not messages:
        raise bad("messages is missing; write a list with at least one message", param="messages")
    options = _options(found) | constraint(
        {
            **{name: found.take(name, dict, None) for name in ("response_format", "structured_outputs")},
            "guided_choice": found.take("guided_choice", list, None),
            "guided_regex": found.take("guided_regex", str, None),
            "guided_json": found.take("guided_json", (dict, str), None),
        }
    )
    if (words := found.take("hotwords", list, None)) is not None:
        options["hotwords"] = _hotwords(words)
    task = asked_task(found.take("task", str, None), found.take("labels", list, None), messages, kind=kind)
    if task is None:
        options.setdefault("max_new_tokens", NEW_TOKENS)
    stops = _stops(found.take("stop", (str, list), None))
    count = found.take("n", int, 1)
    if not 1 <= count <= MOST_ANSWERS:
        raise bad(f"n={count}: 1 to {MOST_ANSWERS} answers are given", param="n")
    if count > 1 and options.get("do_sample") is False:
        raise bad(f"n={count} at temperature 0 would give the same answer each time: raise the temperature", param="n")
    seed = found.take("seed", int, None)
    if seed is not None and not 0 <= seed < 2**32 - MOST_ANSWERS:
        raise bad(f"seed={seed}: give a number from 0 to {2**32 - MOST_ANSWERS - 1}", param="seed")
    stream = found.take("stream", bool, False)
    stream_options = found.take("stream_options", dict, {})
    logprobs = found.take("logprobs", bool, False)
    found.finish()
    if unknown := set(stream_options) - {"include_usage", "include_obfuscation"}:
        raise bad(f"stream_options has no {sorted(unknown)[0]!r}", param="stream_options")
    if stops:
        options["stop_strings"] = stops
    seeds = [None if seed is None else seed + index for index in range(count)]
    requests = [request_of(messages, task, options=options, seed=each) for each in seeds]
    return Chat(requests, stream, bool(stream_options.get("include_usage")), logprobs, stops, task)


def check_model(name: Any, *, model: str) -> None:
    """Raise unless a request names the model that is served, or none."""
    if name is not None and name != model:
        raise ApiError(
            404,
            f"the model {str(name)[:100]!r} is not served here; it is {model!r}",
            param="model",
            code="model_not_found",
        )


class _Fields:
    """The fields of a body, taken one by one."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: Any, default: Any) -> Any:
        value = self._left.pop(name, default)
        wrong = isinstance(value, bool) and kind in (int, float, (int, float))
        if value is not default and (wrong or not isinstance(value, kind)):
            raise bad(f"{name} is {describe(value)}", param=name)
        return value

    def finish(self) -> None:
        for name, value in self._left.items():
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    raise bad(f"{name} is not supported; {INSTEAD.get(name, 'leave it out')}", param=name)
            elif name not in IGNORED:
                raise bad(f"unknown parameter {name[:100]!r}", param=name[:100])


def _hotwords(words: list[Any]) -> tuple[str, ...]:
    try:
        return check_hotwords(words)
    except ValueError as error:
        raise bad(str(error), param="hotwords") from None


def _options(found: _Fields) -> dict[str, Any]:
    options: dict[str, Any] = {}
    number = (int, float)
    temperature, top_p = found.take("temperature", number, None), found.take("top_p", number, None)
    if temperature is not None and not 0 <= temperature <= 2:
        raise bad(f"temperature={temperature}: from 0 to 2", param="temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad(f"top_p={top_p}: above 0, at most 1", param="top_p")
    if temperature is not None:
        options["do_sample"] = temperature > 0
        options |= {"temperature": float(temperature)} if temperature > 0 else {}
    if top_p is not None:
        options["top_p"] = float(top_p)
        options.setdefault("do_sample", True)
    limits = {name: found.take(name, int, None) for name in ("max_tokens", "max_completion_tokens")}
    given = [value for value in limits.values() if value is not None]
    if len(set(given)) > 1:
        raise bad("max_tokens and max_completion_tokens are the same limit; give one", param="max_tokens")
    options |= {"max_new_tokens": given[0]} if given else {}
    for ours, theirs, kind in (
        ("top_k", "top_k", int),
        ("min_p", "min_p", number),
        ("repetition_penalty", "repetition_penalty", number),
        ("no_repeat_ngram_size", "no_repeat_ngram_size", int),
        ("min_new_tokens", "min_tokens", int),
        ("hotword_bonus", "hotword_bonus", number),
    ):
        if (value := found.take(theirs, kind, None)) is not None:
            options[ours] = value
    return options


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value or ())
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= 200 for stop in stops):
        raise bad(f"stop: a text of up to 200 characters, or up to {MOST_STOPS} of them", param="stop")
    return tuple(_text(stop, "stop", param="stop") for stop in stops)


def _message(message: Any, index: int) -> dict[str, Any]:
    """A message whose sound comes with it or from a web address; files of the server are nobody's."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise bad(f"{where} is {describe(message)}; it must be an object with role and content", param="messages")
    message = present(message)
    role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
    if role not in ("system", "user", "assistant"):
        raise bad(f"{where}: the role is {describe(role)}; known are system, user and assistant", param="messages")
    # Clients send an answer back as they got it, with what was empty in it.
    _refuse_others(message, {"role", "content", "name", *(key for key in ECHOES if not message.get(key))}, where)
    content = message.get("content")
    if isinstance(content, list):
        content = [_item(item, f"{where}.content[{place}]") for place, item in enumerate(content)]
    elif not isinstance(content, str):
        raise bad(f"{where}: content is {describe(content)}; it must be text or a list of parts", param="messages")
    return {"role": role, "content": _text(content, where) if isinstance(content, str) else content}


def _item(item: Any, where: str) -> dict[str, Any]:
    item = (
        {key: value for key, value in present(item).items() if key not in INERT_KEYS}
        if isinstance(item, Mapping)
        else {}
    )
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        _refuse_others(item, {"type", "text"}, where)
        return {"type": "text", "text": _text(item["text"], where)}
    if kind in ("input_audio", "audio_url") and isinstance(item.get(kind), Mapping):
        _refuse_others(item, {"type", kind}, where)
        sound = present(item[kind])
        if kind == "input_audio" and isinstance(sound.get("data"), str):
            _refuse_others(sound, {"data", "format"}, f"{where}.input_audio")
            # The sound's own header says what it is, whatever stands here.
            if not isinstance(sound.get("format", ""), str):
                raise bad(
                    f"{where}: input_audio.format is {describe(sound['format'])}; such as 'wav'", param="messages"
                )
            return {"type": "input_audio", "input_audio": {"data": sound["data"], "format": "wav"}}
        url = sound.get("url")
        if kind == "audio_url" and isinstance(url, str) and re.match(r"(https?|data):", url, re.IGNORECASE):
            _refuse_others(sound, {"url"}, f"{where}.audio_url")
            return {"type": "audio_url", "audio_url": {"url": _text(url, where)}}
        if kind == "audio_url":
            raise bad(f"{where}: audio_url.url must be an http(s) or data: URL", param="messages")
    raise bad(
        f'{where}: parts are {{"type": "text", "text"}}, {{"type": "input_audio", "input_audio": {{"data"}}}} and '
        '{"type": "audio_url", "audio_url": {"url"}}',
        param="messages",
    )


def _refuse_others(found: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    if unknown := sorted(set(found) - set(known)):
        raise bad(f"{where} has an unknown key {unknown[0][:100]!r}", param="messages")


def _text(text: str, where: str, *, param: str = "messages") -> str:
    """The text, if it is one: JSON can also write halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad(f"{where} holds half of a surrogate pair, which is no character", param=param) from None
    return text
