"""Guides: what steers the tokens of a row from the host, its grammar and the words that are expected.

What they say goes to the device with each step, in arrays of one size. So another guide is no other program, and rows
with and without one share a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.grammars import GrammarMatcher, allowed_tokens, grammar_matchers
from qwen2audio_jax.generation.hotwords import HotwordMatcher, hotword_matchers, preferred_tokens


@dataclass
class Guide:
    """The guide of one row.

    Attributes:
        grammar: the state of its grammar; None without one.
        words: the state of the expected words; None without any.
    """

    grammar: GrammarMatcher | None = None
    words: HotwordMatcher | None = None

    def advance(self, token: int) -> None:
        """Take a token of the answer.

        Raises:
            GrammarError: the grammar has become too complex.
        """
        if self.grammar is not None:
            self.grammar.advance(token)
        if self.words is not None:
            self.words.advance(token)


class Guidance(NamedTuple):
    """What the guides say of the next tokens of B rows.

    Attributes:
        allowed: [B, W] uint32, a bit for each token that a row's grammar allows.
        preferred: [B, K] int32, different ids whose scores rise; those beyond the logits are none.
        bonus: [B, K] float32, by how much.
    """

    allowed: jax.Array | np.ndarray
    preferred: jax.Array | np.ndarray
    bonus: jax.Array | np.ndarray


def make_guides(config: GenerationConfig, tokenizer: Any, *, rows: int, vocab_size: int) -> list[Guide]:
    """One guide a row; none where nothing steers.

    Args:
        config: of the rows.
        tokenizer: a processor, or its tokenizer.
        rows: of the call.
        vocab_size: of the model.

    Raises:
        ValueError: no tokenizer, no stop ids, a wrong grammar, or a word that is too long.
    """
    grammars = grammar_matchers(
        config.grammar, tokenizer, rows=rows, eos_token_ids=config.eos_token_id, vocab_size=vocab_size
    )
    words = hotword_matchers(config.hotwords, config.hotword_bonus, tokenizer, rows=rows)
    if not grammars and not words:
        return []
    return [Guide(grammars[row] if grammars else None, words[row] if words else None) for row in range(rows)]


def guidance(guides: Mapping[int, Guide], *, rows: int, width: int) -> Guidance:
    """What the guides of some rows say of their next tokens; in other rows all is allowed and nothing preferred.

    Args:
        guides: by row.
        rows: B.
        width: of the logits.
    """
    grammars = {row: guide.grammar for row, guide in guides.items() if guide.grammar is not None}
    words = {row: guide.words for row, guide in guides.items() if guide.words is not None}
    allowed = allowed_tokens(grammars, rows=rows, width=width)
    return Guidance(allowed, *preferred_tokens(words, rows=rows, width=width))
