"""Encoding of records to token ids and loss masks: only answers and their end token are trained on."""

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.processing.chat_encoding import encode_chat, render_chat
from qwen2audio_jax.processing.chat_template import ChatTemplate
from qwen2audio_jax.processing.control_tokens import END_OF_TEXT
from qwen2audio_jax.processing.conversation import Conversation
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.train.records import Record

CACHED_TURNS = 4096
"""Number of cached encodings of conversation prefixes: data sets often repeat a question."""


@dataclass(frozen=True)
class Segment:
    """One sequence, before its clips' lengths are known.

    Attributes:
        ids: [T] int32, with one placeholder for each clip.
        learnt: [T] bool, tokens in the loss.
    """

    ids: np.ndarray
    learnt: np.ndarray


class ExampleEncoder:
    """Encoder of records, consistent with the processor's encoding of conversations and prompts."""

    def __init__(self, processor: Qwen2AudioProcessor):
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._template = ChatTemplate(processor.chat_template)
        self._turns: OrderedDict[tuple[str, bool], np.ndarray] = OrderedDict()
        end = END_OF_TEXT if END_OF_TEXT in self._tokenizer.control_tokens else self._tokenizer.eos_token
        if end is None:
            raise ValueError(f"the tokenizer names no eos_token and has no {END_OF_TEXT}: responses could not end")
        self._end = self._tokenizer.control_tokens[end].id

    def encode(self, record: Record) -> list[Segment]:
        """The sequences of a record: one, or the chosen and the rejected one of a pair.

        Raises:
            ValueError: placeholders do not match the clips, or the start or end of an answer cannot be found in the
                template's output; the message begins with the record's position.
        """
        try:
            if record.chat is None:
                segments = [self._raw(record.prompt or "", answer) for answer in record.answers]
            else:
                turns = [{"role": "assistant", "content": answer} for answer in record.answers]
                chats = [Conversation([*record.chat.messages, turn], record.chat.clips) for turn in turns]
                segments = [self._chat(chat, unlearnt=record.unlearnt) for chat in chats or [record.chat]]
            for segment in segments:
                self._check_clips(segment, clips=len(record.clips))
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        return segments

    def _raw(self, prompt: str, answer: str) -> Segment:
        """Encode prompt and response separately, as in generation."""
        before, after = self._tokenizer.encode(prompt), [*self._tokenizer.encode(answer), self._end]
        learnt = np.arange(len(before) + len(after)) >= len(before)
        return Segment(np.asarray(before + after, np.int32), learnt)

    def _chat(self, chat: Conversation, *, unlearnt: Collection[int]) -> Segment:
        ids = self._encode_turns(chat, len(chat.messages), prompt=False)
        learnt = np.zeros(len(ids), bool)
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant" or i in unlearnt:
                continue
            before = self._encode_turns(chat, i, prompt=True)
            upto = self._encode_turns(chat, i + 1, prompt=False)
            for part in (before, upto):
                if len(part) > len(ids) or not np.array_equal(part, ids[: len(part)]):
                    raise ValueError(
                        f"messages[{i}]: the tokens before or of this answer are others when the conversation ends "
                        "there, so that what is learnt would not be what is generated. Remove white space around the "
                        "answer, or use a chat template that writes every turn as if it were the last"
                    )
            control = np.isin(upto[len(before) :], list(self._tokenizer.all_special_ids))
            if control.sum() != 1:
                raise ValueError(
                    f"messages[{i}]: the chat template writes {control.sum()} control tokens in this answer; exactly "
                    "one, which ends it, can be learnt"
                )
            learnt[len(before) : len(before) + int(control.argmax()) + 1] = True
        return Segment(ids, learnt)

    def _encode_turns(self, chat: Conversation, count: int, *, prompt: bool) -> np.ndarray:
        """Ids of the first `count` messages, with the start of an answer if it is a prompt."""
        messages = chat.messages[:count]
        key = (json.dumps(messages), prompt)
        if (found := self._turns.get(key)) is not None:
            self._turns.move_to_end(key)
            return found
        variables: Mapping[str, Any] = {
            **self._tokenizer.special_tokens_map,
            "add_generation_prompt": prompt,
            "tools": None,
            "documents": None,
        }
        rendered = render_chat(
            Conversation(messages, []), template=self._template, tokenizer=self._tokenizer, variables=variables
        )
        ids = encode_chat(rendered, tokenizer=self._tokenizer)
        self._turns[key] = ids
        if len(self._turns) > CACHED_TURNS:
            self._turns.popitem(last=False)
        return ids

    def _check_clips(self, segment: Segment, *, clips: int) -> None:
        placeholder = segment.ids == self._processor.audio_token_id
        if placeholder.sum() != clips:
            raise ValueError(
                f"{clips} clips, but {placeholder.sum()} {self._processor.audio_token} placeholders in the text; there "
                "must be one for each clip"
            )
        if (placeholder & segment.learnt).any():
            raise ValueError(f"the answer holds {self._processor.audio_token}; clips belong before it")


def expand(ids: np.ndarray, learnt: np.ndarray, frames: np.ndarray, *, audio_token_id: int) -> tuple[np.ndarray, ...]:
    """Expand a sequence to one placeholder for every audio vector.

    Args:
        ids: [T] int32.
        learnt: [T] bool.
        frames: [A] int32, valid frames of its clips.
        audio_token_id: the placeholder.

    Returns:
        ids [T'] int32; targets [T'] int32, the next token if it is in the loss, else -100; places [T'] bool, the audio
        positions.
    """
    copies = np.ones(len(ids), np.int64)
    copies[ids == audio_token_id] = token_count(frames)
    ids, learnt = np.repeat(ids, copies), np.repeat(learnt, copies)
    targets = np.full(len(ids), -100, np.int32)
    targets[:-1][learnt[1:]] = ids[1:][learnt[1:]]
    return ids, targets, ids == audio_token_id
