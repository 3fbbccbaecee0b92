"""Grammars: answers that are one of several choices, match a regular expression, or are JSON of a schema.

The library llguidance (extra: `grammars`) says which tokens may come next, one bit a token. These bits go to the device
with each step, so that another grammar is no other program. Constrained and free rows share a batch.
"""

import json
import weakref
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qwen2audio_jax.limits import LIMITS

if TYPE_CHECKING:
    from llguidance import LLTokenizer

BITS = 32
FIELDS = ("choices", "regex", "json_schema")
_tokenizers: "weakref.WeakKeyDictionary[Any, dict[Any, LLTokenizer]]" = weakref.WeakKeyDictionary()


class GrammarError(ValueError):
    """Error: a grammar cannot be used, or not any further."""

    kind = "input"


class Tokenizer(Protocol):
    """The tokenizer interface for grammars: a processor's tokenizer."""

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        ...


def available() -> bool:
    """Whether the library is installed."""
    return find_spec("llguidance") is not None


def check_choices(value: Any) -> tuple[str, ...] | None:
    """The choices as a tuple; None for none.

    Raises:
        ValueError: no texts, or the same one twice.
    """
    if value is None:
        return None
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"choices={value!r}: give a list of texts, none of them empty")
    if len(set(found)) != len(found):
        raise ValueError(f"choices={value!r}: the same text is there twice")
    return _short("choices", found)


def check_regex(value: Any) -> str | None:
    """The regular expression; None for none.

    Raises:
        ValueError: no text.
    """
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"regex={value!r}: give a regular expression that the whole answer is to match")
    return _short("regex", value)


def check_schema(value: Any) -> str | None:
    """The JSON schema as text; None for none.

    Raises:
        ValueError: no JSON object.
    """
    if value is None:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if not isinstance(found, Mapping):
            raise ValueError("it is no object")
        return _short("json_schema", json.dumps(found, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"json_schema cannot be read ({error}): give an object, such as {{'type': 'object'}}"
        ) from None


def _short(name: str, value: Any) -> Any:
    size = sum(map(len, value)) if isinstance(value, tuple) else len(value or "")
    if size > LIMITS.grammar_characters:
        raise ValueError(f"{name} has {size} characters, and a grammar at most {LIMITS.grammar_characters}: shorten it")
    return value


def grammar_of(*, choices: Sequence[str] | None, regex: str | None, json_schema: str | None) -> str | None:
    """The grammar in llguidance's own words; None without any.

    Raises:
        ValueError: the library is missing.
    """
    if choices is None and regex is None and json_schema is None:
        return None
    if not available():
        raise ValueError("choices, regex and json_schema need the library llguidance: pip install llguidance")
    # Imported here: few need it.
    from llguidance import LLMatcher

    if choices is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    if regex is not None:
        return LLMatcher.grammar_from_regex(regex)
    # A model may put any number of spaces where they mean nothing, up to its limit of tokens.
    return LLMatcher.grammar_from_json_schema(json_schema or "", overrides={"whitespace_flexible": False})


class GrammarMatcher:
    """The state of one row in its grammar."""

    def __init__(self, grammar: str, tokenizer: "LLTokenizer"):
        """Begin.

        Raises:
            GrammarError: the grammar is wrong, or too complex.
        """
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._check("cannot be used")
        self._next = self._matcher.compute_bitmask()
        self._check("cannot be used")

    def advance(self, token: int) -> None:
        """Take a token of the answer.

        Raises:
            GrammarError: the grammar has become too complex.
        """
        self._matcher.consume_token(token)
        self._check(f"does not allow token {token}")
        self._next = self._matcher.compute_bitmask()
        self._check("gives no next token")

    def fill(self, row: np.ndarray) -> None:
        """Write which tokens may come next into a row [W] uint32 of bits; those beyond the vocabulary stay 0."""
        mask = np.frombuffer(self._next, np.uint32)
        row[:] = 0
        row[: len(mask)] = mask[: len(row)]

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().split())[:200]
            raise GrammarError(f"the grammar of the answer {what} ({why}): simplify it")


def grammar_matchers(
    grammar: str | None, tokenizer: Any, *, rows: int, eos_token_ids: Sequence[int], vocab_size: int
) -> list[GrammarMatcher]:
    """One matcher a row; none without a grammar.

    Args:
        grammar: from `grammar_of`.
        tokenizer: a processor, or its tokenizer.
        rows: of the call.
        eos_token_ids: what ends an answer once the grammar allows it.
        vocab_size: of the model.

    Raises:
        ValueError: no tokenizer, no stop ids, or a wrong grammar.
    """
    if grammar is None:
        return []
    source = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(source, "to_json"):
        raise ValueError("choices, regex and json_schema need tokenizer=: pass the processor")
    if not eos_token_ids:
        raise ValueError("choices, regex and json_schema need a stop id, which ends the answer: give eos_token_id")
    return [GrammarMatcher(grammar, _tokenizer(source, tuple(eos_token_ids), vocab_size)) for _ in range(rows)]


def _tokenizer(source: Any, eos_token_ids: tuple[int, ...], vocab_size: int) -> "LLTokenizer":
    """The library's tokenizer, which takes a second to make."""
    from llguidance import LLTokenizer

    made = _tokenizers.setdefault(source, {})
    key = (eos_token_ids, vocab_size)
    if key not in made:
        made[key] = LLTokenizer(source.to_json(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    return made[key]


def allowed_tokens(matchers: Mapping[int, GrammarMatcher], *, rows: int, width: int) -> np.ndarray:
    """Bits of the tokens that may come next, [rows, W] uint32, W = ceil(width / 32); all in rows without a grammar."""
    allowed = np.full((rows, -(-width // BITS)), np.iinfo(np.uint32).max, np.uint32)
    for row, matcher in matchers.items():
        matcher.fill(allowed[row])
    return allowed
