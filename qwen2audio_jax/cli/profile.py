"""Profiles of a command's computation, for `--profile DIR`: traces that TensorBoard, XProf and Perfetto read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from qwen2audio_jax.cli.output import say


def check_profile_folder(folder: str | None) -> None:
    """Make the folder of --profile, if there is one, so that it fails before a model is loaded.

    Raises:
        ValueError: it is a file, or cannot be made or written.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--profile {folder}: {error.strerror}; name a folder that can be written") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--profile {folder}: it cannot be written; name another folder")


@contextmanager
def profiled(folder: str | None) -> Iterator[None]:
    """Trace what runs inside into a folder that `check_profile_folder` has made; without one, only run it.

    Scopes in the trace: encode, prefill, decode_step and sample, and in them encoder_layer_N and decoder_layer_N.
    """
    if folder is None:
        yield
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls are many, and tracing them slows them down
    with jax.profiler.trace(folder, profiler_options=options):
        yield
    say(f"profile: {folder} (tensorboard --logdir {folder}, with the package xprof)")
