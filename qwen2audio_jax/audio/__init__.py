"""Audio input: files, URLs, bytes or arrays to samples, and samples to the encoder's log-mel features."""

from typing import TYPE_CHECKING

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.load import check_clip, load_audio
from qwen2audio_jax.audio.mel import log_mel
from qwen2audio_jax.lazy import lazy_names

if TYPE_CHECKING:
    from qwen2audio_jax.audio.mel_batch import log_mel_batch

__all__ = ["AudioError", "check_clip", "load_audio", "log_mel", "log_mel_batch"]

# Imported when it is used: everything else here needs no accelerator.
__getattr__, __dir__ = lazy_names(__name__, {"log_mel_batch": "mel_batch"})
