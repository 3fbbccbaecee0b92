"""Batch inference: a manifest of records in, answers out as files that are written once, on one host or many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2audio_jax.batch.answerer import Answerer
    from qwen2audio_jax.batch.run import Summary, run_batch
    from qwen2audio_jax.batch.task_answerer import LongAnswerer, TaskAnswerer

_PLACES = {
    "Answerer": "answerer",
    "LongAnswerer": "task_answerer",
    "Summary": "run",
    "TaskAnswerer": "task_answerer",
    "run_batch": "run",
}

__all__ = ["Answerer", "LongAnswerer", "Summary", "TaskAnswerer", "run_batch"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"qwen2audio_jax.batch.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'qwen2audio_jax.batch' has no attribute {name!r}")
