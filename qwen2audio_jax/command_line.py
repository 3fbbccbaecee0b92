"""The parser of the package's commands: errors in one line, with the nearest name, and examples after the options."""

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

_NUMBERS = {"int": "a whole number", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors name the value, what may stand there, and the nearest of it.

    Attributes:
        examples: command lines that are right as they stand; shown by --help, the first where something is missing.
        stray: what to do about words that belong to no option.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), stray: str = "leave it out", **options: Any):
        # Further right than usual: most options then stand in one line with their text.
        wide = partial(argparse.HelpFormatter, max_help_position=30)
        super().__init__(*arguments, **{"formatter_class": wide, **options})
        self.examples, self.stray = tuple(examples), stray

    def format_help(self) -> str:
        """The help, and the examples."""
        lines = "".join(f"  {line}\n" for line in self.examples)
        return super().format_help() + (f"\nexamples:\n{lines}" if lines else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what no option takes here, where the names of the options are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found, unknown

    def _unknown(self, words: Sequence[str]) -> str:
        for word in words:
            if word.startswith("-"):
                name = word.partition("=")[0]
                return f"{name}: there is no such option{nearest(name, self._option_string_actions)}"
        return f"{words[0]!r} stands where nothing is expected: {self.stray}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is not among {', '.join(names)}{nearest(value, names)}")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line."""
        message = message.removeprefix("argument ")
        if found := re.fullmatch(r"(.*): invalid (int|float) value: (.*)", message, re.DOTALL):
            message = (
                f"{found[1]}: {found[3]} is not {_NUMBERS[found[2]]}: write one, as in {found[1].split('/')[-1]} 1"
            )
        elif message.startswith("the following arguments are required") and self.examples:
            message = f"{message}, as in: {self.examples[0]}"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean NAME?", or nothing where none is near."""
    found = get_close_matches(str(name), list(names), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""
