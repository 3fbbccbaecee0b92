"""Hotwords: words that a caller expects, which the decoder prefers where the sound leaves open what was said.

The words are never in the prompt. They are a tree of their tokens; each row has its places in that tree, on the host,
and every step takes to the device which tokens would begin or continue a word, and by how much their scores rise. That
is an array of one size for any list, so another list is no other program, and rows without one do not change.

Source: contextual biasing by shallow fusion, as the context graphs of k2/icefall and the boosting tree of NeMo have it.
There each token of a word earns a bonus, and all are taken back where the word is abandoned. Here is one path and no
beam, so that taking back from every other token is the same as giving to those that continue the word: they have the
bonuses of the whole word until there.
"""

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qwen2audio_jax.limits import LIMITS

BONUS = 0.5
"""What a word has for each of its tokens, in units of log-probability; see benchmarks/results/hotwords.md."""
MOST = 8
"""Bonuses that add up at most, so that nothing forces the end of a long word that was another one."""
WIDTH = 2 * LIMITS.hotwords + LIMITS.hotword_tokens
"""The most tokens that a row can prefer at once: each word written in two ways begins with one and goes on with one
after another place in the tree, and no more places follow each other than a word has tokens."""
KEPT = 8
"""Trees that are kept for further requests, of each tokenizer."""

_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_trees: "weakref.WeakKeyDictionary[Any, dict[Any, HotwordTree]]" = weakref.WeakKeyDictionary()


class Tokenizer(Protocol):
    """The tokenizer interface for hotwords: a processor's tokenizer."""

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are characters."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        ...


def check_hotwords(value: Any) -> tuple[str, ...]:
    """The words as a tuple without duplicates, white space around them left out; None is none.

    Raises:
        ValueError: no texts, an empty one, more than a line, or more or longer ones than `LIMITS` allows.
    """
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"hotwords={value!r}: give a list of words")
    words = tuple(value)
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"hotwords holds {word!r}: give words, none of them empty")
        if len(word.strip().splitlines()) > 1:
            raise ValueError(f"hotwords holds {word[:80]!r}: a word is one line")
        if len(word.strip()) > LIMITS.hotword_characters:
            raise ValueError(
                f"a hotword of {len(word.strip())} characters is longer than {LIMITS.hotword_characters}: shorten it"
            )
    words = tuple(dict.fromkeys(word.strip() for word in words))
    if len(words) > LIMITS.hotwords:
        raise ValueError(f"{len(words)} hotwords are more than {LIMITS.hotwords}: give those that matter most")
    return words


@dataclass(eq=False)
class _Place:
    """A place in the tree.

    Attributes:
        following: what may follow.
        whole: whether a word ends here.
        weight: bonuses of what leads here from the beginning of the word, or from the end of a shorter one; 0 of a
            space by itself, which more often than not begins something else.
    """

    following: "dict[int, _Place]" = field(default_factory=dict)
    whole: bool = False
    weight: int = 0


class HotwordTree:
    """The tokens of some words, each written with and without a space before it.

    Attributes:
        anywhere: where words begin whose first token has a space, or a letter of a script without spaces.
        apart: where words begin that would be the middle of another one behind a letter.
        free: the tokens that begin a word `anywhere`, with their weights.
        beginnings: those that begin any word.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer):
        """Build.

        Raises:
            ValueError: a word has too many tokens.
        """
        self._tokenizer = tokenizer
        self._joins: dict[int, bool] = {}
        self.anywhere, self.apart = _Place(), _Place()
        for word in words:
            for text in (word, f" {word}"):
                self._add(word, tokenizer.encode_plain(text))
        for root in (self.anywhere, self.apart):
            self._weigh(root, bonuses=0)
        self.free = {token: place.weight for token, place in self.anywhere.following.items()}
        self.beginnings = self.free | {token: place.weight for token, place in self.apart.following.items()}

    def _add(self, word: str, ids: list[int]) -> None:
        # A space by itself is no beginning of a word: preferring it would put off the end of the answer.
        while len(ids) > 1 and self._is_blank(ids[0]):
            ids = ids[1:]
        if len(ids) > LIMITS.hotword_tokens:
            raise ValueError(
                f"the hotword {word!r} has {len(ids)} tokens, and {LIMITS.hotword_tokens} are the most: shorten it"
            )
        place = self.apart if _joins(self._tokenizer.decode(ids[:1])[:1]) else self.anywhere
        for token in ids:
            place = place.following.setdefault(token, _Place())
        place.whole = True

    def _weigh(self, place: _Place, *, bonuses: int) -> None:
        for token, other in place.following.items():
            blank = self._is_blank(token)
            reached = bonuses + (not blank)
            other.weight = 0 if blank else min(reached, MOST)
            self._weigh(other, bonuses=0 if other.whole else reached)

    def _is_blank(self, token: int) -> bool:
        return not self._tokenizer.decode([token]).strip()

    def joins(self, token: int) -> bool:
        """Whether a token ends in a letter or digit that a word does not follow without a space."""
        found = self._joins.get(token)
        if found is None:
            found = self._joins[token] = _joins(self._tokenizer.decode([token])[-1:])
        return found


def _joins(character: str) -> bool:
    """Whether a character makes one word with a letter beside it; none does in scripts without spaces."""
    return character.isalnum() and not _SPACELESS.match(character)


class HotwordMatcher:
    """The places of one row in a tree: of every word that its last tokens may be the beginning of."""

    def __init__(self, tree: HotwordTree, bonus: float):
        """Begin an answer."""
        self._tree, self._bonus = tree, bonus
        self._places: list[_Place] = []
        self._joined = False

    def advance(self, token: int) -> None:
        """Take a token of the answer."""
        roots = (self._tree.anywhere,) if self._joined else (self._tree.anywhere, self._tree.apart)
        self._places = [place.following[token] for place in (*self._places, *roots) if token in place.following]
        self._joined = self._tree.joins(token)

    def fill(self, ids: np.ndarray, bonus: np.ndarray) -> None:
        """Write the tokens that begin or continue a word into a row of ids [K] and their bonuses into one [K]."""
        found = dict(self._tree.free if self._joined else self._tree.beginnings)
        for place in self._places:
            for token, other in place.following.items():
                found[token] = max(found.get(token, 0), other.weight)
        ids[: len(found)] = list(found)
        bonus[: len(found)] = self._bonus * np.asarray(list(found.values()), np.float32)


def hotword_matchers(words: Sequence[str], bonus: float | None, tokenizer: Any, *, rows: int) -> list[HotwordMatcher]:
    """One matcher a row; none without words.

    Args:
        words: from `check_hotwords`.
        bonus: of each token; None: `BONUS`.
        tokenizer: a processor, or its tokenizer.
        rows: of the call.

    Raises:
        ValueError: no tokenizer, or a word has too many tokens.
    """
    if not words:
        return []
    source = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(source, "encode_plain"):
        raise ValueError("hotwords need tokenizer=: pass the processor")
    made = _trees.setdefault(source, {})
    tree = made.get(words)
    if tree is None:
        tree = made[words] = HotwordTree(words, source)
        for old in list(made)[:-KEPT]:
            made.pop(old, None)
    return [HotwordMatcher(tree, BONUS if bonus is None else bonus) for _ in range(rows)]


def preferred_tokens(matchers: Mapping[int, HotwordMatcher], *, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [rows, K] int32 of the tokens that rows prefer, `width` behind them, and bonuses [rows, K] float32."""
    ids, bonus = np.full((rows, WIDTH), width, np.int32), np.zeros((rows, WIDTH), np.float32)
    for row, matcher in matchers.items():
        matcher.fill(ids[row], bonus[row])
    return ids, bonus
