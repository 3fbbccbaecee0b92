"""Control tokens: strings that a checkpoint's files map to one id wherever they occur."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qwen2audio_jax.config.strict_json import describe

END_OF_TEXT = "<|endoftext|>"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class ControlToken:
    """A string that the tokenizer maps to one id wherever it occurs."""

    content: str
    id: int
    special: bool
    """True if `skip_special_tokens` removes it."""


def control_pattern(contents: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds these control tokens like the tokenizer: the leftmost first, among those the longest."""
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def declared_tokens(settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder` in the values of tokenizer_config.json, by id.

    Raises:
        ValueError: it is no object of such tokens; the message names the entry.
    """
    declared = settings.get("added_tokens_decoder") or {}
    where = "tokenizer_config.json: added_tokens_decoder"
    if not isinstance(declared, Mapping):
        raise ValueError(f"{where} is {describe(declared)}; it must be an object that gives ids their tokens")
    found = {}
    for key, value in declared.items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise ValueError(f"{where} has the key {describe(key)}; its keys must be ids, as in tokenizer.json")
        if not isinstance(value, Mapping) or token_text(value, where=f"added_tokens_decoder[{key}]") is None:
            raise ValueError(f'{where}[{key}] is {describe(value)}; it must be an object with a "content"')
        flags = {name: value[name] for name in FLAGS if value.get(name) is not None}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{where}[{key}]: {name} is {describe(flag)}; it must be true or false")
        found[int(key)] = AddedToken(value["content"], **{"special": False, **flags})
    return dict(sorted(found.items()))


def add_declared_tokens(tokenizer: Tokenizer, declared: Mapping[int, AddedToken]) -> None:
    """Add declared tokens that tokenizer.json lacks or holds as ordinary ones."""
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for wanted, token in declared.items():
        if token.content not in present or (token.special and not present[token.content].special):
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if (id := tokenizer.token_to_id(token.content)) != wanted:
            raise ValueError(
                f"tokenizer_config.json: added_tokens_decoder gives {token.content!r} the id {wanted}, tokenizer.json "
                f"{id}; take both files from the same checkpoint"
            )


def token_text(value: Any, *, where: str) -> str | None:
    """The text of a token, given as a string or as the fields of an AddedToken."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: {where} is {describe(value)}; it must be a token's string")
    return text


def as_special(token: AddedToken) -> AddedToken:
    """The same token as one that `skip_special_tokens` removes."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
