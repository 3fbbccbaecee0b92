"""Clips by the names that users type: files, URLs, examples of the package, standard input, pipes."""

import argparse
import io
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
    source = clip_source(name, stdin=stdin)
    if not isinstance(source, str):
        # Read here, as it may be needed twice.
        data = source.read(LIMITS.file_bytes + 1)
        if source is not sys.stdin.buffer:
            source.close()
        clip = _heard(io.BytesIO(data), name, options=options, extractor=extractor)
    else:
        clip = _heard(source, name, options=options, extractor=extractor)
    if clip.missing is not None and not options.quiet:
        say(f"{name} is heard in part: {clip.missing}")
    return clip


def _heard(
    source: str | io.BytesIO, name: str, *, options: argparse.Namespace, extractor: Qwen2AudioFeatureExtractor
) -> LoadedClip:
    given = clip_options(options)
    if not options.truncation:
        return extractor.load_clip(source, **given)
    try:
        return extractor.load_clip(source, **{**given, "truncation": False})
    except AudioError as error:
        if error.kind != "too_long":
            raise
        kept, whole = extractor.chunk_length, error.seconds
    if isinstance(source, io.BytesIO):
        source.seek(0)
    if not options.quiet:
        rest = "what comes after" if whole is None else f"the other {whole - kept:.4g} s of its {whole:.4g} s"
        say(f"{name}: its first {kept:g} s are heard, {rest} left out")
    return extractor.load_clip(source, **given)
