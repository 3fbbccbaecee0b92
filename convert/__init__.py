"""Conversion between Hugging Face checkpoints and this package's Orbax checkpoints.

A function is imported when it is first used, so that `python -m convert --help` loads neither JAX nor Orbax.
"""

from typing import TYPE_CHECKING

from qwen2audio_jax.lazy import lazy_names

if TYPE_CHECKING:
    from .compare import verify
    from .list_checkpoint import inspect
    from .share_weights import share
    from .to_orbax import convert
    from .to_safetensors import export

__all__ = ["convert", "export", "inspect", "share", "verify"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "convert": "to_orbax",
        "export": "to_safetensors",
        "inspect": "list_checkpoint",
        "share": "share_weights",
        "verify": "compare",
    },
)
