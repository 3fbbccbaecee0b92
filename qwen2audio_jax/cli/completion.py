"""Completion for shells: the script that `qwen2audio --print-completion SHELL` prints, from the commands' options."""

import argparse
from collections.abc import Iterator

from qwen2audio_jax.installed import pip_install


def completion(parser: argparse.ArgumentParser, *, shell: str) -> str:
    """The script for a shell that completes what a parser takes; it is changed for it.

    Raises:
        ValueError: the extra is missing.
    """
    try:
        import shtab
    except ImportError:
        raise ValueError(f"completion is made by shtab: {pip_install('completion')}") from None
    from qwen2audio_jax.convert import commands as converter

    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in converter.build_parser(None, prog="qwen2audio convert")._actions:
        commands.choices["convert"]._add_action(action)
    for action in _actions(parser):
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest
        if metavar in ("FILE", "CONFIG", "INPUT"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif metavar in ("DIR", "SRC", "DST", "CKPT"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)
