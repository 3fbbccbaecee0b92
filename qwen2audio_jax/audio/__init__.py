"""Audio input: files, URLs, bytes or arrays to samples, and samples to the encoder's log-mel features."""

from typing import TYPE_CHECKING, Any

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.load import check_clip, load_audio
from qwen2audio_jax.audio.mel import log_mel

if TYPE_CHECKING:
    from qwen2audio_jax.audio.mel_batch import log_mel_batch

__all__ = ["AudioError", "check_clip", "load_audio", "log_mel", "log_mel_batch"]


def __getattr__(name: str) -> Any:
    if name != "log_mel_batch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported when it is used: everything else here needs no accelerator.
    from qwen2audio_jax.audio.mel_batch import log_mel_batch

    return log_mel_batch
