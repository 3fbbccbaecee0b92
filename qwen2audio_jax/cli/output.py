"""Output of the command: answers to stdout, everything else to stderr."""

import sys
from collections.abc import Generator

from qwen2audio_jax.cli.stats import Stats
from qwen2audio_jax.cli.status import status

# All control characters but tab and line break: an answer may be shaped by an untrusted clip or checkpoint.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def write(text: str) -> None:
    """Write and flush text of an answer; a terminal gets control characters escaped."""
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_pieces(
    pieces: Generator[str, None, str], *, written: list[str], stats: Stats, quiet: bool, show: bool = True
) -> str:
    """Write an answer's pieces as they arrive, and a line break; returns the finish reason.

    Args:
        pieces: the result of the model's `stream`.
        written: collects the pieces, for a caller that is interrupted.
        stats: is told of the first piece.
        quiet: say nothing of what takes long before it.
        show: whether to write them.
    """
    ends: list[str] = []

    def following() -> str | None:
        try:
            return next(pieces)
        except StopIteration as end:
            ends.append(end.value)
            return None

    with status("reading the prompt; for a new shape the programs are compiled first", quiet=quiet):
        piece = following()
    stats.token()
    while piece is not None:
        written.append(piece)
        if show:
            write(piece)
        piece = following()
    if show:
        write("\n")
    return ends[0]


def note(text: str, *, reason: str) -> None:
    """Say on stderr what is surprising about an answer: that there is none, or that the limit cut it."""
    if reason == "length":
        say("(cut by the limit of new tokens: --max-new-tokens raises it)")
    elif not text.strip():
        say(
            "(the answer is empty: the model ended it at once; ask otherwise, or see whether the clip holds what is "
            "asked about)"
        )


def say(text: str) -> None:
    """Print a message to the user on stderr."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
