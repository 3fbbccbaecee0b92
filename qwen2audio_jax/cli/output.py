"""Output of the command: answers to stdout, everything else to stderr."""

import sys
from collections.abc import Generator

# All control characters but tab and line break: an answer may be shaped by an untrusted clip or checkpoint.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def write(text: str) -> None:
    """Write and flush text of an answer; a terminal gets control characters escaped."""
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_answer(pieces: Generator[str, None, str], *, written: list[str]) -> None:
    """Write an answer's pieces as they arrive, and a line break; report if the limit of new tokens ended it.

    Args:
        pieces: the result of the model's `stream`.
        written: collects the pieces, for a caller that is interrupted.
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
    """Print a message to the user on stderr."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
