"""Engine: continuous batching in slots, which batch jobs, servers and tasks share."""

from typing import TYPE_CHECKING

from qwen2audio_jax.lazy import lazy_names

if TYPE_CHECKING:
    from qwen2audio_jax.engine.engine import Engine
    from qwen2audio_jax.engine.handle import Handle
    from qwen2audio_jax.engine.request import Answer, EngineFull, Request, RequestError

__all__ = ["Answer", "Engine", "EngineFull", "Handle", "Request", "RequestError"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Answer": "request",
        "Engine": "engine",
        "EngineFull": "request",
        "Handle": "handle",
        "Request": "request",
        "RequestError": "request",
    },
)
