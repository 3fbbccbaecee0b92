"""Conversion between Hugging Face checkpoints and this package's Orbax checkpoints."""

from .list_checkpoint import inspect
from .share import share
from .to_orbax import convert
from .to_safetensors import export
from .verify import verify

__all__ = ["convert", "export", "inspect", "share", "verify"]
