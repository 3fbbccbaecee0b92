"""The token with which a chat template ends the assistant's turn, and whether generation stops at it.

Base models that were tuned on chats often keep their own stop id, <|endoftext|>, alone: their answers are right and
then run on to the limit of new tokens, past a <|im_end|> that decoding leaves out.
"""

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from qwen2audio_jax.processing.chat_template import ChatTemplate
from qwen2audio_jax.processing.control_tokens import control_pattern, declared_tokens
from qwen2audio_jax.processing.files import read_processor_files
from qwen2audio_jax.storage.bucket import Folder

logger = logging.getLogger("qwen2audio_jax")

ANSWER = "forty-two"


def end_of_turn(template: str, tokens: Collection[str], variables: Mapping[str, Any]) -> str | None:
    """The first control token that a template writes behind an answer; None if it writes none, or fails.

    Args:
        template: the jinja2 source, untrusted.
        tokens: all control tokens.
        variables: the special tokens by their names, as templates read them.
    """
    for user in ("hello", [{"type": "text", "text": "hello"}]):
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": ANSWER}]
        try:
            rendered = ChatTemplate(template).render(
                {**variables, "messages": messages, "add_generation_prompt": False, "tools": None, "documents": None}
            )
        except ValueError:
            continue
        found = control_pattern(tokens).search(rendered.rpartition(ANSWER)[2])
        if found is not None and ANSWER in rendered:
            return found[0]
    return None


def missing_stop(folder: Folder, *, stops: Collection[int]) -> str | None:
    """What is wrong with a checkpoint's stop ids; None if nothing is, or it has no chat template of its own.

    Args:
        folder: with the processor's files; damaged ones are for those to report that need them.
        stops: the ids that end an answer.
    """
    try:
        files = read_processor_files(folder)
        tokens = _control_tokens(files.tokenizer_json, files.tokenizer_config)
    except (ValueError, OSError, AttributeError, KeyError, TypeError):  # tokenizer.json is not read strictly here
        return None
    if files.chat_template is None:
        return None
    named = {key: value for key, value in files.tokenizer_config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in named.items()}
    end = end_of_turn(files.chat_template, tokens, texts)
    if end is None or tokens[end] in stops:
        return None
    wanted = sorted({*stops, tokens[end]})
    return (
        f"eos_token_id {sorted(stops)} in generation_config.json lacks {end} ({tokens[end]}), with which the chat "
        f'template ends a turn: answers may run on to the limit of new tokens. Write "eos_token_id": {wanted} there'
    )


def warn_of_missing_stop(folder: Folder, *, stops: Collection[int], source: object) -> None:
    """Log a warning if answers of the model from `source` may run on: see `missing_stop`."""
    if (problem := missing_stop(folder, stops=stops)) is not None:
        logger.warning("%s: %s", source, problem)


def _control_tokens(tokenizer_json: str, settings: Mapping[str, Any]) -> dict[str, int]:
    if declared := declared_tokens(settings):
        return {token.content: id for id, token in declared.items()}
    return {token["content"]: token["id"] for token in json.loads(tokenizer_json).get("added_tokens") or []}
