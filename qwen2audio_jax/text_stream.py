"""Incremental detokenisation: generated ids in, pieces of text out, never half a UTF-8 character."""

from collections.abc import Callable, Collection

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns a row's tokens into text as they come.

    The pieces that `push` and `finish` return, joined, are exactly `decode` of all the tokens. A token of a byte-level
    vocabulary may end inside a character: what is certain is returned at once, and the unfinished character is held
    until a later token completes it or shows that its bytes never will. At most one character is held.

    The cost of a token does not depend on how many came before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, skip_ids: Collection[int] = ()):
        """Start with an empty text.

        Args:
            decode: ids to text by joining the tokens' bytes and reading them as UTF-8, each longest run that cannot be
                read as one U+FFFD (the byte-level decoder of the `tokenizers` library does this). It may leave tokens
                out, such as special ones.
            skip_ids: ids that add no text, such as those of the special tokens.
        """
        self._decode = decode
        self._skip_ids = frozenset(skip_ids)
        self._window: list[int] = []  # the tokens that hold the unfinished character; empty between characters
        self._returned = 0  # characters of decode(window) that have been returned

    def push(self, token: int) -> str:
        """The text that has become certain with this token; often empty in the middle of a character."""
        # A token without text has no bytes, so it neither completes nor ends an unfinished character.
        if token in self._skip_ids or not self._decode([token]):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        # U+FFFD at the end is an unfinished character, bytes that are no character, or the character itself: only what
        # follows can tell. Everything before it stays as it is whatever follows.
        certain = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._returned : certain]
        if certain == len(text):
            self._window, self._returned = [], 0
        elif len(self._window) > 3:
            # An unfinished character has at most three bytes, and its first byte is read as a first byte whatever
            # stands before it: so the last three tokens decide all that follows.
            self._window = self._window[-3:]
            self._returned = len(self._decode(self._window)) - 1
        else:
            self._returned = certain
        return piece

    def finish(self) -> str:
        """The text still held, as `decode` shows it; the stream is then empty again."""
        held = self._decode(self._window)[self._returned :] if self._window else ""
        self._window, self._returned = [], 0
        return held
