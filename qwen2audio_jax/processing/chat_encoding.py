"""Encoding of rendered conversations to token ids, in which only the template writes control tokens.

Rendering loses which characters came from a message. So the conversation is rendered a second time with every character
that could begin a control token replaced, in the messages only, by one that occurs nowhere: a control token found in
that text begins with a character of the template. Where both renderings agree, the text is encoded as a whole, which
gives the reference's ids; where a message holds control text, the text between the template's own control tokens is
encoded with control tokens switched off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2audio_jax.processing.chat_template import ChatTemplate
from qwen2audio_jax.processing.control_tokens import control_pattern
from qwen2audio_jax.processing.conversation import Conversation, map_strings
from qwen2audio_jax.processing.tokenizer import Qwen2AudioTokenizer

PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        text: the template's output.
        control_spans: (start, end) of the control tokens that the template itself wrote.
        has_control_text: whether a message holds a control token, or a part that completes one.
        also_plain: non-special tokens that this template uses as control tokens.
    """

    text: str
    control_spans: list[tuple[int, int]]
    has_control_text: bool
    also_plain: frozenset[str]


def render_chat(
    conversation: Conversation,
    *,
    template: ChatTemplate,
    tokenizer: Qwen2AudioTokenizer,
    variables: Mapping[str, Any],
) -> RenderedChat:
    """Render a conversation and find the control tokens that the template itself wrote.

    Raises:
        ValueError: the template failed, or its output depends on characters such as "<" in the messages, so that
            their text cannot be distinguished from the template's.
    """
    also_plain = frozenset(
        token.content
        for token in tokenizer.control_tokens.values()
        if not token.special and token.content in template.source and not token.content.isspace()
    )
    control = also_plain.union(tokenizer.all_special_tokens)
    pattern = control_pattern(control)
    text = template.render({**variables, "messages": conversation.messages})
    used = set(text).union(template.source, *(part for _, part in conversation.strings()))
    free = (chr(code) for codes in PRIVATE_USE for code in codes if chr(code) not in used)
    hide = {}
    for character in sorted({token[0] for token in control} & used):
        hide[ord(character)] = next(free, "")
    if not all(hide.values()):
        raise ValueError("the messages use every private-use character of Unicode; leave one out")
    show = {ord(hidden): chr(code) for code, hidden in hide.items()}
    messages = map_strings(conversation.messages, hide)
    for _ in range(2):
        hidden = template.render({**variables, "messages": messages})
        if hidden.translate(show) == text:
            break
        # A template may write the time, which may have advanced between the two renderings.
        text = template.render({**variables, "messages": conversation.messages})
    else:
        raise ValueError(
            f"what the chat template writes depends on {' '.join(map(chr, hide))} in the messages, so their text "
            f"cannot be told from control tokens; with allow_special=True messages may write control tokens"
        )
    spans = [match.span() for match in pattern.finditer(hidden)]
    return RenderedChat(text, spans, [match.span() for match in pattern.finditer(text)] != spans, also_plain)


def encode_chat(chat: RenderedChat, *, tokenizer: Qwen2AudioTokenizer) -> np.ndarray:
    """Token ids [T] int32 in which only the template's control tokens are control tokens.

    Raises:
        ValueError: the tokenizer produces a control token for text that holds none.
    """
    control = {chat.text[start:end] for start, end in chat.control_spans}
    if chat.has_control_text:
        ids, position = [], 0
        for start, end in chat.control_spans:
            ids += tokenizer.encode_plain(chat.text[position:start], also_plain=chat.also_plain)
            ids.append(tokenizer.control_tokens[chat.text[start:end]].id)
            position = end
        ids += tokenizer.encode_plain(chat.text[position:], also_plain=chat.also_plain)
    else:
        ids = tokenizer.encode(chat.text)
    control_ids = tokenizer.all_special_ids.union(tokenizer.control_tokens[token].id for token in control)
    found = sum(id in control_ids for id in ids)
    if found != len(chat.control_spans):
        raise ValueError(
            f"the tokenizer found {found} control tokens where the chat template wrote {len(chat.control_spans)}; "
            f"remove what looks like a control token from the messages"
        )
    return np.asarray(ids, np.int32)


def check_no_control_text(conversation: Conversation, chat: RenderedChat, *, tokenizer: Qwen2AudioTokenizer) -> None:
    """Raise a ValueError that names the message if a message of the rendered text writes control tokens."""
    if not chat.has_control_text:
        return
    pattern = control_pattern(chat.also_plain.union(tokenizer.all_special_tokens))
    for where, text in conversation.strings():
        if match := pattern.search(text):
            found = f"{where} holds {match[0]}"
            break
    else:
        found = "parts of the messages join into a control token"
    raise ValueError(
        f"{found}, and the rendered text no longer tells it from the template's own. Use tokenize=True, which keeps it "
        f"text; remove it; or allow it with allow_special=True"
    )
