"""Engine: continuous batching in slots, which batch jobs, servers and tasks share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2audio_jax.engine.engine import Engine
    from qwen2audio_jax.engine.handle import Handle
    from qwen2audio_jax.engine.request import Answer, EngineFull, Request, RequestError

_PLACES = {
    "Answer": "request",
    "Engine": "engine",
    "EngineFull": "request",
    "Handle": "handle",
    "Request": "request",
    "RequestError": "request",
}

__all__ = ["Answer", "Engine", "EngineFull", "Handle", "Request", "RequestError"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"qwen2audio_jax.engine.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'qwen2audio_jax.engine' has no attribute {name!r}")
