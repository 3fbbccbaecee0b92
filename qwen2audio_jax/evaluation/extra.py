"""Optional packages of the extra `evaluate`: imported on use, with an error that names a missing one."""

from importlib.metadata import version
from types import ModuleType

from qwen2audio_jax.installed import import_optional


def import_extra(name: str) -> ModuleType:
    """The module `name` of a package that comes with the extra `evaluate`.

    Raises:
        ValueError: the package is not installed.
    """
    message = "these scores need {package}; install it with: {command}"
    return import_optional(name, extra="evaluate", message=message)


def versions(*distributions: str) -> str:
    """The installed versions of distributions: "kaldialign 0.12.0, ..."."""
    return ", ".join(f"{name} {version(name)}" for name in distributions)
