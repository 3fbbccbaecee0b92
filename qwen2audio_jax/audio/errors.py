"""AudioError, the error for all invalid audio input."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class AudioError(ValueError):
    """A sound that is refused: `kind` for programs to branch on, the message for people.

    The message names the source, the value that was found, the limit it broke and what to do about it. The kinds:
    "missing" (no such file, or a disk that fails), "url" (an address that is refused or does not answer), "format" (a
    container or codec that is not accepted), "corrupt" (damaged content), "truncated" (shorter than its own header
    says), "too_long", "too_short", "empty", "not_finite" (NaN or infinity), "scale" (samples far beyond full scale),
    "too_large" (bytes, channels or samples beyond a limit), "rate" (an impossible sampling rate, or another than
    stated), and "shape" and "dtype" (arrays). `seconds` says how long a clip is that is too long, where that is known.
    """

    def __init__(self, message: str, *, kind: str, seconds: float | None = None):
        super().__init__(message)
        self.kind, self.seconds = kind, seconds

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with only the message, so no error could be unpickled from a worker process.
        return functools.partial(type(self), kind=self.kind, seconds=self.seconds), self.args


@contextmanager
def read_faults(name: str) -> Iterator[None]:
    """What the system finds wrong while a file is read (a disk that fails, a server that is gone), as an AudioError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise AudioError(f"{name} cannot be read ({reason}): try again, or copy it elsewhere", kind="missing") from None


def truncated(name: str, found: str, *, silent: bool = False) -> AudioError:
    """The error for a file that is provably shorter than it says; `silent` if nothing of it can be heard."""
    remedy = "Get the whole file"
    if not silent:
        remedy += ", or pass allow_truncated=True (--allow-truncated) to hear what is there"
    return AudioError(f"{name} is truncated: {found}. {remedy}", kind="truncated")


def corrupt(name: str, found: str) -> AudioError:
    """The error for a file whose content contradicts itself."""
    return AudioError(f"{name} is damaged: {found}. Get an intact copy, or write it anew", kind="corrupt")
