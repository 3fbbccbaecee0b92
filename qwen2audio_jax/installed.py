"""How this package was installed, for messages that say what to install: the command works as it stands."""

import importlib
import importlib.metadata
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

NAME = "qwen2audio-jax"


def import_optional(name: str, *, extra: str, message: str) -> ModuleType:
    """The module `name` of a package that comes with an extra.

    Args:
        name: of the module.
        extra: that the package comes with.
        message: of the error, with places for {package} and {command}.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:  # The package is installed, but one of its own dependencies is missing.
            raise
        raise missing(package, extra=extra, message=message) from None


def missing(package: str, *, extra: str, message: str) -> ValueError:
    """The error for a package of an extra that is not installed."""
    return ValueError(message.format(package=package, command=pip_install(extra)))


def pip_install(extra: str) -> str:
    """The command that adds an extra of this package to the Python that runs.

    It names what the package was installed from, as pip has noted it: a checkout, a wheel, a repository, else the
    index. Where that is gone, it names the extra's packages themselves.
    """
    here = Path(__file__).resolve().parent.parent
    # In a checkout's own folder the one found first is a by-product of building, which pip knows nothing of.
    found = list(importlib.metadata.distributions(name=NAME))
    whole = [each for each in found if each.read_text("direct_url.json")]
    if not whole:
        in_checkout = not found or (here / "pyproject.toml").is_file()
        return pip(*_checkout(here, extra=extra)) if in_checkout else pip(f"{NAME}[{extra}]")
    distribution = whole[0]
    noted = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "vcs_info" in noted:
        kind, commit = noted["vcs_info"]["vcs"], noted["vcs_info"]["commit_id"]
        return pip(f"{NAME}[{extra}] @ {kind}+{noted['url']}@{commit}")
    parts = urlsplit(noted["url"])
    if parts.scheme != "file":
        return pip(f"{NAME}[{extra}] @ {noted['url']}")
    place = Path(unquote(parts.path))
    if place.is_file():
        return pip(f"{place}[{extra}]")
    if noted.get("dir_info", {}).get("editable"):
        return pip(*_checkout(place, extra=extra))
    return pip(f"{place}[{extra}]") if (place / "pyproject.toml").is_file() else pip(*_packages(distribution, extra))


def pip(*arguments: str) -> str:
    """`pip install` of these, for the Python that runs: its pip need not be the one on the path, nor be there."""
    if not list(importlib.metadata.distributions(name="pip")):
        start = ["uv", "pip", "install", "--python", sys.executable]
    else:
        found = shutil.which("pip")
        own = found is not None and Path(found).parent == Path(sys.executable).parent
        start = ["pip", "install"] if own else [sys.executable, "-m", "pip", "install"]
    return shlex.join([*start, *arguments])


def _checkout(place: Path, *, extra: str) -> tuple[str, str]:
    return "-e", f"{place}[{extra}]"


def _packages(distribution: importlib.metadata.Distribution, extra: str) -> list[str]:
    ends = f"extra == '{extra}'", f'extra == "{extra}"'
    lines = [line.partition(";") for line in distribution.requires or []]
    return [name.strip() for name, _, marker in lines if marker.strip().endswith(ends)]
