"""Audio input: files, URLs, bytes or arrays to samples, and samples to the encoder's log-mel features."""

from qwen2audio_jax.audio.errors import AudioError
from qwen2audio_jax.audio.load import check_clip, load_audio
from qwen2audio_jax.audio.mel import log_mel, log_mel_batch

__all__ = ["AudioError", "check_clip", "load_audio", "log_mel", "log_mel_batch"]
