"""Clips by the names that users type: files, URLs, examples of the package, standard input, pipes."""

import argparse
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.load import LoadedClip
from qwen2audio_jax.cli.options import clip_options
from qwen2audio_jax.cli.output import say
from qwen2audio_jax.embedded import example
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor

EXAMPLE = "example:"


def clip_source(name: str, *, stdin: bool = False) -> str | BinaryIO:
    """The source of a clip for `feature_extractor.load`.

    `example:NAME` stands for a file of the package, `-` for standard input. What a shell puts in the place of a file
    (a named pipe, /dev/stdin, `<(...)`) is opened here, where the user typed its name: `load_audio` takes no path of
    one.

    Args:
        name: as the user typed it.
        stdin: whether `-` may be read.

    Raises:
        ValueError: there is no such example (the message lists them), no sound on standard input, or it is taken.
    """
    if name.startswith(EXAMPLE):
        return str(example(name.removeprefix(EXAMPLE)))
    if name == "-":
        if not stdin:
            raise ValueError("- (standard input) is read for the messages here: give the path of a sound file")
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("--audio - reads sound from a pipe, and none is there: pipe a file into it")
        return sys.stdin.buffer
    with suppress(OSError, ValueError, RuntimeError):  # the last one where there is no home folder
        path = Path(name).expanduser()
        if stat.S_ISFIFO(path.stat().st_mode):
            return path.open("rb")
    return name


def load_clip(
    name: str, *, options: argparse.Namespace, extractor: Qwen2AudioFeatureExtractor, stdin: bool = False
) -> LoadedClip:
    """A clip by its name; what is not heard of it is said on stderr.

    Raises:
        ValueError: it cannot be heard.
    """
    source: str | bytes | BinaryIO = clip_source(name, stdin=stdin)
    if not isinstance(source, str | bytes):
        # Read here, as it may be needed twice.
        file, source = source, source.read(LIMITS.file_bytes + 1)
        if file is not sys.stdin.buffer:
            file.close()
    tell_cut(source, name, options=options, extractor=extractor)
    clip = extractor.load_clip(source, **clip_options(options))
    if clip.missing is not None and not options.quiet:
        say(f"{name} is heard in part: {clip.missing}")
    return clip


def tell_cut(
    source: str | bytes, name: str, *, options: argparse.Namespace, extractor: Qwen2AudioFeatureExtractor
) -> None:
    """Say on stderr what --truncation cuts off a clip, if anything."""
    if not options.truncation or options.quiet:
        return
    try:
        extractor.load_clip(source, **{**clip_options(options), "truncation": False})
    except AudioError as error:  # whatever else is wrong with it is said when it is loaded
        if error.kind == "too_long":
            kept, whole = extractor.chunk_length, error.seconds
            rest = "what comes after" if whole is None else f"the other {whole - kept:.4g} s of its {whole:.4g} s"
            say(f"{name}: its first {kept:g} s are heard, {rest} left out")
