"""Batch inference: a manifest of records in, answers out as files that are written once, on one host or many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2audio_jax.batch.answerer import Answerer
    from qwen2audio_jax.batch.run import run_batch

_PLACES = {"Answerer": "answerer", "run_batch": "run"}

__all__ = ["Answerer", "run_batch"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"qwen2audio_jax.batch.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'qwen2audio_jax.batch' has no attribute {name!r}")
