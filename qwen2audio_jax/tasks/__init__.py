"""Tasks: transcription, translation, captions, classification, questions and embeddings, of sound of any length."""

from typing import TYPE_CHECKING

from qwen2audio_jax.lazy import lazy_names

if TYPE_CHECKING:
    from qwen2audio_jax.tasks.checks import Checks
    from qwen2audio_jax.tasks.labels import Classification
    from qwen2audio_jax.tasks.listener import Tasks
    from qwen2audio_jax.tasks.task import Task, find_task
    from qwen2audio_jax.tasks.transcribe import Transcribing
    from qwen2audio_jax.tasks.transcript import Segment, Transcript
    from qwen2audio_jax.tasks.windows import Cutting

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Checks": "checks",
        "Classification": "labels",
        "Cutting": "windows",
        "Segment": "transcript",
        "Task": "task",
        "Tasks": "listener",
        "Transcribing": "transcribe",
        "Transcript": "transcript",
        "find_task": "task",
    },
)
