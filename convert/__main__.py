"""The command `python -m convert SRC DST`, and the subcommands of `commands`.

Exit codes: 0 done, 1 failed (disk, interruption) or different, 2 bad input, with one line on stderr that states the
problem.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from . import commands


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code."""
    prog = prog or "python -m convert"
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = arguments[0] if arguments and arguments[0] in commands.COMMANDS else None
    parser = commands.build_parser(command, prog=prog)
    options = parser.parse_args(arguments[1:] if command else arguments)
    return _exit_code(command, options, prog=parser.prog)


def _exit_code(command: str | None, options: argparse.Namespace, *, prog: str) -> int:
    if "JAX_PLATFORMS" not in os.environ:
        import jax

        # No computation needs an accelerator, and another process may hold it.
        jax.config.update("jax_platforms", "cpu")
    try:
        return commands.run(command, options)
    except ValueError as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        print(f"{prog}: failed: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
