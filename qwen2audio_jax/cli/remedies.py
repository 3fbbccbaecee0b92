"""Remedies in the words of the command line: the library's messages name arguments of Python."""

import re
from collections.abc import Collection

OTHER_NAMES = {"weights_dtype": "weights", "cache_dtype": "cache", "stop_strings": "stop"}
"""Arguments whose option has another name."""

NO_OPTIONS = ("model", "data")
"""Arguments that are sizes of a mesh, and no option although there is one of their name."""

_ARGUMENT = re.compile(
    r"(?<![\w.\[?&/'\"-])(?P<name>[a-z][a-z_]*)=(?P<value>True|False|'[^']*'|-?\d[\w.+-]*(?<![.,])|(?=[\s,.;:)]|$))"
    r"(?: \((?P<stated>--[a-z-]+)\))?"
)


def as_options(message: str, options: Collection[str]) -> str:
    """A message with arguments such as `truncation=True` written as options such as --truncation.

    Args:
        message: of an error of the library.
        options: those of the command; an argument that is none of them stays as it is.
    """

    def spelled(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        option = found["stated"] or "--" + OTHER_NAMES.get(name, name).replace("_", "-")
        if (name, value) == ("do_sample", "False"):
            option, value = "--greedy", ""
        if option not in options or value == "False" or name in NO_OPTIONS:
            return found[0]
        return option if value in ("True", "") else f"{option} {value.strip(chr(39))}"

    message = re.sub(r"data=(\d+) x model=(\d+)", r"--mesh \1x\2", message)
    message = message.replace(", or choose among them with devices=", "").replace(", or pass devices=", "")
    for name, option in OTHER_NAMES.items():
        if f"--{option}" in options:
            message = re.sub(rf"\b{name}\b(?!=)", f"--{option}", message)
    return _ARGUMENT.sub(spelled, message)
