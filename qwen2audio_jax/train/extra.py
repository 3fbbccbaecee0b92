"""The packages of the extra `train`: what is imported only where a run needs it, and the error where it is missing."""

import importlib
import importlib.util
from types import ModuleType

PACKAGES = ("grain", "tensorboardX", "matplotlib")
"""Of the extra, as they are imported."""


def require_extras() -> None:
    """Look for all of them before a run, which needs some of them at its end alone.

    Raises:
        ValueError: one is not installed.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def import_extra(name: str) -> ModuleType:
    """The module `name` of a package that comes with the extra `train`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:  # It is there, and misses something itself.
            raise
        raise _missing(package) from None


def _missing(package: str) -> ValueError:
    return ValueError(f"training needs {package}; install it with: pip install 'qwen2audio-jax[train]'")
