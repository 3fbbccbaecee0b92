"""Evaluation: a model's answers to labelled sound, scored and reported."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2audio_jax.evaluation.report import Report
    from qwen2audio_jax.evaluation.run import Evaluation, Source, evaluate
    from qwen2audio_jax.evaluation.scores import Score

_PLACES = {"Evaluation": "run", "Report": "report", "Score": "scores", "Source": "run", "evaluate": "run"}

__all__ = ["Evaluation", "Report", "Score", "Source", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"qwen2audio_jax.evaluation.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'qwen2audio_jax.evaluation' has no attribute {name!r}")
