"""Conversion between Hugging Face checkpoints and this package's Orbax checkpoints."""

from .to_orbax import convert

__all__ = ["convert"]
