"""Optional packages of the extra `evaluate`: imported on use, with an error that names a missing one."""

import importlib
from importlib.metadata import version
from types import ModuleType

from qwen2audio_jax.installed import pip_install


def import_extra(name: str) -> ModuleType:
    """The module `name` of a package that comes with the extra `evaluate`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:  # The package is installed, but one of its own dependencies is missing.
            raise
        raise ValueError(f"these scores need {package}; install it with: {pip_install('evaluate')}") from None


def versions(*distributions: str) -> str:
    """The installed versions of distributions: "kaldialign 0.12.0, ..."."""
    return ", ".join(f"{name} {version(name)}" for name in distributions)
