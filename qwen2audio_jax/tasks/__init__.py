"""Tasks: transcription, translation, captions, classification, questions and embeddings, of sound of any length."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2audio_jax.tasks.checks import Checks
    from qwen2audio_jax.tasks.labels import Classification
    from qwen2audio_jax.tasks.listener import Tasks
    from qwen2audio_jax.tasks.task import Task, find_task
    from qwen2audio_jax.tasks.transcribe import Transcribing
    from qwen2audio_jax.tasks.transcript import Segment, Transcript
    from qwen2audio_jax.tasks.windows import Cutting

_PLACES = {
    "Checks": "checks",
    "Classification": "labels",
    "Cutting": "windows",
    "Segment": "transcript",
    "Task": "task",
    "Tasks": "listener",
    "Transcribing": "transcribe",
    "Transcript": "transcript",
    "find_task": "task",
}

__all__ = [
    "Checks",
    "Classification",
    "Cutting",
    "Segment",
    "Task",
    "Tasks",
    "Transcribing",
    "Transcript",
    "find_task",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"qwen2audio_jax.tasks.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'qwen2audio_jax.tasks' has no attribute {name!r}")
