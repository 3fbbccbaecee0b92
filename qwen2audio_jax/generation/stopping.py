"""Stop strings: detection on the host of the token that completes one in a row's decoded text."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.limits import LIMITS, Limits


def check_stop_strings(value: str | Sequence[str] | None, *, limits: Limits = LIMITS) -> tuple[str, ...]:
    """The stop strings as a tuple without duplicates; a single string is one stop string, None is none.

    Raises:
        ValueError: a value that is not a string, an empty string, or more or longer ones than `limits` allows.
    """
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise ValueError(f"stop_strings={value!r} is a {type(value).__name__}: give a string or several")
    strings = (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"stop_strings holds {string!r}, which is a {type(string).__name__}: give strings")
        if not string:
            raise ValueError("stop_strings holds an empty string, which every text contains: leave it out")
        if len(string) > limits.stop_string_chars:
            raise ValueError(
                f"a stop string of {len(string)} characters is longer than {limits.stop_string_chars}: shorten it"
            )
    strings = tuple(dict.fromkeys(strings))
    if len(strings) > limits.stop_strings:
        raise ValueError(f"{len(strings)} stop strings are more than {limits.stop_strings}: give fewer")
    return strings


class StopMatcher:
    """Stop string matcher of one row: `push` each generated token and stop when it returns True.

    As in the reference (`StopStringCriteria`) a stop string may begin and end anywhere inside tokens and span any
    number of them, and the token that completes it is kept whole: the text ends with the stop string and the rest of
    that token. Unlike the reference it looks at generated tokens only, so that the end of a prompt is never part of a
    stop string.
    """

    def __init__(self, stop_strings: Sequence[str], decode: Callable[[list[int]], str]):
        """Start with an empty text.

        Args:
            stop_strings: the result of `check_stop_strings`.
            decode: ids to text, as for `TextStream`; it must not drop special tokens if a stop string may name one.
        """
        self._strings = tuple(stop_strings)
        self._stream = TextStream(decode)
        # A match that ends in new text begins at most this many characters before it.
        self._overlap = max(map(len, self._strings), default=1) - 1
        self._tail = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """True once a stop string has been completed by this token or an earlier one."""
        if self.stopped or not self._strings:
            return self.stopped
        text = self._tail + self._stream.push(token)
        self.stopped = any(string in text for string in self._strings)
        self._tail = text[len(text) - min(self._overlap, len(text)) :]
        return self.stopped


class Tokenizer(Protocol):
    """The tokenizer interface for stop strings and streaming: a processor, or its tokenizer."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decode ids to text."""
        ...


def stop_matchers(stop_strings: Sequence[str], tokenizer: Tokenizer | None, *, rows: int) -> list[StopMatcher]:
    """One stop string matcher per row; none if there are no stop strings.

    Raises:
        ValueError: stop strings without a tokenizer.
    """
    if not stop_strings:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings needs tokenizer=: pass the processor")
    return [StopMatcher(stop_strings, tokenizer.decode) for _ in range(rows)]
