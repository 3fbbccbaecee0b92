"""The converter's further commands: `verify`, `export` and `inspect`. See `__main__` for exit codes."""

import argparse
import sys
from typing import NoReturn

from .listing import as_json, as_table, inspect
from .mapping import NAMINGS
from .progress import progress_bar
from .to_safetensors import export, parse_size
from .verify import verify


class Parser(argparse.ArgumentParser):
    """Bad options are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


COMMANDS = ("verify", "export", "inspect")


def build_parser(command: str, *, prog: str) -> Parser:
    """The options of one of `COMMANDS`, documented."""
    if command == "verify":
        parser = Parser(prog=prog, description="Compare a converted checkpoint with its source, bit for bit.")
        parser.add_argument("src", metavar="SRC", help="what was converted: a folder, or a hub id (extra: hub)")
        parser.add_argument("dst", metavar="DST", help="the checkpoint")
        parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    elif command == "export":
        parser = Parser(prog=prog, description="Write a checkpoint as a Hugging Face folder with safetensors files.")
        parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint")
        parser.add_argument("dst", metavar="DST", help="folder to write: new or empty")
        parser.add_argument(
            "--names",
            choices=NAMINGS,
            default=NAMINGS[0],
            help="tensor names: of the published weights (default), or of the modules in transformers >= 5.10",
        )
        parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="largest file (default: 5GB)")
    else:
        parser = Parser(prog=prog, description="List a checkpoint's parameters: name, shape, dtype, bytes.")
        parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint")
        parser.add_argument("--json", action="store_true", help="everything that the manifest says, as JSON")
    return parser


def run(command: str, options: argparse.Namespace) -> int:
    """Run one of `COMMANDS`: results go to stdout, the rest to stderr; the exit code."""
    if command == "verify":
        return _verify(options)
    if command == "export":
        return _export(options)
    contents = inspect(options.checkpoint)
    print(as_json(contents) if options.json else as_table(contents))
    return 0


def _export(options: argparse.Namespace) -> int:
    size = parse_size(options.max_shard_size)
    with progress_bar("exporting") as progress:
        export(options.checkpoint, options.dst, names=options.names, max_shard_bytes=size, progress=progress)
    print(f"{options.dst}: exported", file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    with progress_bar("verifying") as progress:
        differences = verify(options.src, options.dst, revision=options.revision, progress=progress)
    for difference in differences:
        print(difference)
    if differences:
        print(f"{options.dst}: {len(differences)} differences from {options.src}", file=sys.stderr)
        return 1
    print(f"{options.dst}: verified, every bit as in {options.src}", file=sys.stderr)
    return 0
