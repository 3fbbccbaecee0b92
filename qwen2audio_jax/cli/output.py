"""What the command writes: answers to stdout, everything else to stderr."""

import sys
from collections.abc import Generator

# All of them but tab and line break: an answer may be what a sound or a checkpoint made the model say.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def write(text: str) -> None:
    """Text of an answer, at once; a terminal sees control characters by their numbers and does not obey them."""
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_answer(pieces: Generator[str, None, str], *, written: list[str]) -> None:
    """Write an answer's pieces as they come, and a line break; say so when the limit of new tokens cut it.

    Args:
        pieces: of the model's `stream`.
        written: takes each piece, for a caller that is interrupted.
    """
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            reason = end.value
            break
        written.append(piece)
        write(piece)
    write("\n")
    if reason == "length":
        say("(cut by the limit of new tokens: --max-new-tokens raises it)")


def say(text: str) -> None:
    """A word to the user."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
