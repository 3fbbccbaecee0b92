"""The converter's commands: their options, and the work, whose modules are imported when it begins."""

import argparse
import json
import sys

from qwen2audio_jax.checkpoint.bounded_pool import MEMORY_GB
from qwen2audio_jax.checkpoint.mapping import NAMINGS
from qwen2audio_jax.checkpoint.progress import Clock, progress_bar
from qwen2audio_jax.command_line import Parser

from .dtypes import KEEP, STORED

COMMANDS = ("verify", "export", "inspect")


def build_parser(command: str | None, *, prog: str) -> Parser:
    """The options of one of `COMMANDS`, or of the conversion itself, documented."""
    if command == "verify":
        return _verify_parser(f"{prog} verify")
    if command == "export":
        return _export_parser(f"{prog} export")
    if command == "inspect":
        return _inspect_parser(f"{prog} inspect")
    return _convert_parser(prog)


def _convert_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Convert a Hugging Face checkpoint of Qwen2-Audio to an Orbax checkpoint.",
        epilog=f"Further commands, each with --help: {', '.join(COMMANDS)}. A folder of such a name: ./verify",
        examples=(
            f"{prog} Qwen/Qwen2-Audio-7B-Instruct checkpoint",
            f"{prog} hf-folder checkpoint --dtype int8",
            f"{prog} verify hf-folder checkpoint",
            f"{prog} export checkpoint hf-folder",
            f"{prog} inspect checkpoint",
        ),
        stray="a conversion has one source and one destination",
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
    _add_staging(parser)
    _add_running(parser)
    return parser


def _verify_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Compare a converted checkpoint with its source, bit for bit.",
        examples=(f"{prog} hf-folder checkpoint",),
    )
    parser.add_argument("src", metavar="SRC", help="what was converted: a folder, its URL, or a hub id")
    parser.add_argument("dst", metavar="DST", help="the checkpoint, or its URL")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter that it was converted with")
    _add_running(parser)
    return parser


def _export_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Write a checkpoint as a Hugging Face folder with safetensors files.",
        examples=(f"{prog} checkpoint hf-folder", f"{prog} checkpoint hf-folder --max-shard-size 2GB"),
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint, or its URL")
    parser.add_argument("dst", metavar="DST", help="folder (or URL) to write: new, empty, or a stopped export")
    parser.add_argument(
        "--names",
        choices=NAMINGS,
        default=NAMINGS[0],
        help="tensor names: of the published weights (default), or of the modules in transformers >= 5.10",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="largest file (default: 5GB)")
    _add_staging(parser)
    _add_running(parser)
    return parser


def _inspect_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="List a checkpoint's parameters: name, shape, dtype, bytes.",
        examples=(f"{prog} checkpoint",),
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint, or its URL")
    parser.add_argument("--json", action="store_true", help="everything that the manifest says, as JSON")
    return parser


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-gb",
        metavar="GB",
        type=float,
        default=MEMORY_GB,
        help=f"bound on memory, beyond what the largest tensor alone needs (default: {MEMORY_GB:g})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary: errors alone")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")


def _add_staging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--staging",
        metavar="DIR",
        help="where what goes to a bucket is made first, on a disk that holds one copy (default: in the cache folder)",
    )


def run(command: str | None, options: argparse.Namespace) -> int:
    """Run one of `COMMANDS`, or convert, and return its exit code; results go to stdout, the rest to stderr."""
    if command == "verify":
        return _verify(options)
    if command == "export":
        return _export(options)
    if command == "inspect":
        return _inspect(options)
    return _convert(options)


def _convert(options: argparse.Namespace) -> int:
    from .list_checkpoint import inspect
    from .to_orbax import convert

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
    if options.json:
        print(json.dumps({"checkpoint": options.dst, "converted": done, **inspect(options.dst)["totals"]}))
    elif not options.quiet and not done:
        print(f"{options.dst}: holds this conversion, finished: nothing to do", file=sys.stderr)
    elif not options.quiet:
        tensors = inspect(options.dst)["totals"]["tensors"]
        print(f"{options.dst}: converted {tensors} tensors, {clock.summary()}", file=sys.stderr)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .list_checkpoint import as_json, as_table, inspect

    contents = inspect(options.checkpoint)
    print(as_json(contents) if options.json else as_table(contents))
    return 0


def _export(options: argparse.Namespace) -> int:
    from qwen2audio_jax.checkpoint.hf_writer import parse_size

    from .to_safetensors import export

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
    if options.json:
        print(json.dumps({"folder": options.dst, "names": options.names}))
    elif not options.quiet:
        print(f"{options.dst}: exported {clock.summary()}", file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .compare import verify

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
    if options.json:
        print(json.dumps({"same": not differences, "differences": list(map(str, differences))}))
        return int(bool(differences))
    for difference in differences:
        print(difference)
    if differences:
        print(f"{options.dst}: {len(differences)} differences from {options.src}", file=sys.stderr)
        return 1
    if not options.quiet:
        print(f"{options.dst}: verified, every bit as in {options.src}: {clock.summary()}", file=sys.stderr)
    return 0
