"""The converter's subcommands `verify`, `export` and `inspect`. See `__main__` for exit codes."""

import argparse
import sys
from typing import NoReturn

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB
from qwen2audio_jax.checkpoint.mapping import NAMINGS
from qwen2audio_jax.checkpoint.progress import Clock, progress_bar

from .list_checkpoint import as_json, as_table, inspect
from .to_safetensors import export, parse_size
from .verify import verify


class Parser(argparse.ArgumentParser):
    """Argument parser that reports bad options in one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add the options of long-running commands."""
    parser.add_argument(
        "--memory-gb",
        metavar="GB",
        type=float,
        default=MEMORY_GB,
        help=f"bound on memory, beyond what the largest tensor alone needs (default: {MEMORY_GB:g})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary: errors alone")


def add_staging(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that write to a bucket."""
    parser.add_argument(
        "--staging",
        metavar="DIR",
        help="where what goes to a bucket is made first, on a disk that holds one copy (default: in the cache folder)",
    )


COMMANDS = ("verify", "export", "inspect")


def build_parser(command: str, *, prog: str) -> Parser:
    """The options of one of `COMMANDS`, documented."""
    if command == "verify":
        parser = Parser(prog=prog, description="Compare a converted checkpoint with its source, bit for bit.")
        parser.add_argument("src", metavar="SRC", help="what was converted: a folder, its URL, or a hub id")
        parser.add_argument("dst", metavar="DST", help="the checkpoint, or its URL")
        parser.add_argument("--revision", help="branch, tag or commit of a hub id")
        parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter that it was converted with")
        add_running(parser)
    elif command == "export":
        parser = Parser(prog=prog, description="Write a checkpoint as a Hugging Face folder with safetensors files.")
        parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint, or its URL")
        parser.add_argument("dst", metavar="DST", help="folder (or URL) to write: new, empty, or a stopped export")
        parser.add_argument(
            "--names",
            choices=NAMINGS,
            default=NAMINGS[0],
            help="tensor names: of the published weights (default), or of the modules in transformers >= 5.10",
        )
        parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="largest file (default: 5GB)")
        add_staging(parser)
        add_running(parser)
    else:
        parser = Parser(prog=prog, description="List a checkpoint's parameters: name, shape, dtype, bytes.")
        parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint, or its URL")
        parser.add_argument("--json", action="store_true", help="everything that the manifest says, as JSON")
    return parser


def run(command: str, options: argparse.Namespace) -> int:
    """Run one of `COMMANDS` and return its exit code; results go to stdout, the rest to stderr."""
    if command == "verify":
        return _verify(options)
    if command == "export":
        return _export(options)
    contents = inspect(options.checkpoint)
    print(as_json(contents) if options.json else as_table(contents))
    return 0


def _export(options: argparse.Namespace) -> int:
    shard_bytes = parse_size(options.max_shard_size)
    clock = Clock()
    with progress_bar("exporting", quiet=options.quiet) as progress:
        export(
            options.checkpoint,
            options.dst,
            names=options.names,
            max_shard_bytes=shard_bytes,
            memory_gb=options.memory_gb,
            staging=options.staging,
            on_progress=clock.watch(progress),
        )
    if not options.quiet:
        print(f"{options.dst}: exported {clock.summary()}", file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    clock = Clock()
    with progress_bar("verifying", quiet=options.quiet) as progress:
        differences = verify(
            options.src,
            options.dst,
            revision=options.revision,
            adapter=options.adapter,
            memory_gb=options.memory_gb,
            on_progress=clock.watch(progress),
        )
    for difference in differences:
        print(difference)
    if differences:
        print(f"{options.dst}: {len(differences)} differences from {options.src}", file=sys.stderr)
        return 1
    if not options.quiet:
        print(f"{options.dst}: verified, every bit as in {options.src}: {clock.summary()}", file=sys.stderr)
    return 0
