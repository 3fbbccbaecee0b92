"""Batch inference: a manifest of records in, answers out as files that are written once, on one host or many."""

from typing import TYPE_CHECKING

from qwen2audio_jax.lazy import lazy_names

if TYPE_CHECKING:
    from qwen2audio_jax.batch.answerer import Answerer
    from qwen2audio_jax.batch.run import run_batch

__all__ = ["Answerer", "run_batch"]

__getattr__, __dir__ = lazy_names(__name__, {"Answerer": "answerer", "run_batch": "run"})
