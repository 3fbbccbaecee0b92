"""Optional packages of the extra `train`: imported on use, with an error that names a missing one."""

import importlib.util
from types import ModuleType

from qwen2audio_jax.installed import import_optional, missing

PACKAGES = ("grain", "tensorboardX", "matplotlib")
"""Import names of the extra's packages."""

_OF_TRAINING = {"extra": "train", "message": "training needs {package}; install it with: {command}"}


def require_extras() -> None:
    """Check for all of them before a run, which needs some of them only at its end.

    Raises:
        ValueError: one is not installed.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise missing(name, **_OF_TRAINING)


def import_extra(name: str) -> ModuleType:
    """The module `name` of a package that comes with the extra `train`.

    Raises:
        ValueError: the package is not installed.
    """
    return import_optional(name, **_OF_TRAINING)
