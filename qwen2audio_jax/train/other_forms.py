"""Training records in the forms of other trainers, as records of this one's: see `records.read_record`.

- ms-swift: `query`, `response`, `history`, `system`, `rejected_response`, also beside `messages`; `rejected_messages`.
- LLaMA-Factory: `conversations` of `from` and `value` (ShareGPT), or of `role` and `content`; `instruction`, `input`,
  `output`, `history` (alpaca).
- TRL: `prompt` and `completion`; prompts, completions and answers of pairs as lists of messages.

In all of them `<audio>` stands for the next of `audios`, as here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen2audio_jax.config.strict_json import describe

Fields = dict[str, Any]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Of a ShareGPT turn's `from`."""


def as_record(value: Mapping[str, Any]) -> Fields:
    """The record in this package's form: one in another known form is rewritten, any other returned as it is.

    Raises:
        ValueError: a part of such a form is not what it has to be.
    """
    left = dict(value)
    if "query" in left:
        record = _query(left)
    elif "conversations" in left:
        record = _conversations(left)
    elif "instruction" in left:
        record = _instruction(left)
    else:
        record = _lists(left)
    if "rejected_messages" in left:
        record |= _rejected_messages({**left, **record}, left.pop("rejected_messages"))
    elif "rejected_response" in left:
        record |= _rejected({**left, **record}, left.pop("rejected_response"))
    return {**left, **record}


def _query(left: Fields) -> Fields:
    return _turns(left, question=_text(left, "query"), answer="response")


def _instruction(left: Fields) -> Fields:
    more = _text(left, "input") if "input" in left else ""
    question = "\n".join(filter(None, [_text(left, "instruction"), more]))
    return _turns(left, question=question, answer="output")


def _turns(left: Fields, *, question: str, answer: str) -> Fields:
    """The messages of a form with a question, perhaps a system text and earlier turns, and perhaps an answer."""
    messages = _system(left)
    for pair in left.pop("history", []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history holds {describe(pair)}; it must be pairs of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": question})
    if answer in left:
        messages.append({"role": "assistant", "content": _text(left, answer)})
    return {"messages": messages}


def _conversations(left: Fields) -> Fields:
    turns = left.pop("conversations")
    if not isinstance(turns, list):
        raise ValueError(f"conversations is {describe(turns)}; it must be a list of turns")
    messages = _system(left) + [_turn(turn, where=f"conversations[{i}]") for i, turn in enumerate(turns)]
    pair = {
        key: _turn(left.pop(key), where=key)["content"]
        for key in ("chosen", "rejected")
        if _is_turn(left.get(key)) or _is_message(left.get(key))
    }
    return {"messages": messages, **pair}


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _turn(turn: Any, *, where: str) -> Fields:
    if _is_message(turn):
        return dict(turn)
    if not _is_turn(turn) or set(turn) != {"from", "value"} or turn["from"] not in ROLES:
        raise ValueError(
            f"{where} is {describe(turn)}; a turn has a from ({', '.join(ROLES)}) and a value. Calls of tools are not "
            "read"
        )
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def _system(left: Fields) -> list[Fields]:
    text = left.pop("system", "")
    return [{"role": "system", "content": text}] if text else []


def _lists(left: Fields) -> Fields:
    """TRL's forms: a completion instead of a response, and lists of messages instead of texts."""
    if "completion" in left and "response" not in left:
        left["response"] = left.pop("completion")
    prompt = left.get("prompt")
    if isinstance(prompt, list):
        left.pop("prompt")
        answer = left.pop("response", [])
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return {"messages": [*prompt, *answer], **_last_texts(left, before=[])}
    if isinstance(left.get("chosen"), list) and "messages" not in left and prompt is None:
        before = left["chosen"][:-1]
        return {"messages": before, **_last_texts(left, before=before)}
    return _last_texts(left, before=[])


def _last_texts(left: Fields, *, before: Sequence[Any]) -> Fields:
    """The texts of the pair's answers that are lists of messages; both begin with the messages `before`."""
    found = {}
    for key in ("chosen", "rejected"):
        messages = left.get(key)
        if isinstance(messages, list):
            if (
                len(messages) != len(before) + 1
                or messages[:-1] != list(before)
                or not isinstance(messages[-1], Mapping)
            ):
                raise ValueError(f"{key} must be one answer, behind the same messages as the other")
            found[key] = left.pop(key)[-1].get("content")
    return found


def _rejected(record: Mapping[str, Any], rejected: Any) -> Fields:
    """The pair of ms-swift's form: the last message is the chosen answer."""
    messages = record.get("messages") or []
    if not messages or not isinstance(messages[-1], Mapping) or messages[-1].get("role") != "assistant":
        raise ValueError("rejected_response goes with a response, or with messages that end with the assistant's")
    return {"messages": messages[:-1], "chosen": messages[-1].get("content"), "rejected": rejected}


def _rejected_messages(record: Mapping[str, Any], rejected: Any) -> Fields:
    """The same of whole conversations, which differ in their last message."""
    before = (record.get("messages") or [])[:-1]
    if not isinstance(rejected, list) or rejected[:-1] != before or not _is_message(rejected[-1] if rejected else None):
        raise ValueError("rejected_messages must be the messages with another answer as their last")
    return _rejected(record, rejected[-1]["content"])


def _text(left: Fields, key: str) -> str:
    text = left.pop(key)
    if not isinstance(text, str):
        raise ValueError(f"{key} is {describe(text)}; it must be text")
    return text
