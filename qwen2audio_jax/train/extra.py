"""Optional packages of the extra `train`: imported on use, with an error that names a missing one."""

import importlib
import importlib.util
from types import ModuleType

from qwen2audio_jax.installed import pip_install

PACKAGES = ("grain", "tensorboardX", "matplotlib")
"""Import names of the extra's packages."""


def require_extras() -> None:
    """Check for all of them before a run, which needs some of them only at its end.

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
        if error.name != package:  # The package is installed, but one of its own dependencies is missing.
            raise
        raise _missing(package) from None


def _missing(package: str) -> ValueError:
    return ValueError(f"training needs {package}; install it with: {pip_install('train')}")
