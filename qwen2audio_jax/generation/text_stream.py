"""Incremental detokenisation: generated ids to pieces of text, never half a UTF-8 character."""

from collections.abc import Callable, Collection

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Incremental decoder of one row's tokens.

    The joined pieces of `push` and `finish` equal `decode` of all the tokens. A token of a byte-level vocabulary may
    end inside a character: text that is final is returned at once, and the incomplete character is held until a later
    token completes it or makes it invalid. At most one character is held.

    The cost of a token does not depend on the number of earlier tokens.
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
        self._window: list[int] = []  # the tokens of the incomplete character; empty between characters
        self._returned = 0  # number of characters of decode(window) already returned

    def push(self, token: int) -> str:
        """The text that becomes final with this token; often empty inside a character."""
        # A token without text has no bytes, so it neither completes nor invalidates an incomplete character.
        if token in self._skip_ids or not self._decode([token]):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        # U+FFFD at the end is an incomplete character, invalid bytes, or the character itself: only later tokens can
        # tell. Everything before it is final.
        certain = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._returned : certain]
        if certain == len(text):
            self._window, self._returned = [], 0
        elif len(self._window) > 3:
            # An incomplete character has at most three bytes, and its first byte is a lead byte whatever precedes it:
            # so the last three tokens determine all that follows.
            self._window = self._window[-3:]
            self._returned = len(self._decode(self._window)) - 1
        else:
            self._returned = certain
        return piece

    def finish(self) -> str:
        """The text still held, as in `decode`; resets the stream."""
        held = self._decode(self._window)[self._returned :] if self._window else ""
        self._window, self._returned = [], 0
        return held
