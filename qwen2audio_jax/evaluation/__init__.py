"""Evaluation: a model's answers to labelled sound, scored and reported."""

from typing import TYPE_CHECKING

from qwen2audio_jax.lazy import lazy_names

if TYPE_CHECKING:
    from qwen2audio_jax.evaluation.report import Report
    from qwen2audio_jax.evaluation.run import Evaluation, Source, evaluate
    from qwen2audio_jax.evaluation.scores import Score

__all__ = ["Evaluation", "Report", "Score", "Source", "evaluate"]

__getattr__, __dir__ = lazy_names(
    __name__, {"Evaluation": "run", "Report": "report", "Score": "scores", "Source": "run", "evaluate": "run"}
)
