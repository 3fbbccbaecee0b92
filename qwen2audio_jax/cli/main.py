"""The command `qwen2audio`: parses the arguments, runs a command, and turns errors into an exit code.

Exit codes: 0 done; 1 failed; 2 bad input, with one line on stderr that states the problem; 3 a batch job that was
stopped and can go on. QWEN2AUDIO_DEBUG=1 shows the traceback of an error.
"""

import argparse
import gc
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from qwen2audio_jax.cli import early
from qwen2audio_jax.cli.commands import COMMANDS, build_parser, in_options
from qwen2audio_jax.cli.output import one_line, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; like argparse it raises SystemExit for bad options and --help."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["convert"]:
        # The converter is also a standalone command, with its own options.
        from qwen2audio_jax.convert.__main__ import main as convert

        return convert(arguments[1:], prog="qwen2audio convert")
    parser = build_parser()
    if (instead := early.instead_of_command(arguments)) is not None:
        parser.error(instead)
    options = parser.parse_args(arguments)
    options.arguments = arguments
    # JAX would reserve most of a GPU's memory at once, and other programs may need it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    early.keep_libtpu_quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character gets its code point, so that the answer continues.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of the output has closed it; the interpreter's final flush must not report that either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("QWEN2AUDIO_DEBUG") == "1":
            raise
        return _report(error, options.command)


def _run(options: argparse.Namespace) -> int:
    early.check(options)
    module, _, function = COMMANDS[options.command].run.partition(":")
    run = getattr(_imported(f"qwen2audio_jax.cli.{module}"), function)
    if not getattr(options, "quiet", False):
        return run(options) or 0
    from qwen2audio_jax.checkpoint.progress import silence

    with silence():
        return run(options) or 0


def _imported(name: str) -> ModuleType:
    """A module and all that it imports, which the garbage collector then leaves alone: an eighth of a short command."""
    gc.disable()
    try:
        return import_module(name)
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def _report(error: BaseException, command: str) -> int:
    bad_input = isinstance(error, ValueError)
    said = one_line(error)
    if isinstance(error, KeyboardInterrupt):
        said = "interrupted"
    elif bad_input:
        said = in_options(error, command)
    else:
        said = f"failed: {type(error).__name__}: {said}"
    say(f"qwen2audio {command}: {said}")
    return 2 if bad_input else 1


if __name__ == "__main__":
    sys.exit(main())
