"""The command `python -m convert SRC DST`, and the subcommands of `commands`.

Exit codes: 0 done, 1 failed (disk, interruption) or different, 2 bad input, with one line on stderr that states the
problem.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import jax

from qwen2audio_jax.checkpoint.progress import Clock, progress_bar

from . import commands
from .convert_tensor import KEEP, STORED
from .list_checkpoint import inspect
from .to_orbax import convert


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command's options, documented."""
    parser = commands.Parser(
        prog=prog or "python -m convert",
        description="Convert a Hugging Face checkpoint of Qwen2-Audio to an Orbax checkpoint.",
        epilog=f"Further commands, each with --help: {', '.join(commands.COMMANDS)}. A folder of such a name: ./verify",
    )
    parser.add_argument("src", metavar="SRC", help="folder with safetensors weights, its URL, or a hub id")
    parser.add_argument("dst", metavar="DST", help="folder (or URL) to write: new, empty, or a stopped conversion")
    parser.add_argument(
        "--dtype",
        choices=STORED,
        default=KEEP,
        help="cast the weights, or quantise the decoder's (int8) (default: keep their bytes)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--allow-non-finite", action="store_true", help="convert weights that hold NaN or Inf")
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter in PEFT's format (or its URL), added to the weights"
    )
    commands.add_staging(parser)
    commands.add_running(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code."""
    prog = prog or "python -m convert"
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in commands.COMMANDS:
        command = arguments[0]
        prog = f"{prog} {command}"
        options = commands.build_parser(command, prog=prog).parse_args(arguments[1:])
        return _exit_code(lambda: commands.run(command, options), prog=prog)
    options = build_parser(prog).parse_args(arguments)
    return _exit_code(lambda: _convert(options), prog=prog)


def _convert(options: argparse.Namespace) -> int:
    clock = Clock()
    with progress_bar("converting", quiet=options.quiet) as progress:
        done = convert(
            options.src,
            options.dst,
            dtype=options.dtype,
            revision=options.revision,
            non_finite="allow" if options.allow_non_finite else "refuse",
            adapter=options.adapter,
            memory_gb=options.memory_gb,
            staging=options.staging,
            on_progress=clock.watch(progress),
        )
    if not done and not options.quiet:
        print(f"{options.dst}: holds this conversion, finished: nothing to do", file=sys.stderr)
    elif not options.quiet:
        tensors = inspect(options.dst)["totals"]["tensors"]
        print(f"{options.dst}: converted {tensors} tensors, {clock.summary()}", file=sys.stderr)
    return 0


def _exit_code(run: Callable[[], int], *, prog: str) -> int:
    if "JAX_PLATFORMS" not in os.environ:
        # No computation needs an accelerator, and another process may hold it.
        jax.config.update("jax_platforms", "cpu")
    try:
        return run()
    except ValueError as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        print(f"{prog}: failed: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
