"""The command `python -m convert SRC DST`.

Exit codes: 0 converted, 1 failed (disk, interruption), 2 bad input, with one line on stderr that says what is wrong.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from .progress import progress_bar
from .to_orbax import CASTS, KEEP, convert


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command's options, documented."""
    parser = _Parser(
        prog=prog or "python -m convert",
        description="Convert a Hugging Face checkpoint of Qwen2-Audio to an Orbax checkpoint.",
    )
    parser.add_argument("src", metavar="SRC", help="folder with safetensors weights, or a hub id (extra: hub)")
    parser.add_argument("dst", metavar="DST", help="folder to write: new or empty")
    parser.add_argument(
        "--dtype", choices=[KEEP, *CASTS], default=KEEP, help="cast the weights (default: keep their bytes)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--allow-non-finite", action="store_true", help="convert weights that hold NaN or Inf")
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code."""
    parser = build_parser(prog)
    options = parser.parse_args(argv)
    if "JAX_PLATFORMS" not in os.environ:
        # Nothing here computes: an accelerator that another process holds must not stand in the way.
        jax.config.update("jax_platforms", "cpu")
    try:
        with progress_bar("converting") as progress:
            convert(
                options.src,
                options.dst,
                dtype=options.dtype,
                revision=options.revision,
                non_finite="allow" if options.allow_non_finite else "refuse",
                progress=progress,
            )
    except ValueError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        print(f"{parser.prog}: failed: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"{options.dst}: converted", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
