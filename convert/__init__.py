"""Conversion between Hugging Face checkpoints and this package's Orbax checkpoints.

A function is imported when it is first used, so that `python -m convert --help` loads neither JAX nor Orbax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import verify
    from .list_checkpoint import inspect
    from .share_weights import share
    from .to_orbax import convert
    from .to_safetensors import export

_PLACES = {
    "convert": "to_orbax",
    "export": "to_safetensors",
    "inspect": "list_checkpoint",
    "share": "share_weights",
    "verify": "compare",
}

__all__ = ["convert", "export", "inspect", "share", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
